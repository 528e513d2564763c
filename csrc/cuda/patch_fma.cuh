// The convolution's product by FMA for images of few channels: float32, every bit of it.
//
//   result[pixel][column] = sum over k = (row of taps, element of the run) of
//                           patch[base(pixel) + row * pitch + element] * packed[k][column]
//
// The patch of the image is that of patch_mma.cuh, and so is what runs are. A loop that copies the
// source of each product (tap_product.cuh) issues as many instructions for where it lies as for
// multiplying it; here a block brings its part of the image once, and a thread reads the eight
// elements of its pixels from wherever they are in it, at distances that the instructions contain:
//
//   a thread: 8 pixels x 12 columns      a warp: 8 x 4 threads, pixels side by side
//                 columns                          lane   0 1 2 3 | 4 5 6 7 | …
//             +---+---+---+                        pixel  0 0 0 0 | 1 1 1 1 |
//   pixels    | 4 | 4 | 4 |  3 quads read as       quad   0 1 2 3 | 0 1 2 3 |
//   16 apart  |   |   |   |  16 bytes              one word of 8 pixels, 16 words of a row of
//             +---+---+---+                        weights: a pass each, if pixels lie on banks of
//               32 apart                           their own, as 3, 6 or 12 words apart
//
// Weights stay in shared memory (patch_product.cuh), all rows of taps. Where they do not fit they
// come by as many rows as have up to 48 products, which are multiplied while the next ones are
// copied: two buffers, one barrier. k goes by threes, the colours of a pixel, and at
// the end of a row by ones: there is no product too many, and with the 96 columns of ZFNet's first
// layer none of them is empty. (The tile of 128 x 64, which it had, left a quarter empty.)
//
// Work: 96 FFMA for 11 shared loads, 8.7 a load, of which eight are of a word. Static: 288 of the
// 336 instructions of three k are FFMA: 86 %; of the loop over taps that conv1 had before, 54 %.
// Shared memory where weights are streamed: 36 KiB of these and the patch, at most 28 KiB: together
// what a T4 has; with a pool behind it the maps of a block, 48 KiB, take its place. Two teams or
// blocks a multiprocessor, of 162 to 219 registers a thread.
//
// Tried: 168 registers, for three: without a pool it spills. Rejected on paper: 16 pixels a
// thread in blocks of 256 (91 %), whose maps, 96 KiB, a T4 cannot keep, and other GPUs once; runs
// filled up to fours (24 products for 21).
//
// Measured: not yet, for want of a GPU; `make bench` on one fills this line.
#pragma once

#include "patch.cuh"
#include "tap_split.cuh"

namespace zfcuda {

// Factors as the kernels of patch_product.cuh and pool_product.cuh know them: see mma_tile.cuh.
struct Fma {
    using T = float;
    static constexpr int kSince = 0;
};

// The sizes of a block's product, and a thread's results: kRows pixels by kQuads quads of columns.
template <int kColumnsOfBlock>
struct PatchTile {
    static constexpr int kM = 128, kN = kColumnsOfBlock, kThreads = 128;
    static constexpr int kPieces = kMostRun / 4;  // of a column at a time
    static constexpr int kStages = 2;
    static constexpr int kRows = 8, kQuads = kN / 32;

    using Accumulator = float[kRows][4 * kQuads];

    __device__ static int row(int i) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        return 16 * i + warp % 2 * 8 + lane / 4;
    }
    __device__ static int column(int j) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        return 32 * j + (warp / 2 * 4 + lane % 4) * 4;
    }
    __device__ static float result(const Accumulator& sum, int i, int j, int e) {
        return sum[i][4 * j + e];
    }

    // kDepth products: of elements at `left` and the words behind it, of `right` and the rows
    // behind it.
    template <int kDepth>
    __device__ __forceinline__ static void multiply(const float* left, const int (&pixels)[kRows],
                                                    const float* right, Accumulator& sum) {
#pragma unroll
        for (int k = 0; k < kDepth; ++k) {
            Vector<float, 4> weights[kQuads];
#pragma unroll
            for (int j = 0; j < kQuads; ++j)
                weights[j] = load_vector<float, 4>(right + k * kN + 32 * j);
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
                const float value = left[pixels[i] + k];
#pragma unroll
                for (int j = 0; j < kQuads; ++j)
#pragma unroll
                    for (int e = 0; e < 4; ++e) sum[i][4 * j + e] += value * weights[j].value[e];
            }
        }
    }
};

// The packed weights of a column tile, by rows of taps.
template <typename Tile>
struct PackedRows {
    static constexpr int kRowPieces = Tile::kN / 4;
    const float* from;
    int columns, run;

    __device__ PackedRows(const TapPlan& p, const float* packed, int first_column)
        : from(packed + first_column), columns(p.padded_columns), run(p.run) {}
    // Copies so many from `row` on, if any, each thread from a first piece and then every step-th.
    __device__ void bring(int row, int rows, Piece* to, int first, int step) const {
        const int pieces = rows * run * kRowPieces;
        for (int i = first; i < pieces; i += step) {
            const std::int64_t k = row * run + i / kRowPieces;
            cp_async<16, true>(to + i, from + k * columns + i % kRowPieces * 4, 16);
        }
    }
};

// What is done once for all tiles: the weights, if they stay.
template <typename Tile>
__device__ __forceinline__ void begin_patches_by_fma(const TapPlan& p, const PatchPlan& h,
                                                     const float* packed, int first_column,
                                                     const PatchShared<Tile>& shared) {
    if (h.kept != 0)
        PackedRows<Tile>(p, packed, first_column)
            .bring(0, p.y.kernel, shared.weights, threadIdx.y * Tile::kThreads + threadIdx.x,
                   blockDim.y * Tile::kThreads);
}

template <typename Tile, typename BaseOf, typename RowOf>
__device__ __forceinline__ void patch_product_by_fma(const TapPlan& p, const PatchPlan& h,
                                                     const float* image, int first_column,
                                                     const float* packed,
                                                     const PatchShared<Tile>& shared,
                                                     typename Tile::Accumulator& sum,
                                                     BaseOf&& base_of, RowOf&& row_of) {
    const PackedRows<Tile> weights(p, packed, first_column);
    const int rows = h.kept != 0 ? p.y.kernel : kMostRun / p.run;  // at a time
    const ChunkRange range = chunk_range((p.y.kernel + rows - 1) / rows);
    const int begin = range.first * rows;
    const int end = min(begin + range.count * rows, p.y.kernel);
    const auto bring_weights = [&](int row, int stage) {
        Piece* const to = shared.weights + stage * PatchShared<Tile>::kStage;
        weights.bring(row, min(rows, end - row), to, threadIdx.x, Tile::kThreads);
    };

    int pixels[Tile::kRows];
#pragma unroll
    for (int i = 0; i < Tile::kRows; ++i) pixels[i] = base_of(Tile::row(i));
    bring_patch<float, Tile::kThreads>(p, h, image, shared.patch, row_of);
    if (h.kept == 0) bring_weights(begin, 0);
    cp_async_commit();

    int full = 0;
    for (int row = begin; row < end; row += rows, full = 1 - full) {
        // Everybody's copies of these rows have come, and nobody reads those before them any more.
        cp_async_wait<0>();
        sync_team<Tile::kThreads>();
        bring_weights(row + rows, 1 - full);
        cp_async_commit();
        const Piece* const stage = shared.weights + full * PatchShared<Tile>::kStage;
        const float* right = reinterpret_cast<const float*>(stage) + Tile::column(0);
        for (int y = row; y < min(row + rows, end); ++y) {
            const float* left =
                reinterpret_cast<const float*>(shared.patch) + y * p.y.dilation * h.pitch;
            int rest = p.run;
            for (; rest >= 3; rest -= 3, left += 3, right += 3 * Tile::kN)
                Tile::template multiply<3>(left, pixels, right, sum);
            for (; rest > 0; --rest, ++left, right += Tile::kN)
                Tile::template multiply<1>(left, pixels, right, sum);
        }
    }
    cp_async_wait<0>();
    sync_team<Tile::kThreads>();
}

}  // namespace zfcuda
