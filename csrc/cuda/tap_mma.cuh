// The convolution of tap_gemm.cuh on the tensor cores, for NHWC sources with whole pieces of
// channels and filters whose taps would share little of a halo (halo_mma.cuh): 1 x 1, 3 x 3 of
// stride 2.
//
//   result[pixel][column] = sum over k = (tap, channel) of source[pixel + tap][channel] * packed
//
//                            packed weights, kN columns
//            chunk      +---+---+---+- -
//            of four    | 0 | 1 | 2 |       three buffers in shared memory: copies fill two of
//            pieces     +---+---+---+- -    them while the third is multiplied
//            +---+---+---+
//   source,  | 0 | 1 | 2 |     a block: 128 x 128 results, four warps of 64 x 64
//   kM pixels|   |   |   |              128 x 64, four warps of 64 x 32
//            +---+---+---+              128 x 16, four warps of 32 x 16
//
// A piece is 16 bytes, four floats or eight halves. Channels are whole pieces, so a piece lies in
// one tap and is inside the source or zero as a whole: cp.async brings it, or zeros. Weights are
// packed in pieces too. There is one barrier a chunk.
//
// Which tile, and whether a block multiplies all of k or one split of it, says tap_choice.cuh.
//
// Work: as tap_gemm.cuh. A block of 128 x 128 reads 256 k numbers for 128 * 128 k products: 32 FLOP
// a byte in float32, 64 in halves, from L2, where blocks of one row of tiles share their source.
// Three stages of 16 KiB leave room for two blocks on an SM of any architecture from sm_80 on (100
// KiB on sm_86, 89 and 120); four would leave one. Static (tf32 and halves, 128 x 128): at most 247
// registers; a chunk issues 149 instructions of a warp, 64 of them products, 16 ldmatrix and 8
// cp.async of 16 bytes, and no conversion; entering another tap, once in C / 16 (halves C / 32)
// chunks, issues about 70 more. The epilogue writes 16 bytes a thread straight from registers,
// since the weights' columns are packed in the order of mma_slot.
//
// Tried: an index that counts taps and channels every chunk (117 instructions more in a chunk).
// Rejected on paper: weights packed in the order of fragments (loads of 16 bytes instead of
// ldmatrix, but two pieces of an instruction might then not lie in two taps, as they do with few
// channels and in phases); weights split for tf32x3 when they are packed (no conversions of the
// right factor, but twice the copies and ldmatrix). For tf32x3 the largest tile would spill.
//
// Measured: not yet, for want of a GPU; `make bench` on one fills this line.
#pragma once

#include "mma_tile.cuh"
#include "tap_choice.cuh"
#include "tap_split.cuh"

namespace zfcuda {

// The main loop, over all chunks or those of the block's split. `pixel_of(row)` says what a row of
// the tile reads; `stages` are Tile::kSharedBytes, which every thread may use again afterwards.
template <typename Factors, typename Tile, typename PixelOf>
__device__ __forceinline__ void mma_product(const TapPlan& p, const typename Factors::T* source,
                                            const PhaseTaps& rows, const PhaseTaps& columns,
                                            int group, int first_column,
                                            const typename Factors::T* packed, Piece* stages,
                                            typename Tile::Accumulator& sum, PixelOf&& pixel_of) {
    using T = typename Factors::T;
    constexpr int kM = Tile::kM, kN = Tile::kN, kStages = Tile::kStages, kPieces = Tile::kPieces;
    constexpr int kElements = Pack<T>::size;  // of a piece
    constexpr int kStep = Tile::kStep;        // rows that the block brings at once
    constexpr int kLeft = kM / kStep;
    static_assert(kM % kStep == 0, "all threads bring as many rows");

    // A thread brings one piece of each chunk, for some rows of the source and some of the weights.
    const int piece = threadIdx.x % kPieces, first = threadIdx.x / kPieces;
    auto* const table = reinterpret_cast<TapPixel*>(stages);
    for (int row = threadIdx.x; row < kM; row += Tile::kThreads) table[row] = pixel_of(row);
    __syncthreads();
    TapPixel pixels[kLeft];
#pragma unroll
    for (int i = 0; i < kLeft; ++i) pixels[i] = table[first + i * kStep];
    __syncthreads();

    const int pieces = p.channels / kElements;                // of a pixel
    const int width = columns.count > 0 ? columns.count : 1;  // no taps, no chunks
    const std::int64_t step_y = p.y.offset_step * p.steps.row;
    const std::int64_t step_x = p.x.offset_step * p.steps.column;
    const std::int64_t taps = std::int64_t(p.y.kernel) * p.x.kernel;
    const int left_slot = kept(Tile::template slot<kM>(piece, first));
    const int right_slot = kept(kM * kPieces + Tile::template slot<kN>(piece, first));

    // Taps change once in many chunks: what depends on them alone is kept. For each of the thread's
    // rows of the source: where it reads, and whether that is inside.
    const ChunkRange range =
        chunk_range((rows.count * columns.count * pieces + kPieces - 1) / kPieces);
    TapWalk at(range.first * kPieces + piece, pieces, width);
    std::int64_t from[kLeft];
    unsigned inside = 0;
    const T* weights = nullptr;
    const auto enter_tap = [&]() {
        const std::int64_t tap = (rows.first + at.row * p.y.tap_step) * p.x.kernel + columns.first +
                                 at.column * p.x.tap_step;
        const std::int64_t row = (group * taps + tap) * pieces + at.channel;
        weights = packed + (row * p.padded_columns + first_column + first) * kElements;
        const std::int64_t offset =
            at.row * step_y + at.column * step_x + std::int64_t(at.channel) * kElements;
        const int y = at.row < rows.count ? at.row * p.y.offset_step : kOutside;
        const int x = at.column * p.x.offset_step;
        inside = 0;
#pragma unroll
        for (int i = 0; i < kLeft; ++i) {
            from[i] = pixels[i].offset + offset;
            if (static_cast<unsigned>(pixels[i].y + y) < static_cast<unsigned>(p.height) &&
                static_cast<unsigned>(pixels[i].x + x) < static_cast<unsigned>(p.width))
                inside |= 1u << i;
        }
    };
    enter_tap();

    const auto bring_left = [&](Piece* stage) {
#pragma unroll
        for (int i = 0; i < kLeft; ++i)
            cp_async<16>(stage + left_slot + i * kStep, source + from[i],
                         inside & 1u << i ? 16 : 0);
    };
    const int chunks = range.count;
    const std::int64_t weight_step = std::int64_t(p.padded_columns) * kElements * kPieces;
    const auto bring = [&](int chunk, int buffer) {
        if (chunk < chunks) {
            Piece* const stage = stages + buffer * Tile::kStagePieces;
            bring_left(stage);
            Tile::template bring_right<false>(stage + right_slot, weights,
                                              at.row < rows.count ? 16 : 0);
            if (at.advance(kPieces, pieces, width)) {
                enter_tap();
            } else {
                weights += weight_step;
#pragma unroll
                for (int i = 0; i < kLeft; ++i) from[i] += kPieces * kElements;
            }
        }
        cp_async_commit();  // perhaps an empty group, so that the newest two are always the same
    };
    constexpr int kAhead = kStages - 1;
#pragma unroll
    for (int chunk = 0; chunk < kAhead; ++chunk) bring(chunk, chunk);
    typename Tile::Slots left, right;
    Tile::left_slots(left);
    Tile::right_slots(right);
    int full = 0, empty = kAhead;  // buffers
    for (int chunk = 0; chunk < chunks; ++chunk) {
        // Everybody's copies of this chunk have come, and nobody reads the chunk before it any
        // more.
        cp_async_wait<kStages - 2>();
        __syncthreads();
        bring(chunk + kAhead, empty);
        const Piece* const stage = stages + full * Tile::kStagePieces;
        Tile::template multiply<Factors>(
            [&](int k, int i, std::uint32_t (&bits)[4]) {
                load_matrices<false>(bits, stage + left[k] + 16 * i);
            },
            stage + kM * kPieces, right, sum);
        empty = full;
        full = full + 1 < kStages ? full + 1 : 0;
    }
    cp_async_wait<0>();
    __syncthreads();
}

// The finished sums of a block: bias, gate, rounding, and 16 bytes a thread where they fit.
// `targets` has room for kM; `pixel_of(row)` is the pixel of a row of the tile.
template <typename Tile, bool kTransposed, typename T, typename PixelOf>
__device__ __forceinline__ void store_results(const TapPlan& p, const TapBlock<kTransposed>& block,
                                              const typename Tile::Accumulator& sum,
                                              TapPixel* targets, const T* bias, const T* forward,
                                              void* result, PixelOf&& pixel_of) {
    for (int row = threadIdx.x; row < Tile::kM; row += Tile::kThreads)
        targets[row] = block.target(p, pixel_of(row));
    sync_team<Tile::kThreads>();
    const auto to = tap_result<kTransposed>(p, forward, result);
#pragma unroll
    for (int j = 0; j < Tile::kQuads; ++j) {
        const int column = block.first_column + Tile::column(j);
        Sum<T> shift[4];
        load_bias(p, block.group, bias, column, shift);
#pragma unroll
        for (int i = 0; i < Tile::kRows; ++i) {
            Sum<T> quad[4];
#pragma unroll
            for (int e = 0; e < 4; ++e) quad[e] = Tile::result(sum, i, j, e) + shift[e];
            to.store_channels(p, quad, targets[Tile::row(i)].offset, column);
        }
    }
}

template <typename Factors, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kResident)
    tap_mma_kernel(TapPlan p, const typename Factors::T* source, const typename Factors::T* packed,
                   const typename Factors::T* bias, const typename Factors::T* forward,
                   void* result) {
    if constexpr (!kMultiplies<Factors>) return never_launched();
    ZF_DYNAMIC_SHARED(Piece, stages);
    const auto block = tap_block<false, Tile::kN>(p, blockIdx.x);
    typename Tile::Accumulator sum = {};
    mma_product<Factors, Tile>(p, source, block.rows, block.columns, block.group,
                               block.first_column, packed, stages, sum,
                               [&](int row) { return block.pixel(p, row); });
    store_results<Tile>(p, block, sum, reinterpret_cast<TapPixel*>(stages), bias, forward, result,
                        [](int row) { return row; });
}

// body(Factors{}) for a way on the tensor cores.
template <typename Body>
void with_factors(Way way, Dtype dtype, Body&& body) {
    if (way == Way::tf32) return body(Tf32{});
    if (way == Way::tf32x3) return body(Tf32x3{});
    dtype == Dtype::float16 ? body(Halves<__half>{}) : body(Halves<__nv_bfloat16>{});
}

// body(Tile{}) for so many columns of merged rows.
template <typename Factors, typename Body>
void with_patch_tile(int columns, Body&& body) {
    constexpr bool kFma = std::is_same_v<Factors, Fma>;
    using Thirds = std::conditional_t<kFma, PatchTile<96>, ThirdsMmaTile>;
    using Others = std::conditional_t<kFma, PatchTile<64>, MediumMmaTile>;
    columns % Thirds::kN == 0 ? body(Thirds{}) : body(Others{});
}

// body(Tile{}) for the tile that was chosen.
template <typename Factors, bool kTransposed, bool kPatch, typename Body>
void with_tap_tile(const TapCut& cut, Body&& body) {
    if constexpr (kPatch) {
        with_patch_tile<Factors>(cut.columns, body);
    } else {
        if (cut.columns == NarrowMmaTile::kN) return body(NarrowMmaTile{});
        if constexpr (kTransposed)
            if (cut.columns == ThirdsMmaTile::kN) return body(ThirdsMmaTile{});
        if constexpr (!std::is_same_v<Factors, Tf32x3>)
            if (cut.columns == WideMmaTile::kN) return body(WideMmaTile{});
        body(MediumMmaTile{});
    }
}

// Launches a product in tiles and splits as they are chosen: run(tile, p, grid, bias, forward,
// result) launches its kernel.
template <typename Factors, bool kTransposed, bool kPatch, typename Run>
void with_tap_cut(const TapPlan& plan, Address partial, Address bias, Address forward,
                  Address result, const Exec& exec, Run&& run) {
    using T = typename Factors::T;
    const TapCut cut = tap_cut(plan, sizeof(T), false, bool(partial), processors(exec));
    with_tap_tile<Factors, kTransposed, kPatch>(cut, [&](auto tile) {
        using Tile = decltype(tile);
        const auto product = [&](TapPlan p, Address bias, Address forward, Address result) {
            const int rows = p.block_pixels > 0 ? p.block_pixels : Tile::kM;
            const dim3 grid = tap_grid(p, rows, Tile::kN, cut.splits);
            if (grid.x == 0) return;
            p.quads = p.columns % 4 == 0 && aligned(result);
            run(tile, p, grid, bias, forward, result);
        };
        with_splits<T, kTransposed>(plan, cut.splits, partial, bias, forward, result, exec,
                                    product);
    });
}

template <typename Factors>
void launch_tap_mma(const TapPlan& plan, Address source, Address packed, Address partial,
                    Address bias, Address forward, Address result, const Exec& exec) {
    using T = typename Factors::T;
    const auto run = [&](auto tile, const TapPlan& p, dim3 grid, Address bias, Address forward,
                         Address result) {
        using Tile = decltype(tile);
        launch(tap_mma_kernel<Factors, Tile>, grid, dim3(Tile::kThreads), Tile::kSharedBytes, exec,
               p, source.as<const T>(), packed.as<const T>(), bias.as<const T>(),
               forward.as<const T>(), result.value);
    };
    with_tap_cut<Factors, false, false>(plan, partial, bias, forward, result, exec, run);
}

}  // namespace zfcuda
