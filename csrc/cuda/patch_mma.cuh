// The convolutions' product on the tensor cores for images of few channels, whose rows of taps are
// merged (tap_plan.cuh).
//
//   result[pixel][column] = sum over k = (row of taps, element of the run) of
//                           patch[base(pixel) + row * pitch + element] * packed
//
//       patch: the block's part of the image, once           a filter's row meets a run of it: 7
//   +------------------------------+                         columns of three colours are 21
//   |    [ run of pixel 0 ]        |  \ rows of taps         neighbours, whichever pixel; the next
//   |    [ row below      ]        |  /                      pixel's run begins 6 elements on
//   |         [ run of pixel 1 ]   |
//   +------------------------------+   weights: all of them, or three buffers as in tap_mma.cuh
//
// A run begins at any element, where ldmatrix reads only whole pieces: so a lane loads its words of
// a fragment by themselves, from the addresses of two pixels of its own and an offset that is the
// same for all pixels. Nothing is copied twice: 128 pixels of ZFNet's conv1 read 9 KiB of the
// image, and not the 90 KiB of all their runs. Loads of a warp: eight pixels by four words; where
// pixels are 6 or so words apart they would meet in the banks, so there the eight rows of a matrix
// are every other pixel, and the next matrix has those between. Halves come in pairs: if a run can
// begin at an odd one, there is a second copy of the patch, one half further on, in the other
// sixteen banks.
//
// The runs follow each other without a gap, as k: a table has the offset of each word of them, and
// what of it belongs to a run, for a word of halves may reach into the next pixel, which may hold
// NaN, and the last piece is filled up. Four loads of 8 bytes a chunk, from four places a warp.
//
//   piece of k   | 16 17 18 19 | 20  0  1  2 |  3 …       the pitch of the patch keeps words that
//   row of taps  |      0      |  0  1  1  1 |  1         follow each other in k in other banks
//
// Work: conv1 of ZFNet is 147 products of 160, ten chunks in tf32 and five in halves; VGG's 3 x 3
// is 27 of 32, two and one. Its 96 maps fill a tile of 128 x 96, four warps of 64 x 48. Bytes from
// L2 of a tile: 9 KiB of image, in tf32, and where the weights do not stay (patch_product.cuh) 60
// KiB of these, of which a multiprocessor's first-level cache keeps what it can: cp.async goes
// through it here.
//
// Static: a chunk of weights that stay is 48 HMMA in 168 to 171 instructions (195 to 198 on sm_100
// and 120), without a barrier or a copy; streamed, 195 to 203 (222 to 228).
//
// Tried: copies of four bytes of each run (16 LDGSTS a thread and chunk of 48 HMMA, 157 KiB a
// block). Then runs filled up to whole pieces each, whose offsets additions and comparisons give:
// 168 products in eleven chunks, six in halves; for VGG 36 in three, 48 in two; and 48 HMMA in 294
// instructions of a chunk, where the table needs 184. Offsets in words: some kernels then add and
// scale each, 32 instructions more. Rejected on paper, with a pool: blocks that walk down a strip
// of windows and keep the row of maps that these share: of conv1 they multiply 1.19 times its
// pixels (55 windows in two strips of 28; one more step at the top), boxes 1.28 times, but their
// maps take 72 KiB instead of 48.
//
// Measured: not yet, for want of a GPU; `make bench` on one fills this line.
#pragma once

#include "tap_mma.cuh"

namespace zfcuda {

// Fills the table, by all teams.
template <typename T, int kThreads>
__device__ __forceinline__ void list_words(const TapPlan& p, const PatchPlan& h, RunWord* table) {
    constexpr int kWord = 4 / int(sizeof(T));
    const int run = p.channels / kWord, pitch = h.pitch / kWord;
    const int first = threadIdx.y * kThreads + threadIdx.x, step = blockDim.y * kThreads;
    for (int word = first; word < h.words; word += step) {
        const int row = word / run, element = (word - row * run) * kWord;
        RunWord one = {(row * p.y.dilation * pitch + element / kWord) * 4, ~0u};
        if (element + kWord > p.run) one.mask = 0xffffu;
        if (row >= p.y.kernel) one = {0, 0u};
        table[word] = one;
    }
}

// Copies a chunk of the packed weights, a piece of every so many columns a thread.
template <typename Tile, typename T>
__device__ __forceinline__ void bring_chunk(const TapPlan& p, const T* packed, int first_column,
                                            int chunk, Piece* stage) {
    constexpr int kElements = Pack<T>::size;  // of a piece
    const int piece = threadIdx.x % Tile::kPieces, column = threadIdx.x / Tile::kPieces;
    const std::int64_t row = std::int64_t(chunk * Tile::kPieces + piece) * p.padded_columns;
    Tile::template bring_right<true>(stage + Tile::template slot<Tile::kN>(piece, column),
                                     packed + (row + first_column + column) * kElements, 16);
}

// What is done once for all tiles: the table, and the weights, if they stay.
template <typename Factors, typename Tile>
__device__ __forceinline__ void begin_patches_by_mma(const TapPlan& p, const PatchPlan& h,
                                                     const typename Factors::T* packed,
                                                     int first_column,
                                                     const PatchShared<Tile>& shared) {
    using T = typename Factors::T;
    list_words<T, Tile::kThreads>(p, h, shared.table);
    if (h.kept == 0) return;
    for (int chunk = threadIdx.y; chunk < h.chunks(); chunk += blockDim.y)
        bring_chunk<Tile>(p, packed, first_column, chunk,
                          shared.weights + chunk * PatchShared<Tile>::kStage);
}

// The main loop. `base_of(row)` is patch_base of the pixel of a row of the tile, `row_of(row)` is
// patch_row of the patch's; every thread of the team may use its shared memory again afterwards.
template <typename Factors, typename Tile, typename BaseOf, typename RowOf>
__device__ __forceinline__ void patch_product_by_mma(
    const TapPlan& p, const PatchPlan& h, const typename Factors::T* image, int first_column,
    const typename Factors::T* packed, const PatchShared<Tile>& shared,
    typename Tile::Accumulator& sum, BaseOf&& base_of, RowOf&& row_of) {
    using T = typename Factors::T;
    using Shared = PatchShared<Tile>;
    constexpr int kStages = Tile::kStages, kPieces = Tile::kPieces;

    const ChunkRange range = chunk_range(h.chunks());
    const int chunks = range.count;
    const auto bring_weights = [&](int chunk, int stage) {
        if (chunk < chunks)
            bring_chunk<Tile>(p, packed, first_column, range.first + chunk,
                              shared.weights + stage * Shared::kStage);
        cp_async_commit();  // perhaps an empty group, so that the newest two are always the same
    };

    // The words where this lane's two pixels of each matrix begin.
    const char* left[Tile::kWarpM / 16][2];
#pragma unroll
    for (int i = 0; i < Tile::kWarpM / 16; ++i)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int row = Tile::first_row() + 16 * i + 8 * e + threadIdx.x % 32 / 4;
            const int base = base_of(row), odd = h.second != 0 ? base % 2 : 0;
            left[i][e] = reinterpret_cast<const char*>(
                shared.patch + (base + odd) * int(sizeof(T)) / 4 + odd * h.second);
        }
    typename Tile::Slots right;
    Tile::right_slots(right);

    const RunWord* words = shared.table + range.first * kPieces * 4 + threadIdx.x % 4;
    bring_patch<T, Tile::kThreads>(p, h, image, shared.patch, row_of);
    const bool stay = h.kept != 0;
    if (stay) {
        cp_async_commit();
        cp_async_wait<0>();
        sync_team<Tile::kThreads>();
    } else {
#pragma unroll
        for (int chunk = 0; chunk < kStages - 1; ++chunk) bring_weights(chunk, chunk);
    }

    const int stages = stay ? chunks : kStages;
    int full = 0;
    for (int chunk = 0; chunk < chunks; ++chunk) {
        if (!stay) {
            // Everybody's copies of this chunk have come, and nobody reads the chunk before it any
            // more.
            cp_async_wait<kStages - 2>();
            sync_team<Tile::kThreads>();
            bring_weights(chunk + kStages - 1, full > 0 ? full - 1 : kStages - 1);
        }
        RunWord of[kPieces];
#pragma unroll
        for (int k = 0; k < kPieces; ++k) of[k] = words[k * 4];
        words += kPieces * 4;
        Tile::template multiply<Factors>(
            [&](int k, int i, std::uint32_t (&bits)[4]) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const RunWord& one = of[2 * k + e / 2];
                    const char* const word = left[i][e % 2] + one.offset;
                    bits[e] = *reinterpret_cast<const std::uint32_t*>(word) & one.mask;
                }
            },
            shared.weights + full * Shared::kStage, right, sum);
        full = full + 1 < stages ? full + 1 : 0;
    }
    cp_async_wait<0>();
    sync_team<Tile::kThreads>();
}

}  // namespace zfcuda
