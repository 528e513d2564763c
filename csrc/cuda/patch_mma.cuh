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
//   +------------------------------+   weights: three buffers, as in tap_mma.cuh
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
// L2 of a block: 9 KiB of image and 57 KiB of weights, in tf32, of which a multiprocessor's
// first-level cache keeps what it can (they are the same for all its blocks): cp.async goes through
// it here. Shared memory: 29 KiB.
//
// Tried: copies of four bytes of each run (16 LDGSTS a thread and chunk of 48 HMMA, 157 KiB a
// block). Then runs filled up to whole pieces each, whose offsets additions and comparisons give:
// 168 products in eleven chunks, six in halves; for VGG 36 in three, 48 in two; and 48 HMMA in 294
// instructions of a chunk, with the table in 184. Rejected on paper: weights that stay in shared
// memory while a block goes on from box to box. With the maps of a pool they take 108 KiB in tf32
// and 78 in halves: an A100 holds one such block or two, an H100 two, a 4090 none or one, where
// they now hold three, three and two, one of which multiplies while another pools; and of the 192
// cycles that an A100 multiplies for eight products of k, loads and stores of shared memory take
// 112 with resident weights, 160 without: less than the product either way. And, with a pool,
// blocks that walk down a strip of windows and keep the row of maps that these share: of conv1 they
// multiply 1.19 times its pixels (55 windows in two strips of 28; one more step at the top),
// boxes 1.28 times, but their maps take 72 KiB instead of 48, which leaves a 4090 one block.
//
// Measured: not yet, for want of a GPU; `make bench` on one fills this line.
#pragma once

#include "tap_mma.cuh"

namespace zfcuda {

// Fills the table.
template <typename T, int kThreads>
__device__ __forceinline__ void list_words(const TapPlan& p, const PatchPlan& h, RunWord* table) {
    constexpr int kWord = 4 / int(sizeof(T));
    const int run = p.channels / kWord, pitch = h.pitch / kWord;
    for (int word = threadIdx.x; word < h.words; word += kThreads) {
        const int row = word / run, element = (word - row * run) * kWord;
        RunWord one = {row * p.y.dilation * pitch + element / kWord, ~0u};
        if (element + kWord > p.run) one.mask = 0xffffu;
        if (row >= p.y.kernel) one = {0, 0u};
        table[word] = one;
    }
}

// The main loop. `base_of(pixel)` is patch_base, `row_of(row)` patch_row; every thread may use the
// shared memory again afterwards.
template <typename Factors, typename Tile, typename BaseOf, typename RowOf>
__device__ __forceinline__ void patch_product_by_mma(
    const TapPlan& p, const PatchPlan& h, const typename Factors::T* image, int first_column,
    const typename Factors::T* packed, const PatchShared<Tile>& shared,
    typename Tile::Accumulator& sum, BaseOf&& base_of, RowOf&& row_of) {
    using T = typename Factors::T;
    using Shared = PatchShared<Tile>;
    constexpr int kN = Tile::kN, kStages = Tile::kStages, kPieces = Tile::kPieces;
    constexpr int kElements = Pack<T>::size;  // of a piece

    const int piece = threadIdx.x % kPieces, first = threadIdx.x / kPieces;
    const int stage_slot = kept(Tile::template slot<kN>(piece, first));
    const int pieces = (p.y.kernel * p.channels + kElements - 1) / kElements;
    const ChunkRange range = chunk_range((pieces + kPieces - 1) / kPieces);
    const int chunks = range.count, begin = range.first * kPieces;  // the first piece
    const T* weights =
        packed +
        (std::int64_t(begin + piece) * p.padded_columns + first_column + first) * kElements;
    const auto bring_weights = [&](int chunk, int stage) {
        if (chunk < chunks) {
            const int bytes = begin + chunk * kPieces + piece < pieces ? 16 : 0;
            Piece* const to = shared.stages + stage * Shared::kStage + stage_slot;
            Tile::template bring_right<true>(to, weights, bytes);
            weights += std::int64_t(p.padded_columns) * kElements * kPieces;
        }
        cp_async_commit();  // perhaps an empty group, so that the newest two are always the same
    };

    // The words where this lane's two pixels of each matrix begin.
    const std::uint32_t* left[Tile::kWarpM / 16][2];
#pragma unroll
    for (int i = 0; i < Tile::kWarpM / 16; ++i)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int row = Tile::first_row() + 16 * i + 8 * e + threadIdx.x % 32 / 4;
            const int base = base_of(patch_pixel(h, row)), odd = h.second != 0 ? base % 2 : 0;
            left[i][e] = shared.patch + (base + odd) * int(sizeof(T)) / 4 + odd * h.second;
        }
    typename Tile::Slots right;
    Tile::right_slots(right);

    list_words<T, Tile::kThreads>(p, h, shared.table);
    const RunWord* words = shared.table + begin * 4 + threadIdx.x % 4;
    bring_patch<T, Tile::kThreads>(p, h, image, shared.patch, row_of);
#pragma unroll
    for (int chunk = 0; chunk < kStages - 1; ++chunk) bring_weights(chunk, chunk);

    int full = 0, empty = kStages - 1;
    for (int chunk = 0; chunk < chunks; ++chunk) {
        // Everybody's copies of this chunk have come, and nobody reads the chunk before it any
        // more.
        cp_async_wait<kStages - 2>();
        __syncthreads();
        bring_weights(chunk + kStages - 1, empty);
        RunWord of[kPieces];
#pragma unroll
        for (int k = 0; k < kPieces; ++k) of[k] = words[k * 4];
        words += kPieces * 4;
        Tile::template multiply<Factors>(
            [&](int k, int i, std::uint32_t (&bits)[4]) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const RunWord& one = of[2 * k + e / 2];
                    bits[e] = left[i][e % 2][one.offset] & one.mask;
                }
            },
            shared.stages + full * Shared::kStage, right, sum);
        empty = full;
        full = full + 1 < kStages ? full + 1 : 0;
    }
    cp_async_wait<0>();
    __syncthreads();
}

}  // namespace zfcuda
