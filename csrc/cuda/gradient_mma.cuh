#pragma once

#include "gradient_plan.cuh"
#include "mma_tile.cuh"
#include "unpooled_source.cuh"

namespace zfcuda {

using MediumGradientTile = MmaTile<64, 64, 32, 64>;

// The stages, and where the pixels of two chunks lie in the image.
template <typename T, typename Tile>
constexpr int gradient_shared_bytes =
    Tile::kSharedBytes + 2 * (64 / int(sizeof(T))) * int(sizeof(Piece));

// Piece `piece` of pixel k, a few neighbouring channels, in a tile of whole pixels.
template <typename T, int kSide>
ZF_HD int pixel_slot(int k, int piece) {
    return k * (kSide / Pack<T>::size) + (piece ^ (2 * k % 8 + k / 4 % 2));
}

// The two tiles of a stage, by the type of the factors: how the signal is stored, what a thread
// reads, which results it has. One instruction multiplies kStep pixels. Of the signal a thread
// brings piece `piece` of four pixels, those of its number pixel(group, i).
//
// Halves: both tiles are whole pixels, and ldmatrix transposes them. Of an instruction on the left
// the second matrix is eight columns on and the third eight pixels on; of one on the right it is
// the other way round.
template <typename T, typename Tile>
struct PixelTiles {
    static constexpr int kStep = 16;
    static constexpr int kLine = Tile::kM / 8;  // pieces of a pixel
    static constexpr int kBetween = 8;          // from one pixel of a thread's signal to the next

    __device__ static int pixel(int group, int i) { return group + kBetween * i; }
    __device__ static void store_signal(Vector<T, 8>* tile, int group, int piece,
                                        const Vector<T, 8> (&pixels)[4]) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            tile[pixel_slot<T, Tile::kN>(pixel(group, i), piece)] = pixels[i];
    }

    struct Lane {
        int left[Tile::kWarpM / 16], right[Tile::kWarpN / 16];
    };
    __device__ static Lane lane() {
        const int k = threadIdx.x % 8, low = threadIdx.x / 8 % 2, high = threadIdx.x / 16 % 2;
        Lane lane;
#pragma unroll
        for (int i = 0; i < Tile::kWarpM / 16; ++i)
            lane.left[i] =
                kept(pixel_slot<T, Tile::kM>(k + 8 * high, Tile::first_row() / 8 + 2 * i + low));
#pragma unroll
        for (int j = 0; j < Tile::kWarpN / 16; ++j)
            lane.right[j] =
                kept(Tile::kM * 4 +
                     pixel_slot<T, Tile::kN>(k + 8 * low, Tile::first_column() / 8 + 2 * j + high));
        return lane;
    }
    __device__ static void left(const Lane& lane, const Piece* stage, int step, int i,
                                std::uint32_t (&a)[4]) {
        load_matrices<true>(a, stage + lane.left[i] + step * kStep * kLine);
    }
    __device__ static void right(const Lane& lane, const Piece* stage, int step, int j,
                                 std::uint32_t (&b)[4]) {
        load_matrices<true>(b, stage + lane.right[j] + step * kStep * kLine);
    }

    // Neighbouring image columns of results i, and the first of run h.
    static constexpr int kRun = 1;
    __device__ static int image_column(int i, int h) {
        return Tile::first_row() + 16 * i + 8 * h + threadIdx.x % 32 / 4;
    }
};

// tf32 has no ldmatrix that transposes. Its left fragment is two columns of one pixel and the same
// of another, two loads of 8 bytes from whole pixels: the eight columns in between that the
// instruction has them apart are nobody's concern but the epilogue's. Its right fragment is one
// column of two pixels; so the signal, which is in registers anyway, is stored with four pixels of
// a channel in a piece, for an ldmatrix that does not transpose. Piece q of row r is in slot
// q * rows + (r ^ q).
template <typename Tile>
struct PixelTiles<float, Tile> {
    static constexpr int kStep = 8;
    static constexpr int kLine = Tile::kM / 4;
    static constexpr int kBetween = 1;

    __device__ static int slot(int quad, int row) { return quad * Tile::kN + (row ^ quad); }
    __device__ static int pixel(int group, int i) { return 4 * group + i; }
    __device__ static void store_signal(Vector<float, 4>* tile, int group, int piece,
                                        const Vector<float, 4> (&pixels)[4]) {
#pragma unroll
        for (int e = 0; e < 4; ++e)
            tile[slot(group, 4 * piece + e)] = {pixels[0].value[e], pixels[1].value[e],
                                                pixels[2].value[e], pixels[3].value[e]};
    }

    // Left: halves of pieces, for pixels t and t + 4, and columns 0 and 16. Right: pieces.
    struct Lane {
        int left[2][2], right[2];
    };
    __device__ static Lane lane() {
        const int number = threadIdx.x % 32, g = number / 4, t = number % 4;
        Lane lane;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
            for (int i = 0; i < 2; ++i)
                lane.left[h][i] = kept(2 * pixel_slot<float, Tile::kM>(
                                               t + 4 * h, Tile::first_row() / 4 + 4 * i + g / 2) +
                                       g % 2);
            lane.right[h] =
                kept(Tile::kM * 4 + slot(2 * h + number / 8 % 2,
                                         Tile::first_column() + number / 16 * 8 + number % 8));
        }
        return lane;
    }
    __device__ static void left(const Lane& lane, const Piece* stage, int step, int i,
                                std::uint32_t (&a)[4]) {
        const auto* const pairs = reinterpret_cast<const Vector<std::uint32_t, 2>*>(stage);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const auto pair = pairs[lane.left[h][i % 2] + 2 * (i / 2 * 8 + step * kStep * kLine)];
            a[2 * h] = pair.value[0];
            a[2 * h + 1] = pair.value[1];
        }
    }
    __device__ static void right(const Lane& lane, const Piece* stage, int step, int j,
                                 std::uint32_t (&b)[4]) {
        load_matrices<false>(b, stage + lane.right[step] + 16 * j);
    }

    static constexpr int kRun = 2;
    __device__ static int image_column(int i, int) {
        return Tile::first_row() + 16 * i + threadIdx.x % 32 / 4 * 2;
    }
};

template <typename Factors, typename Tile>
__device__ __forceinline__ void multiply_pixels(
    const typename PixelTiles<typename Factors::T, Tile>::Lane& lane, const Piece* stage,
    typename Tile::Accumulator& sum) {
    using T = typename Factors::T;
    using Tiles = PixelTiles<T, Tile>;
#pragma unroll
    for (int step = 0; step < 2; ++step) {
        typename Factors::Left a[Tile::kWarpM / 16];
#pragma unroll
        for (int i = 0; i < Tile::kWarpM / 16; ++i) {
            Tiles::left(lane, stage, step, i, a[i].bits);
            Factors::prepare(a[i]);
        }
#pragma unroll
        for (int j = 0; j < Tile::kWarpN / 16; ++j) {
            std::uint32_t b[4];
            Tiles::right(lane, stage, step, j, b);
#pragma unroll
            for (int i = 0; i < Tile::kWarpM / 16; ++i) {
                Factors::multiply(sum[i][2 * j], a[i], {b[0], b[1]});
                Factors::multiply(sum[i][2 * j + 1], a[i], {b[2], b[3]});
            }
        }
    }
}

// tf32: x * kNudge truncated to 10 bits of fraction, in place of x rounded to them. Truncation
// takes half a unit of the last bit on average, and this gives 0.36 to 0.72 of one, as much on
// average over numbers of every size; what has no more bits stays itself, and so do NaN and
// infinities. One multiplication, where rounding takes three instructions on sm_80.
constexpr float kNudge = 1 + 1.442695f / 4096;

template <typename Factors, typename Tile, typename Source>
__global__ void __launch_bounds__(Tile::kThreads, 2)
    weight_gradient_mma_kernel(GradientPlan p, const typename Factors::T* image, Source source,
                               float* partial) {
    using T = typename Factors::T;
    using Tiles = PixelTiles<T, Tile>;
    constexpr int kElements = Pack<T>::size;  // of a piece
    constexpr int kDepth = 2 * Tiles::kStep;  // pixels of a chunk
    constexpr int kLine = Tiles::kLine;       // pieces of a pixel
    constexpr int kStep =
        Tile::kThreads / kLine;             // pixels of the image that the block brings at once
    constexpr int kLoads = kDepth / kStep;  // a thread's pieces of the image in a chunk
    constexpr int kGroups = kDepth / 4;     // of pixels of the signal
    constexpr int kPeriod = kStep < 8 ? 8 / kStep : 1;  // of the slots
    constexpr int kStages = Tile::kStages, kAhead = kStages - 1;
    static_assert(Tile::kM == Tile::kN && Tile::kThreads == kGroups * kLine,
                  "a thread brings four pieces of each tile");
    ZF_DYNAMIC_SHARED(Piece, stages);
    Piece* const places = stages + kStages * Tile::kStagePieces;
    const ConvShape& s = p.s;
    const auto block = GradientBlock::find<Tile::kM, kDepth>(p);
    const int chunks = static_cast<int>(block.chunks), thread = threadIdx.x;
    const int width = static_cast<int>(s.out_width), height = static_cast<int>(s.out_height);
    const std::int64_t first_pixel = block.split * p.split_pixels;

    // The image: some threads find where the pixels of a chunk lie, a chunk before all use it, and
    // a thread brings one column of some of them.
    Layout from = s.image();
    from.channels_last = true;  // known to the compiler
    const int piece = thread % kLine, first = thread / kLine;
    const Column column(p, from, block.group, block.first_column + piece * kElements);
    const auto image_height = static_cast<unsigned>(from.height);
    const auto image_width = static_cast<unsigned>(from.width);
    int slots[kPeriod];
#pragma unroll
    for (int i = 0; i < kPeriod; ++i)
        slots[i] = kept(pixel_slot<T, Tile::kM>(first + i * kStep, piece));
    const Odometer depth(kDepth, width, height);
    Odometer pixel(first_pixel + thread, width, height);
    const auto find_places = [&](int chunk) {
        if (thread >= kDepth) return;
        const int y = pixel.middle * static_cast<int>(s.stride_h);
        const int x = pixel.low * static_cast<int>(s.stride_w);
        const std::int64_t offset = from.offset(pixel.high, 0, y, x);
        places[chunk % 2 * kDepth + thread] = {
            static_cast<std::uint32_t>(offset), static_cast<std::uint32_t>(offset >> 32),
            static_cast<std::uint32_t>(pixel.high < s.batch ? y : kOutside),
            static_cast<std::uint32_t>(x)};
        pixel.advance(depth, width, height);
    };
    const auto bring_image = [&](int chunk, Piece* tile) {
        const T* values[kLoads];
        int bytes[kLoads];
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            const Piece at = places[chunk % 2 * kDepth + first + i * kStep];
            const auto offset =
                static_cast<std::int64_t>(std::uint64_t(at.value[1]) << 32 | at.value[0]);
            values[i] = image + offset + column.offset;
            const bool inside =
                at.value[2] + column.y < image_height && at.value[3] + column.x < image_width;
            bytes[i] = inside ? 16 : 0;
        }
#pragma unroll
        for (int i = 0; i < kLoads; ++i)
            cp_async<16>(tile + slots[i % kPeriod] + i / kPeriod * 8 * kLine, values[i], bytes[i]);
    };

    // The signal goes through registers. In memory it is dense: its pixels are as far apart
    // everywhere. If it is gathered, their rows and columns count.
    const int group = thread % kGroups, signal_piece = thread / kGroups;
    const std::int64_t row = block.first_row + signal_piece * kElements;
    const std::int64_t channel = block.group * p.rows + row;
    const std::int64_t own_pixel = first_pixel + Tiles::pixel(group, 0);
    int rest =
        row < p.rows ? static_cast<int>(s.batch * s.out_height * s.out_width - own_pixel) : 0;
    std::int64_t signal = own_pixel * s.out_channels + channel;
    const Odometer between(Tiles::kBetween, width, height);
    const Odometer beyond(kDepth - 3 * Tiles::kBetween, width, height);
    Odometer map(own_pixel, width, height);
    Vector<T, kElements> staged[4];
    const auto bring_signal = [&]() {
        if constexpr (kGathers<Source>) {
#pragma unroll 1  // they are much code, and wait for what they load in any case
            for (int i = 0; i < 4; ++i) {
                staged[0] = staged[1], staged[1] = staged[2], staged[2] = staged[3];
                staged[3] = {};
                if (i * Tiles::kBetween < rest)
                    staged[3] = convert<T>(source.template load<kElements>(
                        p.steps.offset(map.high, channel, 0, 0), map.middle, map.low));
                map.advance(i < 3 ? between : beyond, width, height);
            }
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                staged[i] = {};
                if (i * Tiles::kBetween < rest)
                    staged[i] = source.template load<kElements>(
                        signal + i * Tiles::kBetween * s.out_channels, 0, 0);
            }
        }
        signal += kDepth * s.out_channels;
        rest -= kDepth;
    };
    const auto store_signal = [&](Piece* tile) {
        if (p.rectify)
#pragma unroll
            for (auto& vector : staged) rectify_all(vector);
        if constexpr (std::is_same_v<Factors, Tf32>)
#pragma unroll
            for (auto& vector : staged)
#pragma unroll
                for (T& value : vector.value) value *= kNudge;
        Tiles::store_signal(reinterpret_cast<Vector<T, kElements>*>(tile), group, signal_piece,
                            staged);
    };

    const auto bring = [&](int chunk, int buffer) {
        if (chunk < chunks) {
            bring_image(chunk, stages + buffer * Tile::kStagePieces);
            bring_signal();
        }
        cp_async_commit();  // perhaps an empty group, so that the newest two are always the same
        find_places(chunk + 1);
    };
    const auto finish = [&](int chunk, int buffer) {
        if (chunk < chunks) store_signal(stages + buffer * Tile::kStagePieces + 4 * Tile::kM);
    };

    find_places(0);
#pragma unroll
    for (int chunk = 0; chunk < kAhead; ++chunk) {
        __syncthreads();
        bring(chunk, chunk);
        finish(chunk, chunk);
    }
    typename Tile::Accumulator sum = {};
    const auto lane = Tiles::lane();
    int full = 0, empty = kAhead;  // buffers
    for (int chunk = 0; chunk < chunks; ++chunk) {
        // Everybody's copies of this chunk have come, and nobody reads the chunk before it any
        // more.
        cp_async_wait<kStages - 2>();
        __syncthreads();
        bring(chunk + kAhead, empty);
        multiply_pixels<Factors, Tile>(lane, stages + full * Tile::kStagePieces, sum);
        finish(chunk + kAhead, empty);
        empty = full;
        full = full + 1 < kStages ? full + 1 : 0;
    }
    cp_async_wait<0>();

#pragma unroll
    for (int j = 0; j < Tile::kWarpN / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const std::int64_t result_row =
                block.first_row + Tile::first_column() + 8 * j + threadIdx.x % 4 * 2 + e;
            if (result_row >= p.rows) continue;
            float* const to = partial + block.target(p, result_row);
#pragma unroll
            for (int i = 0; i < Tile::kWarpM / 16; ++i)
#pragma unroll
                for (int h = 0; h < 2; h += Tiles::kRun) {
                    const std::int64_t result = block.first_column + Tiles::image_column(i, h);
                    Vector<float, Tiles::kRun> run;
#pragma unroll
                    for (int r = 0; r < Tiles::kRun; ++r) run.value[r] = sum[i][j][2 * (h + r) + e];
                    if (result < p.columns) store_vector(to + result, run);
                }
        }
}

}  // namespace zfcuda
