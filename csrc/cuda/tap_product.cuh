// The main loop of tap_gemm.cuh: the product of a block's pixels with a tile of the packed weights.
//
//   sum[row][column] = sum over taps and channels of source(pixels[row] + tap, channel) * packed
//
// A chunk of kDepth products travels through registers while the one before it is multiplied: one
// barrier a chunk. Loads of the source: lanes along pixels in NCHW, along k in NHWC, four channels
// at a time of floats where they are a multiple of four. A block of a split (tap_split.cuh)
// multiplies its chunks alone.
#pragma once

#include "tap_split.cuh"
#include "tile.cuh"

namespace zfcuda {

// The shared memory of a block: two buffers of each operand, and the pixels.
template <typename T, typename Tile>
struct TapTiles {
    T *left, *right;  // 2 * kLeftSize, 2 * kRightSize
    const TapPixel* pixels;
};

// All threads of the block call it after the pixels are visible; they may reuse the tiles after it.
template <typename T, typename Tile, bool kTransposed, bool kChannelsLast, int kVector,
          typename Source>
__device__ __forceinline__ void tap_product(const TapPlan& p, const Source& source,
                                            const PhaseTaps& rows, const PhaseTaps& columns,
                                            int group, int first_column, const T* packed,
                                            const TapTiles<T, Tile>& tiles,
                                            typename Tile::Accumulator& sum) {
    constexpr int kM = Tile::kM, kN = Tile::kN, kDepth = Tile::kDepth, kPack = Pack<T>::size;
    T *const left = tiles.left, *const right = tiles.right;
    const TapPixel* const pixels = tiles.pixels;
    const int thread = threadIdx.x;

    // Which elements of the left tile a thread brings: NCHW one pixel and kLoads neighbours in k,
    // NHWC one pack in k and kLoads pixels.
    constexpr int kLanes = kDepth / kVector;  // threads along k in NHWC
    constexpr int kRowStep = Tile::kThreads / kLanes;
    constexpr int kLoads = kM * kDepth / (Tile::kThreads * kVector);
    const int load_k = kChannelsLast ? thread % kLanes * kVector : thread / kM * kLoads;
    const int load_row = kChannelsLast ? thread / kLanes : thread % kM;
    // And of the right tile: packs of one row, kRightStep columns apart.
    constexpr int kPacks = kDepth * kN / kPack;
    constexpr int kRight = kPacks > Tile::kThreads ? kPacks / Tile::kThreads : 1;
    constexpr int kRightStep = kN / kRight;
    const bool loads_right = kPacks >= Tile::kThreads || thread < kPacks;
    const int right_k = thread / (kRightStep / kPack);
    const int right_column = thread % (kRightStep / kPack) * kPack;

    const int width = columns.count > 0 ? columns.count : 1;  // no taps, no chunks
    const ChunkRange range =
        chunk_range((rows.count * columns.count * p.channels + kDepth - 1) / kDepth);
    const int first_k = range.first * kDepth;
    const Odometer step(kDepth, p.channels, width);
    Odometer left_at(first_k + load_k, p.channels, width);
    TapWalk vector_at(first_k + load_k, p.channels, width);
    TapWalk right_at(first_k + right_k, p.channels, width);
    const std::int64_t step_y = p.y.offset_step * p.steps.row;
    const std::int64_t step_x = p.x.offset_step * p.steps.column;
    const std::int64_t step_channel = kChannelsLast ? 1 : p.steps.channel;

    // Halves stay halves until they are stored: widening them here would wait for them.
    using Staged = Vector<typename Source::Value, kVector>;
    Staged staged[kLoads];
    Pack<T> staged_right[kRight];

    // What a tap and channel add to a pixel's position; beyond the last tap it is outside.
    const auto displacement = [&](int row, int column, int channel) -> TapPixel {
        return {row * step_y + column * step_x + channel * step_channel,
                row < rows.count ? row * p.y.offset_step : kOutside, column * p.x.offset_step};
    };
    // The displacement of the next k, by additions alone.
    const std::int64_t next_tap = step_x - p.channels * step_channel;
    const std::int64_t next_row = step_y - width * step_x;
    const auto next = [&](Odometer& at, TapPixel& tap) {
        tap.offset += step_channel;
        if (++at.low < p.channels) return;
        at.low = 0;
        tap.offset += next_tap;
        tap.x += p.x.offset_step;
        if (++at.middle < width) return;
        at.middle = 0;
        tap.offset += next_row;
        tap.x = 0;
        tap.y = ++at.high < rows.count ? tap.y + p.y.offset_step : kOutside;
    };
    const unsigned height = static_cast<unsigned>(p.height);
    const unsigned breadth = static_cast<unsigned>(p.width);
    auto fetch_left = [&](const TapPixel& pixel, const TapPixel& tap) -> Staged {
        const bool inside = static_cast<unsigned>(pixel.y + tap.y) < height &&
                            static_cast<unsigned>(pixel.x + tap.x) < breadth;
        if (!inside) return {};
        return source.template load<kVector>(pixel.offset + tap.offset, pixel.y + tap.y,
                                             pixel.x + tap.x);
    };
    // To shared memory: load i.
    const auto put = [&](int buffer, int i, const Staged& values) {
        T* const to = left + buffer * Tile::kLeftSize;
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
            const int k = kChannelsLast ? load_k + j : load_k + i;
            const int row = kChannelsLast ? load_row + i * kRowStep : load_row;
            const T value = static_cast<T>(values.value[j]);
            to[Tile::template slot<kM>(k, row)] = kTransposed && p.rectify ? rectify(value) : value;
        }
    };
    // take(i, value) for the loads of a chunk, one after the other where the source gathers.
    const auto scalars = [&](auto&& take) {
        [[maybe_unused]] constexpr int kUnroll = kGathers<Source> ? 1 : kLoads;
        TapPixel tap = displacement(left_at.high, left_at.middle, left_at.low);
        if constexpr (kChannelsLast) {
#pragma unroll kUnroll
            for (int i = 0; i < kLoads; ++i)
                take(i, fetch_left(pixels[load_row + i * kRowStep], tap));
        } else {
            Odometer at = left_at;
            const TapPixel own_pixel = pixels[load_row];
#pragma unroll kUnroll
            for (int i = 0; i < kLoads; ++i) {
                take(i, fetch_left(own_pixel, tap));
                next(at, tap);
            }
        }
        left_at.advance(step, p.channels, width);
    };
    // Vectors of channels lie in one tap for many chunks: where they are is kept.
    std::int64_t from[kLoads];
    unsigned inside = 0;
    const auto enter_left = [&]() {
        const TapPixel tap = displacement(vector_at.row, vector_at.column, vector_at.channel);
        inside = 0;
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            const TapPixel pixel = pixels[load_row + i * kRowStep];
            from[i] = pixel.offset + tap.offset;
            if (static_cast<unsigned>(pixel.y + tap.y) < height &&
                static_cast<unsigned>(pixel.x + tap.x) < breadth)
                inside |= 1u << i;
        }
    };
    const auto vectors = [&]() {
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            staged[i] = {};
            const TapPixel& pixel = pixels[load_row + i * kRowStep];
            if (inside & 1u << i)
                staged[i] = source.template load<kVector>(
                    from[i], pixel.y + vector_at.row * p.y.offset_step,
                    pixel.x + vector_at.column * p.x.offset_step);
            from[i] += kDepth;
        }
        if (vector_at.advance(kDepth, p.channels, width)) enter_left();
    };
    const T* weights = nullptr;
    const auto enter_right = [&]() {
        const std::int64_t tap = (rows.first + right_at.row * p.y.tap_step) * p.x.kernel +
                                 columns.first + right_at.column * p.x.tap_step;
        const std::int64_t taps = std::int64_t(p.y.kernel) * p.x.kernel;
        const std::int64_t row = (group * taps + tap) * p.channels + right_at.channel;
        weights = packed + row * p.padded_columns + first_column + right_column;
    };
    constexpr bool kVectors = kChannelsLast && kVector > 1;
    if constexpr (kVectors) enter_left();
    enter_right();
    // What is gathered goes to the free buffer at once: a loop of many loads would be long
    // unrolled, and its registers are not needed while the chunk before it is multiplied.
    constexpr bool kAtOnce = !kVectors && kGathers<Source>;
    const auto fetch = [&](int buffer) {
        if constexpr (kVectors)
            vectors();
        else if constexpr (kAtOnce)
            scalars([&](int i, const Staged& value) { put(buffer, i, value); });
        else
            scalars([&](int i, const Staged& value) { staged[i] = value; });
        if (loads_right) {
#pragma unroll
            for (int j = 0; j < kRight; ++j) {
                staged_right[j] = {};
                if (right_at.row < rows.count)
                    staged_right[j] = load_vector<T, kPack>(weights + j * kRightStep);
            }
            weights += std::int64_t(p.padded_columns) * kDepth;
            if (right_at.advance(kDepth, p.channels, width)) enter_right();
        }
    };
    auto stash = [&](int buffer) {
        if constexpr (!kAtOnce)
#pragma unroll
            for (int i = 0; i < kLoads; ++i) put(buffer, i, staged[i]);
        if (loads_right)
#pragma unroll
            for (int j = 0; j < kRight; ++j)
                store_vector(right + buffer * Tile::kRightSize +
                                 Tile::template slot<kN>(right_k, right_column + j * kRightStep),
                             staged_right[j]);
    };

    const typename Tile::First first = Tile::first();
    const int chunks = range.count;
    if (chunks > 0) {
        fetch(0);
        stash(0);
    }
    __syncthreads();
    for (int chunk = 0; chunk < chunks; ++chunk) {
        const bool more = chunk + 1 < chunks;
        const int buffer = chunk % 2;
        if (more) fetch(1 - buffer);
        Tile::multiply(first, left + buffer * Tile::kLeftSize, right + buffer * Tile::kRightSize,
                       sum);
        if (more) stash(1 - buffer);
        __syncthreads();
    }
}

}  // namespace zfcuda
