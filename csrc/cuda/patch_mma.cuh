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

#include "halo.cuh"
#include "tap_mma.cuh"

namespace zfcuda {

struct PatchPlan {
    int rows, pitch, length;  // pitch and length of a row in elements
    int tall;                 // rows from a strip of an image to the next one
    int second;               // words from a copy of the patch to the other, or 0
    bool interleaved;         // the pixels of a matrix's rows, see patch_pixel
    std::int64_t bytes;       // of both copies
};

// How often the banks must serve the words of a fragment whose rows are pixels `apart` elements
// from each other.
inline int patch_passes(std::int64_t apart, int bytes) {
    std::int64_t words[32];
    int most = 0, served[32] = {};
    for (int lane = 0; lane < 32; ++lane) {
        const std::int64_t element = lane / 4 * apart, odd = bytes == 2 ? element % 2 : 0;
        words[lane] = (element + odd) * bytes / 4 + 16 * odd + lane % 4;
        bool again = false;
        for (int other = 0; other < lane; ++other) again |= words[other] == words[lane];
        if (!again && ++served[words[lane] % 32] > most) most = served[words[lane] % 32];
    }
    return most;
}

// A patch for so many lines of pixels, `width` long, that end in so many strips before the last.
inline PatchPlan patch_plan(const TapPlan& p, int bytes, std::int64_t lines, std::int64_t width,
                            std::int64_t strips) {
    PatchPlan h = {};
    const std::int64_t step = std::int64_t(p.x.stride) * p.pixel;
    const std::int64_t span = std::int64_t(p.y.kernel - 1) * p.y.dilation + 1;
    const std::int64_t more = span > p.y.stride ? span - p.y.stride : 0;
    const std::int64_t rows = (lines - 1) * p.y.stride + span + strips * more;
    // The last run is read to the end of its last piece, which may be a half further on.
    const std::int64_t last = (width - 1) * step, pitch = (last + p.channels + 1 + 3) / 4 * 4;
    const std::int64_t words = rows * pitch * bytes / 4;
    h.rows = static_cast<int>(rows), h.pitch = static_cast<int>(pitch);
    h.length = static_cast<int>(last) + p.run;
    h.tall = static_cast<int>((p.y.size - std::int64_t(1)) * p.y.stride + span);
    const std::int64_t second = bytes == 2 && step % 2 != 0 ? (words + 15) / 32 * 32 + 16 : 0;
    h.second = static_cast<int>(second);
    h.bytes = 4 * (second + words);
    h.interleaved = patch_passes(2 * step, bytes) < patch_passes(step, bytes);
    return h;
}

// Chooses strips and the pixels of a block for an image whose patches fit (tap_plan.cuh).
inline PatchPlan patch_plan(TapPlan& p, int bytes) {
    const auto measured = [&](int strip, int pixels) {
        const std::int64_t strips = line_ends(std::int64_t(strip) * p.y.size, pixels);
        return patch_plan(p, bytes, 1 + line_ends(strip, pixels), strip, strips);
    };
    choose_strips(p, kPatchBytes,
                  [&](int strip, int pixels) { return measured(strip, pixels).bytes; });
    return measured(p.strip, p.block_pixels);
}

// The element of the patch where a pixel's runs begin.
__device__ inline int patch_base(const TapBlock<false>& block, const TapPlan& p, const PatchPlan& h,
                                 int pixel) {
    if (pixel >= block.pixels) return 0;
    const std::int64_t line = block.first_pixel / block.strip;
    const int x = static_cast<int>(block.first_pixel - line * block.strip) + pixel;
    const int lines = x / block.strip, tall = block.rows.pixels;
    const int strips = (static_cast<int>(line % tall) + lines) / tall;
    const int row = strips * h.tall + (lines - strips * tall) * p.y.stride;
    return row * h.pitch + x % block.strip * p.x.stride * p.pixel;
}

// Where a row of the patch begins in the image, and at which row and column of it.
__device__ inline TapPixel patch_row(const TapBlock<false>& block, const TapPlan& p,
                                     const PatchPlan& h, int row) {
    const std::int64_t line = block.first_pixel / block.strip;
    const std::int64_t first = line / block.rows.pixels;
    const int down = static_cast<int>(line - first * block.rows.pixels) * p.y.stride + row;
    const std::int64_t strip = first + down / h.tall, n = strip / block.strips;
    const int y = down % h.tall - p.y.padding;
    const int x =
        static_cast<int>(strip - n * block.strips) * block.strip * p.x.stride - p.x.padding;
    return {p.steps.offset(n, 0, y, x), n < p.batch ? y : kOutside, x};
}

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

// The pixel of a row of the tile: itself, or of each 16 the even ones first.
__device__ __forceinline__ int patch_pixel(const PatchPlan& h, int row) {
    return h.interleaved ? (row & ~15) | (row & 7) << 1 | (row >> 3 & 1) : row;
}

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
            const T* const from = image + begin.source + e;
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
    constexpr int kStep = Tile::kThreads / kPieces, kRight = (kN + kStep - 1) / kStep;
    static_assert(kN % kStep == 0, "all threads bring weights");

    const int piece = threadIdx.x % kPieces, first = threadIdx.x / kPieces;
    const int stage_slot = kept(Tile::template slot<kN>(piece, first));
    const int run_pieces = p.channels / kElements, pieces = p.y.kernel * run_pieces;
    const int chunks = (pieces + kPieces - 1) / kPieces;
    const T* weights =
        packed + (std::int64_t(piece) * p.padded_columns + first_column + first) * kElements;
    const auto bring_weights = [&](int chunk, int stage) {
        if (chunk < chunks) {
            const int bytes = chunk * kPieces + piece < pieces ? 16 : 0;
            Piece* const to = shared.stages + stage * Shared::kStage + stage_slot;
#pragma unroll
            for (int j = 0; j < kRight; ++j)
                cp_async<16, true>(to + j * kStep, weights + j * kStep * kElements, bytes);
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
    int at = 0, number = 0, row = 0;
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
                     const typename Factors::T* forward, typename Factors::T* result) {
    ZF_DYNAMIC_SHARED(Piece, memory);
    const auto block = tap_block<false, Tile::kN>(p);
    typename Tile::Accumulator sum = {};
    patch_product<Factors, Tile>(
        p, h, image, block.first_column, packed, PatchShared<Tile>(memory), sum,
        [&](int pixel) { return patch_base(block, p, h, pixel); },
        [&](int row) { return patch_row(block, p, h, row); });
    store_results<Tile>(p, block, sum, reinterpret_cast<std::int64_t*>(memory), bias, forward,
                        result, [&](int row) { return patch_pixel(h, row); });
}

// body(Tile{}) for the tile that fits.
template <typename Body>
void with_patch_tile(const TapPlan& p, Body&& body) {
    p.padded_columns % 96 == 0 ? body(MergedMmaTile{}) : body(MediumMmaTile{});
}

template <typename Factors>
void launch_patch_mma(TapPlan p, Address image, Address packed, Address bias, Address forward,
                      Address result, const Exec& exec) {
    using T = typename Factors::T;
    const PatchPlan h = patch_plan(p, sizeof(T));
    p.quads = p.columns % 4 == 0 && aligned(result);
    with_patch_tile(p, [&](auto tile) {
        using Tile = decltype(tile);
        const dim3 grid = tap_grid(p, p.block_pixels, Tile::kN);
        if (grid.x == 0) return;
        launch(patch_mma_kernel<Factors, Tile>, grid, dim3(Tile::kThreads),
               PatchShared<Tile>::bytes(h), exec, p, h, image.as<const T>(), packed.as<const T>(),
               bias.as<const T>(), forward.as<const T>(), result.as<T>());
    });
}

}  // namespace zfcuda
