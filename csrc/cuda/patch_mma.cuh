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
// same for all. Nothing is copied twice: 128 pixels of ZFNet's conv1 read 9 KiB of the image, and
// not the 90 KiB of all their runs. Loads of a warp: eight pixels by four neighbours; where pixels
// are 6 or so words apart they would meet in the banks, so there the eight rows of a matrix are
// every other pixel, and the next matrix has those between. Halves come in pairs: if a run can
// begin at an odd one, there is a second copy of the patch, one half further on, in the other
// sixteen banks.
// The last piece of a run reaches over its end, into the next pixel, which may hold NaN: masked.
//
// Work: conv1 of ZFNet has 7 runs of 21, filled up to 24: 147 of 168 products are useful, and its
// 96 maps fill a tile of 128 x 96, four warps of 64 x 48. Bytes from L2 of a block: 9 KiB of image
// and 66 KiB of weights, in tf32, of which a multiprocessor's first-level cache keeps what it can
// (they are the same for all its blocks): cp.async goes through it here. Shared memory: 27 KiB.
//
// Tried: copies of four bytes of each run (16 LDGSTS a thread and chunk of 48 HMMA, 157 KiB a
// block). Rejected on paper: weights that stay in shared memory while a block goes on from tile to
// tile: 66 KiB of them leave one block an SM and nobody to multiply while it pools.
//
// Measured: not yet, for want of a GPU; `make bench` on one fills this line.
#pragma once

#include "tap_mma.cuh"

namespace zfcuda {

// Shared memory: the stages of the weights, and the patch.
template <typename Tile>
struct PatchShared {
    static constexpr int kStage = Tile::kN * Tile::kPieces;
    static constexpr int kStages = Tile::kStages * kStage * int(sizeof(Piece));
    Piece* stages;
    std::uint32_t* patch;

    __device__ explicit PatchShared(Piece* shared)
        : stages(shared), patch(reinterpret_cast<std::uint32_t*>(shared + kStages / 16)) {}
    static std::size_t bytes(const PatchPlan& h) { return kStages + h.bytes; }
};

// Fills the patch: a warp a row, lanes along its elements.
template <typename T, int kThreads, typename RowOf>
__device__ __forceinline__ void bring_patch(const TapPlan& p, const PatchPlan& h, const T* image,
                                            std::uint32_t* patch, RowOf&& row_of) {
    const int lane = threadIdx.x % 32;
    for (int row = threadIdx.x / 32; row < h.rows; row += kThreads / 32) {
        const TapPixel begin = row_of(row);
        const bool inside = static_cast<unsigned>(begin.y) < static_cast<unsigned>(p.height);
        const int low = inside ? -begin.x * p.pixel : h.pitch;
        const int high = (p.width - begin.x) * p.pixel;
        T* const to = reinterpret_cast<T*>(patch) + row * h.pitch;
        for (int e = lane; e < h.pitch; e += 32) {
            const bool reads = e >= low && e < high && e < h.length;
            const T* const from = image + begin.offset + e;
            if constexpr (sizeof(T) == 4) {
                cp_async<4>(to + e, from, reads ? 4 : 0);
            } else {
                const T value = reads ? *from : T(0.0f);
                to[e] = value;
                if (h.second != 0 && e + 1 < h.pitch) (to + 2 * h.second)[e + 1] = value;
            }
        }
    }
}

// The main loop. `base_of(pixel)` is patch_base, `row_of(row)` patch_row; every thread may use the
// shared memory again afterwards.
template <typename Factors, typename Tile, typename BaseOf, typename RowOf>
__device__ __forceinline__ void patch_product(const TapPlan& p, const PatchPlan& h,
                                              const typename Factors::T* image, int first_column,
                                              const typename Factors::T* packed,
                                              const PatchShared<Tile>& shared,
                                              typename Tile::Accumulator& sum, BaseOf&& base_of,
                                              RowOf&& row_of) {
    using T = typename Factors::T;
    using Shared = PatchShared<Tile>;
    constexpr int kN = Tile::kN, kStages = Tile::kStages, kPieces = Tile::kPieces;
    constexpr int kElements = Pack<T>::size;  // of a piece

    const int piece = threadIdx.x % kPieces, first = threadIdx.x / kPieces;
    const int stage_slot = kept(Tile::template slot<kN>(piece, first));
    const int run_pieces = p.channels / kElements, pieces = p.y.kernel * run_pieces;
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
            left[i][e] =
                shared.patch + (base + odd) * int(sizeof(T)) / 4 + odd * h.second + threadIdx.x % 4;
        }
    typename Tile::Slots right;
    Tile::right_slots(right);

    bring_patch<T, Tile::kThreads>(p, h, image, shared.patch, row_of);
#pragma unroll
    for (int chunk = 0; chunk < kStages - 1; ++chunk) bring_weights(chunk, chunk);

    // What a lane keeps of the last piece of a run.
    const int last = p.run - (run_pieces - 1) * kElements;
    const int own = threadIdx.x % 4 * int(4 / sizeof(T));
    const std::uint32_t kept_bits = own >= last                        ? 0u
                                    : own + int(4 / sizeof(T)) <= last ? ~0u
                                                                       : 0xffffu;
    // Where the next piece of k begins in each run.
    const int next_row = p.y.dilation * h.pitch * int(sizeof(T)) / 4 - 4 * run_pieces;
    int row = begin / run_pieces, number = begin - row * run_pieces;
    int at = begin * 4 + row * next_row;
    struct PieceOf {
        int offset;
        std::uint32_t mask;
    };
    const auto next = [&]() -> PieceOf {
        if (row == p.y.kernel) return {0, 0u};
        PieceOf result = {at, number == run_pieces - 1 ? kept_bits : ~0u};
        at += 4;
        if (++number == run_pieces) {
            number = 0;
            at += next_row;
            ++row;
        }
        return result;
    };

    int full = 0, empty = kStages - 1;
    for (int chunk = 0; chunk < chunks; ++chunk) {
        // Everybody's copies of this chunk have come, and nobody reads the chunk before it any
        // more.
        cp_async_wait<kStages - 2>();
        __syncthreads();
        bring_weights(chunk + kStages - 1, empty);
        PieceOf of[kPieces];
#pragma unroll
        for (auto& one : of) one = next();
        Tile::template multiply<Factors>(
            [&](int k, int i, std::uint32_t (&bits)[4]) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const PieceOf& one = of[2 * k + e / 2];
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

template <typename Factors, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 2)
    patch_mma_kernel(TapPlan p, PatchPlan h, const typename Factors::T* image,
                     const typename Factors::T* packed, const typename Factors::T* bias,
                     const typename Factors::T* forward, void* result) {
    if constexpr (!kMultiplies<Factors>) return never_launched();
    ZF_DYNAMIC_SHARED(Piece, memory);
    const auto block = tap_block<false, Tile::kN>(p);
    typename Tile::Accumulator sum = {};
    patch_product<Factors, Tile>(
        p, h, image, block.first_column, packed, PatchShared<Tile>(memory), sum,
        [&](int pixel) { return patch_base(block, p, h, pixel); },
        [&](int row) { return patch_row(block, p, h, row); });
    store_results<Tile>(p, block, sum, reinterpret_cast<TapPixel*>(memory), bias, forward, result,
                        [&](int row) { return patch_pixel(h, row); });
}

template <typename Factors>
void launch_patch_mma(const MmaPlan<false>& plan, Address image, Address packed, Address partial,
                      Address bias, Address forward, Address result, const Exec& exec) {
    using T = typename Factors::T;
    const auto run = [&](auto tile, const TapPlan& p, dim3 grid, Address bias, Address forward,
                         Address result) {
        using Tile = decltype(tile);
        launch(patch_mma_kernel<Factors, Tile>, grid, dim3(Tile::kThreads),
               PatchShared<Tile>::bytes(plan.patch), exec, p, plan.patch, image.as<const T>(),
               packed.as<const T>(), bias.as<const T>(), forward.as<const T>(), result.value);
    };
    with_mma_cut<Factors, false, true>(plan.tap, partial, bias, forward, result, exec, run);
}

}  // namespace zfcuda
