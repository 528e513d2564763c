// Convolution and transposed convolution as one implicit product of matrices.
//
//   result[n, column, pixel] = sum over taps and channels of
//                              source[n, channel, q * pixel_step + offset(tap)] * weight[...]
//
//              columns (result channels of a group)
//             +-----------+
//   k = (tap, |  packed   |   packed weights [group][tap][channel][column], columns padded to kN
//   channel)  |  weights  |
//   +---------+-----------+
//   | source  |  result   |   rows: pixels q of all images, kM a block
//   +---------+-----------+
//
// Convolution: q is a pixel of the maps, pixel_step the stride, offset(t) = t * dilation - padding.
// Transposed: the image's pixels y = phase + q * stride of one phase of the stride are hit only by
// the taps with t * dilation = phase + padding (mod stride), every tap_step-th one, and tap t
// reads the maps at q + (phase + padding - t * dilation) / stride. Each phase is a convolution with
// its own few taps, a slice of the grid; results are gathered, with no zero work and no atomics.
//
// Work: 2 * batch * pixels * taps * in_channels * out_channels / groups operations. A block reads
// its source tile once for each column tile, the taps' overlap coming from L1, and writes each
// result once. 128 x 64 results with 8 x 4 a thread do 32 FMA for three 16-byte shared loads;
// 256 x 16 serves groups with few result channels (the way down to the three colours). The next
// chunk travels through registers while the present one is multiplied: one barrier a chunk.
// Loads of the source: lanes along pixels in NCHW, along k in NHWC, four channels at a time where
// they are a multiple of four. The weights are packed first (a transposition of at most megabytes)
// so that every block reads them as 16-byte packs.
// Static: at most 128 registers a thread in float32 (two blocks an SM) on every architecture, 27
// KiB of shared memory, 40 KiB in the narrow tile; FFMA are 51 % of the main loop in NCHW, 58 % in
// NHWC and 64 % by four channels (128 x 64, sm_90).
//
// Measured: not yet, for want of a GPU; `make bench` on one fills this line.
#pragma once

#include "tap_plan.cuh"
#include "tile.cuh"

namespace zfcuda {

// Where a pixel of the result reads (before the taps) and where it is stored.
struct alignas(16) TapPixel {
    std::int64_t source;
    int y, x;
};

template <typename T, typename Tile, bool kTransposed, bool kChannelsLast, int kVector>
__global__ void __launch_bounds__(kTileThreads, kResidentBlocks<T>)
    tap_gemm_kernel(TapPlan p, const T* source, const T* packed, const T* bias, const T* forward,
                    T* result) {
    constexpr int kM = Tile::kM, kN = Tile::kN, kDepth = Tile::kDepth, kPack = Pack<T>::size;
    ZF_SHARED(Pack<T>, left_tiles, 2 * kDepth * kM / kPack);
    ZF_SHARED(Pack<T>, right_tiles, 2 * kDepth * kN / kPack);
    ZF_SHARED(TapPixel, pixels, kM);
    ZF_SHARED(std::int64_t, targets, kM);
    T* const left = reinterpret_cast<T*>(left_tiles);
    T* const right = reinterpret_cast<T*>(right_tiles);
    const int thread = threadIdx.x;

    // Column tiles vary fastest: blocks that run together share their source.
    unsigned block = blockIdx.x;
    const int first_column = static_cast<int>(block % p.column_tiles) * kN;
    block /= p.column_tiles;
    const std::int64_t first_pixel = std::int64_t(block % p.row_tiles) * kM;
    block /= p.row_tiles;
    const int group = static_cast<int>(block % p.groups);
    const int phase_x = static_cast<int>(block / p.groups % p.x.phases);
    const int phase_y = static_cast<int>(block / p.groups / p.x.phases);
    const PhaseTaps rows = phase_taps<kTransposed>(p.y, phase_y);
    const PhaseTaps columns = phase_taps<kTransposed>(p.x, phase_x);
    const std::int64_t pixel_count = p.batch * rows.pixels * columns.pixels;
    if (first_pixel >= pixel_count) return;  // the whole block: later phases have fewer pixels

    if (thread < kM) {
        const std::int64_t pixel = first_pixel + thread;
        const std::int64_t x = pixel % columns.pixels;
        const std::int64_t y = pixel / columns.pixels % rows.pixels;
        const std::int64_t n = pixel / columns.pixels / rows.pixels;
        const std::int64_t from_y = y * p.y.pixel_step + rows.offset;
        const std::int64_t from_x = x * p.x.pixel_step + columns.offset;
        const bool inside = pixel < pixel_count;
        pixels[thread] = {p.source.offset(n, std::int64_t(group) * p.channels, from_y, from_x),
                          inside ? static_cast<int>(from_y) : kOutside, static_cast<int>(from_x)};
        targets[thread] = inside ? p.result.offset(n, std::int64_t(group) * p.columns,
                                                   kTransposed ? phase_y + y * p.y.stride : y,
                                                   kTransposed ? phase_x + x * p.x.stride : x)
                                 : -1;
    }
    __syncthreads();

    // Which elements of the left tile a thread brings: NCHW one pixel and kLoads neighbours in k,
    // NHWC one pack in k and kLoads pixels.
    constexpr int kLanes = kDepth / kVector;  // threads along k in NHWC
    constexpr int kLoads = kM * kDepth / (kTileThreads * kVector);
    const int load_k = kChannelsLast ? thread % kLanes * kVector : thread / kM * kLoads;
    const int load_row = kChannelsLast ? thread / kLanes : thread % kM;
    // And of the right tile: one pack of a row.
    const bool loads_right = thread < kDepth * kN / kPack;
    const int right_k = thread / (kN / kPack), right_column = thread % (kN / kPack) * kPack;

    const int width = columns.count > 0 ? columns.count : 1;  // no taps, no chunks
    const Odometer step(kDepth, p.channels, width);
    Odometer left_at(load_k, p.channels, width), right_at(right_k, p.channels, width);
    const std::int64_t step_y = p.y.offset_step * p.source.step_y();
    const std::int64_t step_x = p.x.offset_step * p.source.step_x();
    const std::int64_t step_channel = kChannelsLast ? 1 : p.source.step_channel();

    Vector<T, kVector> staged[kLoads];
    Pack<T> staged_right;

    // What a tap and channel add to a pixel's position; beyond the last tap it is outside.
    const auto displacement = [&](const Odometer& at) -> TapPixel {
        return {at.high * step_y + at.middle * step_x + at.low * step_channel,
                at.high < rows.count ? at.high * p.y.offset_step : kOutside,
                at.middle * p.x.offset_step};
    };
    // The displacement of the next k, by additions alone.
    const std::int64_t next_tap = step_x - p.channels * step_channel;
    const std::int64_t next_row = step_y - width * step_x;
    const auto next = [&](Odometer& at, TapPixel& tap) {
        tap.source += step_channel;
        if (++at.low < p.channels) return;
        at.low = 0;
        tap.source += next_tap;
        tap.x += p.x.offset_step;
        if (++at.middle < width) return;
        at.middle = 0;
        tap.source += next_row;
        tap.x = 0;
        tap.y = ++at.high < rows.count ? tap.y + p.y.offset_step : kOutside;
    };
    const unsigned height = static_cast<unsigned>(p.source.height);
    const unsigned breadth = static_cast<unsigned>(p.source.width);
    auto fetch_left = [&](const TapPixel& pixel, const TapPixel& tap) -> Vector<T, kVector> {
        const bool inside = static_cast<unsigned>(pixel.y + tap.y) < height &&
                            static_cast<unsigned>(pixel.x + tap.x) < breadth;
        if (!inside) return {};
        return load_gated<T, kVector>(source, kTransposed ? forward : nullptr,
                                      pixel.source + tap.source);
    };
    const TapPixel own_pixel = pixels[load_row];
    auto fetch = [&]() {
        TapPixel tap = displacement(left_at);
        if constexpr (kChannelsLast) {
#pragma unroll
            for (int i = 0; i < kLoads; ++i)
                staged[i] = fetch_left(pixels[load_row + i * (kTileThreads / kLanes)], tap);
        } else {
            Odometer at = left_at;
#pragma unroll
            for (int i = 0; i < kLoads; ++i) {
                staged[i] = fetch_left(own_pixel, tap);
                next(at, tap);
            }
        }
        left_at.advance(step, p.channels, width);
        if (loads_right) {
            const std::int64_t tap = (rows.first + right_at.high * p.y.tap_step) * p.x.kernel +
                                     columns.first + right_at.middle * p.x.tap_step;
            const std::int64_t taps = std::int64_t(p.y.kernel) * p.x.kernel;
            const std::int64_t row = (group * taps + tap) * p.channels + right_at.low;
            staged_right = {};
            if (right_at.high < rows.count)
                staged_right = load_vector<T, kPack>(packed + row * p.padded_columns +
                                                     first_column + right_column);
            right_at.advance(step, p.channels, width);
        }
    };
    auto stash = [&](int buffer) {
        T* const to = left + buffer * kDepth * kM;
#pragma unroll
        for (int i = 0; i < kLoads; ++i)
#pragma unroll
            for (int j = 0; j < kVector; ++j) {
                const int k = kChannelsLast ? load_k + j : load_k + i;
                const int row = kChannelsLast ? load_row + i * (kTileThreads / kLanes) : load_row;
                const T value = staged[i].value[j];
                to[tile_slot<kM>(k, row)] = kTransposed && p.rectify ? rectify(value) : value;
            }
        if (loads_right)
            store_vector(right + buffer * kDepth * kN + tile_slot<kN>(right_k, right_column),
                         staged_right);
    };

    typename Tile::Accumulator sum = {};
    const int chunks = (rows.count * columns.count * p.channels + kDepth - 1) / kDepth;
    if (chunks > 0) {
        fetch();
        stash(0);
    }
    __syncthreads();
    for (int chunk = 0; chunk < chunks; ++chunk) {
        const bool more = chunk + 1 < chunks;
        const int buffer = chunk % 2;
        if (more) fetch();
        Tile::multiply(left + buffer * kDepth * kM, right + buffer * kDepth * kN, sum);
        if (more) stash(1 - buffer);
        __syncthreads();
    }

    // Bias and gate; then quads of neighbours: pixels in NCHW, channels in NHWC.
    const int column = first_column + Tile::column();
    const std::int64_t plane = kChannelsLast ? 1 : p.result.step_channel();
    T shift[4];
#pragma unroll
    for (int j = 0; j < 4; ++j)
        shift[j] = bias != nullptr && column + j < p.columns
                       ? bias[std::int64_t(group) * p.columns + column + j]
                       : T(0);
    auto finish = [&](T value, std::int64_t offset) {
        if (!kTransposed && forward != nullptr && forward[offset] <= T(0)) return T(0);
        return !kTransposed && p.rectify ? rectify(value) : value;
    };
#pragma unroll
    for (int i = 0; i < Tile::kRows; i += 4)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            // Quad j: of pixels i…i+3 in channel j, or of all four channels in pixel i+j.
            const std::int64_t target = targets[Tile::row(kChannelsLast ? i + j : i)];
            T quad[4];
#pragma unroll
            for (int e = 0; e < 4; ++e)
                quad[e] = kChannelsLast ? sum[i + j][e] + shift[e] : sum[i + e][j] + shift[j];
            if (p.quads) {
                if (target < 0 || column + (kChannelsLast ? 0 : j) >= p.columns) continue;
                const std::int64_t offset = target + (kChannelsLast ? column : column + j) * plane;
#pragma unroll
                for (int e = 0; e < 4; e += kPack) {
                    Pack<T> pack;
#pragma unroll
                    for (int f = 0; f < kPack; ++f)
                        pack.value[f] = finish(quad[e + f], offset + e + f);
                    store_vector(result + offset + e, pack);
                }
            } else {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const std::int64_t to = kChannelsLast ? target : targets[Tile::row(i + e)];
                    const int c = column + (kChannelsLast ? e : j);
                    if (to >= 0 && c < p.columns)
                        result[to + c * plane] = finish(quad[e], to + c * plane);
                }
            }
        }
}

template <typename T, typename Tile, bool kTransposed, bool kChannelsLast, int kVector>
void launch_tap_gemm(TapPlan p, Address source, Address packed, Address bias, Address forward,
                     Address result, const Exec& exec) {
    // The pixels of the first phase, the largest one.
    const std::int64_t height = (p.y.size + p.y.phases - 1) / p.y.phases;
    const std::int64_t width = (p.x.size + p.x.phases - 1) / p.x.phases;
    const std::int64_t row_tiles = (p.batch * height * width + Tile::kM - 1) / Tile::kM;
    p.column_tiles = p.padded_columns / Tile::kN;
    const std::int64_t blocks = row_tiles * p.column_tiles * p.groups * p.y.phases * p.x.phases;
    if (blocks == 0) return;
    if (blocks > std::numeric_limits<int>::max())
        throw std::runtime_error("zfcuda: a CUDA convolution needs over 2^31 blocks");
    p.row_tiles = static_cast<int>(row_tiles);
    const std::int64_t neighbours = kChannelsLast ? p.columns : height * width;
    const bool dense = kChannelsLast || p.y.phases * p.x.phases == 1;
    p.quads = dense && neighbours % 4 == 0 && aligned(result);
    launch(tap_gemm_kernel<T, Tile, kTransposed, kChannelsLast, kVector>,
           dim3(static_cast<unsigned>(blocks)), dim3(kTileThreads), 0, exec, p,
           source.as<const T>(), packed.as<const T>(), bias.as<const T>(), forward.as<const T>(),
           result.as<T>());
}

// `gate` acts on the source of the transposed convolution, on the result of the other; `packed` are
// the weights, by pack_weights.
template <bool kTransposed>
void tap_gemm(const ConvShape& s, Dtype dtype, Gate gate, Address source, Address packed,
              Address bias, Address forward, Address result, const Exec& exec) {
    const TapPlan p = tap_plan<kTransposed>(s, dtype, gate);
    const auto multiply = [&](auto launcher) {
        launcher(p, source, packed, bias, mask_of(gate, forward), result, exec);
    };
    const bool channels_last = s.channels_last != 0;
    if (dtype == Dtype::float64) {
        using Square = Tile<double, 64, 64>;
        return channels_last ? multiply(launch_tap_gemm<double, Square, kTransposed, true, 1>)
                             : multiply(launch_tap_gemm<double, Square, kTransposed, false, 1>);
    }
    using Wide = Tile<float, 128, 64>;
    using Narrow = Tile<float, 256, 16>;
    const bool vector = channels_last && p.channels % 4 == 0 && aligned(source, forward);
    if (narrow(p.columns, dtype)) {
        if (vector) return multiply(launch_tap_gemm<float, Narrow, kTransposed, true, 4>);
        if (channels_last) return multiply(launch_tap_gemm<float, Narrow, kTransposed, true, 1>);
        return multiply(launch_tap_gemm<float, Narrow, kTransposed, false, 1>);
    }
    if (vector) return multiply(launch_tap_gemm<float, Wide, kTransposed, true, 4>);
    if (channels_last) return multiply(launch_tap_gemm<float, Wide, kTransposed, true, 1>);
    multiply(launch_tap_gemm<float, Wide, kTransposed, false, 1>);
}

}  // namespace zfcuda
