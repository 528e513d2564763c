// The product of tap_gemm.cuh on the tensor cores, for NHWC sources with whole pieces of channels.
//
//   result[pixel][column] = sum over k = (tap, channel) of source[pixel + tap][channel] * packed
//
//                            packed weights, kN columns
//            chunk     +---+---+---+- - -
//            of four   | 0 | 1 | 2 | …      three buffers in shared memory; a buffer's copies are
//            pieces    +---+---+---+- - -   in flight while the two before it are multiplied
//            +---+---+---+
//   source,  | 0 | 1 | 2 | …     block: 128 x 128 results, four warps of 64 x 64
//   kM pixels|   |   |   |              128 x 64, four warps of 64 x 32
//            +---+---+---+              128 x 16, four warps of 32 x 16
//
// A piece is 16 bytes, four floats: of a source a piece lies in one tap, since channels are whole
// pieces, so it is inside the image or zero as a whole, and cp.async brings it or zeros. Weights
// are packed in pieces too. What happens while a piece is loaded cannot be done by cp.async:
// sources of the transposed product, which are gated or gathered from an unpooled signal, go
// through registers, one chunk ahead. There is one barrier a chunk.
//
// Work: as tap_gemm.cuh; a block of 128 x 128 reads (128 + 128) k floats for 128 * 128 * k
// products, 32 FLOP a byte from L2 (tf32 on an A100 needs about 31 of its L2, 79 of its DRAM:
// columns of blocks share the source there). 64 products of a warp and 16 ldmatrix a chunk. Three
// stages of 16 KiB let two blocks live on an SM of any architecture from sm_80 on (100 KiB on
// sm_86, 89 and 120): four would leave one. The epilogue writes 16 bytes a thread from registers,
// since weights are packed in the order of mma_slot. Tried on paper: weights in the order of
// fragments (one 16-byte load instead of ldmatrix; but a pair of pieces may then not cross from one
// tap into the next, as it does in phases of a stride); pieces of weights split for tf32x3 when
// packed (no conversions, twice the bytes: the copies and ldmatrix cost more than the ALU, which
// the tensor cores leave idle).
//
// Measured: not yet, for want of a GPU; `make bench` on one fills this line.
#pragma once

#include "mma_tile.cuh"
#include "tap_block.cuh"

namespace zfcuda {

// The main loop. `pixel_of(row)` says what a row of the tile reads; `stages` are
// Tile::kSharedBytes, which every thread may use again afterwards.
template <typename Factors, typename Tile, bool kTransposed, typename Source, typename PixelOf>
__device__ __forceinline__ void mma_product(const TapPlan& p, const Source& source,
                                            const PhaseTaps& rows, const PhaseTaps& columns,
                                            int group, int first_column,
                                            const typename Factors::T* packed, Piece* stages,
                                            typename Tile::Accumulator& sum, PixelOf&& pixel_of) {
    using T = typename Factors::T;
    constexpr int kM = Tile::kM, kN = Tile::kN, kStages = Tile::kStages, kPieces = Tile::kPieces;
    constexpr int kElements = Pack<T>::size;         // of a piece
    constexpr int kStep = Tile::kThreads / kPieces;  // rows that the block brings at once
    constexpr int kLeft = kM / kStep, kRight = (kN + kStep - 1) / kStep;
    static_assert(kStep % 8 == 0 && kM % kStep == 0,
                  "the places of a thread's rows differ by kStep");

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
    const Odometer step(kPieces, pieces, width);
    Odometer left_at(piece, pieces, width), right_at = left_at;
    const std::int64_t step_y = p.y.offset_step * p.steps.row;
    const std::int64_t step_x = p.x.offset_step * p.steps.column;
    const int left_slot = Tile::template slot<kM>(piece, first);
    const int right_slot = kM * kPieces + Tile::template slot<kN>(piece, first);

    // body(i, where the thread's row i reads, row and column there, whether that is inside).
    const auto for_each_left = [&](auto&& body) {
        const std::int64_t tap =
            left_at.high * step_y + left_at.middle * step_x + std::int64_t(left_at.low) * kElements;
        const int y = left_at.high < rows.count ? left_at.high * p.y.offset_step : kOutside;
        const int x = left_at.middle * p.x.offset_step;
#pragma unroll
        for (int i = 0; i < kLeft; ++i) {
            const int from_y = pixels[i].y + y, from_x = pixels[i].x + x;
            body(i, pixels[i].source + tap, from_y, from_x,
                 static_cast<unsigned>(from_y) < static_cast<unsigned>(p.height) &&
                     static_cast<unsigned>(from_x) < static_cast<unsigned>(p.width));
        }
        left_at.advance(step, pieces, width);
    };
    const auto copy_right = [&](Piece* stage) {
        const std::int64_t tap = (rows.first + right_at.high * p.y.tap_step) * p.x.kernel +
                                 columns.first + right_at.middle * p.x.tap_step;
        const std::int64_t taps = std::int64_t(p.y.kernel) * p.x.kernel;
        const std::int64_t row = (group * taps + tap) * pieces + right_at.low;
        const T* const from = packed + (row * p.padded_columns + first_column + first) * kElements;
#pragma unroll
        for (int j = 0; j < kRight; ++j) {
            const int column = first + j * kStep;
            const bool inside =
                right_at.high < rows.count && first_column + column < p.padded_columns;
            if (kN % kStep == 0 || column < kN)
                cp_async<16>(stage + right_slot + j * kStep, from + j * kStep * kElements,
                             inside ? 16 : 0);
        }
        right_at.advance(step, pieces, width);
    };
    Vector<T, kElements> staged[kLeft];
    const auto load_left = [&]() {
        for_each_left([&](int i, std::int64_t offset, int y, int x, bool inside) {
            staged[i] = {};
            if (inside) staged[i] = convert<T>(source.template load<kElements>(offset, y, x));
        });
    };
    const auto store_left = [&](Piece* stage) {
        auto* const to = reinterpret_cast<Vector<T, kElements>*>(stage) + left_slot;
#pragma unroll
        for (int i = 0; i < kLeft; ++i) {
#pragma unroll
            for (int e = 0; e < kElements; ++e)
                if (p.rectify) staged[i].value[e] = rectify(staged[i].value[e]);
            to[i * kStep] = staged[i];
        }
    };

    const int chunks = (rows.count * columns.count * pieces + kPieces - 1) / kPieces;
    int filled = 0;  // the buffer that is filled next, in a ring
    const auto copy = [&](int chunk) {
        if (chunk < chunks) {
            Piece* const stage = stages + filled * Tile::kStagePieces;
            if constexpr (!kTransposed)
                for_each_left([&](int i, std::int64_t offset, int, int, bool inside) {
                    cp_async<16>(stage + left_slot + i * kStep, source.values + offset,
                                 inside ? 16 : 0);
                });
            copy_right(stage);
        }
        cp_async_commit();  // perhaps an empty group, so that the newest two are always the same
        filled = filled + 1 < kStages ? filled + 1 : 0;
    };
#pragma unroll
    for (int chunk = 0; chunk < kStages - 1; ++chunk) copy(chunk);
    if (kTransposed && chunks > 0) {
        load_left();
        store_left(stages);
    }
    int buffer = 0;
    for (int chunk = 0; chunk < chunks; ++chunk) {
        // Everybody's copies of this chunk have come, and nobody reads the chunk before it any
        // more.
        cp_async_wait<kStages - 2>();
        __syncthreads();
        copy(chunk + kStages - 1);
        const bool more = chunk + 1 < chunks;
        if (kTransposed && more) load_left();
        const Piece* const stage = stages + buffer * Tile::kStagePieces;
        Tile::template multiply<Factors>(stage, stage + kM * kPieces, sum);
        buffer = buffer + 1 < kStages ? buffer + 1 : 0;
        if (kTransposed && more) store_left(stages + buffer * Tile::kStagePieces);
    }
    cp_async_wait<0>();
    __syncthreads();
}

template <typename Factors, typename Tile, bool kTransposed, typename Source>
__global__ void __launch_bounds__(Tile::kThreads)
    tap_mma_kernel(TapPlan p, Source source, const typename Factors::T* packed,
                   const typename Factors::T* bias, const typename Factors::T* forward,
                   typename Factors::T* result) {
    using T = typename Factors::T;
    constexpr int kM = Tile::kM, kN = Tile::kN;
    ZF_DYNAMIC_SHARED(Piece, stages);
    const auto block = tap_block<kTransposed, kM, kN>(p);
    if (block.first_pixel >= block.pixel_count) return;  // later phases have fewer pixels

    typename Tile::Accumulator sum = {};
    mma_product<Factors, Tile, kTransposed>(p, source, block.rows, block.columns, block.group,
                                            block.first_column, packed, stages, sum,
                                            [&](int row) { return block.pixel(p, row); });

    auto* const targets = reinterpret_cast<std::int64_t*>(stages);
    for (int row = threadIdx.x; row < kM; row += Tile::kThreads)
        targets[row] = block.target(p, row);
    __syncthreads();
    const TapResult<T, kTransposed> to = {result, forward, p.rectify};
#pragma unroll
    for (int j = 0; j < Tile::kQuads; ++j) {
        const int column = block.first_column + Tile::column(j);
        Sum<T> shift[4];
        load_bias(p, block.group, bias, column, shift);
#pragma unroll
        for (int i = 0; i < Tile::kRows; ++i) {
            Sum<T> quad[4];
            Tile::quad(sum, i, j, quad);
#pragma unroll
            for (int e = 0; e < 4; ++e) quad[e] += shift[e];
            to.store_channels(p, quad, targets[Tile::row(i)], column);
        }
    }
}

// body(Factors{}) for a way on the tensor cores.
template <typename Body>
void with_factors(Way way, Body&& body) {
    way == Way::tf32 ? body(Tf32{}) : body(Tf32x3{});
}

// body(Tile{}) for the tile of a product: large ones, where no column of theirs is padding alone
// and there are enough of them for every SM of a large GPU; never with split factors, whose
// registers would spill.
template <typename Factors, typename Body>
void with_mma_tile(TapPlan p, Body&& body) {
    constexpr unsigned kEnoughBlocks = 132;
    if (p.padded_columns == 16) return body(MmaTile<128, 16, 32, 16>{});
    if constexpr (!std::is_same_v<Factors, Tf32x3>)
        if (p.padded_columns % 128 == 0 && tap_grid(p, 128, 128).x >= kEnoughBlocks)
            return body(MmaTile<128, 128, 64, 64>{});
    body(MmaTile<128, 64, 64, 32>{});
}

template <typename Factors, bool kTransposed, typename Source>
void launch_tap_mma(TapPlan p, const Source& source, Address packed, Address bias, Address forward,
                    Address result, const Exec& exec) {
    using T = typename Factors::T;
    p.quads = p.columns % 4 == 0 && aligned(result);
    with_mma_tile<Factors>(p, [&](auto tile) {
        using Tile = decltype(tile);
        const dim3 grid = tap_grid(p, Tile::kM, Tile::kN);
        if (grid.x == 0) return;
        launch(tap_mma_kernel<Factors, Tile, kTransposed, Source>, grid, dim3(Tile::kThreads),
               Tile::kSharedBytes, exec, p, source, packed.as<const T>(), bias.as<const T>(),
               forward.as<const T>(), result.as<T>());
    });
}

}  // namespace zfcuda
