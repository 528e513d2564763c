// The convolutions' product on the tensor cores, from halos: halo.cuh says what these are.
//
//   result[pixel][column] = sum over k = (plane, chunk of channels, tap) of
//                           halo of (plane, chunk)[slot(pixel) + shift(tap)] * packed
//
//            +-------------------+---+---+---+- -
//            |  halo of a chunk: |   |   |   |    weights of one tap: three buffers, copies fill
//            |  4 pieces         |   |   |   |    two of them while the third is multiplied
//            +-------------------+---+---+---+- -
//            |  halo of the next |    comes while the taps of this chunk are multiplied: a part
//            +-------------------+    with each tap but the last
//
// tap_mma.cuh reads the source anew for each tap: 9 times for 3 x 3, from L2. Here it comes once a
// chunk and the taps are shifts of the addresses that ldmatrix gets; only the weights stream. That
// is what a source is worth that is gathered from an unpooled signal, or gated: it goes through
// registers, two items a thread and step ahead of their use, and no longer for each tap.
//
// Bytes from L2 of a step of a 128 x 128 tile: 8 KiB of weights, and of the source (386 slots at
// most, 64 bytes each, over 9 taps) less than 3 KiB, instead of 8: 48 FLOP a byte in float32, 96 in
// halves, against 32 and 64. Model: with 5.5 TB/s from an H100's L2 that is the difference between
// 176 and 264 TF/s in tf32, of the 310 or so that mma.sync reaches there.
// Shared memory: 78 KiB (128 x 128), two blocks on an SM of 164 KiB or more, one of 100 KiB.
//
// The way down has a tile of 128 x 96 besides those of tap_mma.cuh: ZFNet's second layer leads down
// to 96 maps, of whose tile of 128 a quarter was multiplied in vain. Model, tf32, batch 128: 1061
// us before and 823 with it on an A100, 736 and 497 on an H100.
//
// Measured: not yet, for want of a GPU; `make bench` on one fills this line.
#pragma once

#include "stacked_result.cuh"
#include "tap_mma.cuh"

namespace zfcuda {

// Dynamic shared memory: two halos, the stages of the weights, and what each slot reads.
template <typename Tile>
struct HaloShared {
    static constexpr int kHalo = kHaloSlots * Tile::kPieces, kStage = Tile::kN * Tile::kPieces;
    static constexpr int kBytes = (2 * kHalo + Tile::kStages * kStage) * int(sizeof(Piece)) +
                                  kHaloSlots * int(sizeof(TapPixel));
    Piece *halos, *stages;
    TapPixel* pixels;

    __device__ explicit HaloShared(Piece* shared)
        : halos(shared),
          stages(shared + 2 * kHalo),
          pixels(reinterpret_cast<TapPixel*>(stages + Tile::kStages * kStage)) {}
};

// A chunk of channels of a plane, and the taps that meet it.
template <bool kTransposed>
struct HaloChunk {
    int plane_y = 0, plane_x = 0, chunk;
    HaloTaps rows, columns;

    // The transposed convolution has one plane, with the taps of the block's phase.
    __device__ HaloChunk(const HaloPlan& h, const ChunkRange& range, const PhaseTaps& phase_rows,
                         const PhaseTaps& phase_columns)
        : chunk(range.first), rows(phase_rows, h.y.step), columns(phase_columns, h.x.step) {
        if constexpr (!kTransposed) {
            enter(h);
            if (taps() == 0) next_plane(h);
        }
    }
    __device__ int taps() const { return rows.count * columns.count; }

    // Past the last chunk there is none: whoever counts the steps does not use it.
    __device__ void advance(const HaloPlan& h, const ChunkRange& range) {
        if (++chunk < range.first + range.count) return;
        chunk = range.first;
        if constexpr (!kTransposed) next_plane(h);
    }

  private:
    __device__ void next_plane(const HaloPlan& h) {
        do {
            if (++plane_x == h.x.planes) {
                plane_x = 0;
                if (++plane_y == h.y.planes) return;
            }
            enter(h);
        } while (taps() == 0);
    }
    __device__ void enter(const HaloPlan& h) {
        rows = h.y.taps[plane_y];
        columns = h.x.taps[plane_x];
    }
};

// The main loop, over all chunks of channels or those of the block's split. `slot_of(row)` is the
// slot of a row of the tile, `pixel_of(slot)` what a slot reads; every thread may use the shared
// memory again afterwards.
template <typename Factors, typename Tile, bool kTransposed, typename Source, typename SlotOf,
          typename PixelOf>
__device__ __forceinline__ void halo_product(const TapPlan& p, const HaloPlan& h,
                                             const Source& source, const PhaseTaps& rows,
                                             const PhaseTaps& columns, int group, int first_column,
                                             const typename Factors::T* packed,
                                             const HaloShared<Tile>& shared,
                                             typename Tile::Accumulator& sum, SlotOf&& slot_of,
                                             PixelOf&& pixel_of) {
    using T = typename Factors::T;
    using Shared = HaloShared<Tile>;
    constexpr int kN = Tile::kN, kStages = Tile::kStages, kPieces = Tile::kPieces;
    constexpr int kElements = Pack<T>::size;  // of a piece
    constexpr int kStep = Tile::kStep;

    // A thread brings one piece of each chunk: of slots and of columns that are kStep apart.
    const int piece = threadIdx.x % kPieces, first = threadIdx.x / kPieces;
    for (int slot = threadIdx.x; slot < h.slots; slot += Tile::kThreads)
        shared.pixels[slot] = pixel_of(slot);
    int left[Tile::kWarpM / 16];
#pragma unroll
    for (int i = 0; i < Tile::kWarpM / 16; ++i)
        left[i] = slot_of(Tile::left_row() + 16 * i) + Tile::left_piece() * kHaloSlots;
    typename Tile::Slots right;
    Tile::right_slots(right);
    __syncthreads();

    const int pieces = p.channels / kElements;  // of a pixel
    const int taps_of_group = p.y.kernel * p.x.kernel;
    const T* const weights =
        packed +
        (std::int64_t(group) * taps_of_group * pieces * p.padded_columns + first_column + first) *
            kElements;
    const ChunkRange range = chunk_range(h.chunks);
    HaloChunk<kTransposed> ahead(h, range, rows, columns);  // of the weights that come next
    int ahead_row = 0, ahead_column = 0;
    const int stage_slot = kept(Tile::template slot<kN>(piece, first));
    const int steps = (kTransposed ? ahead.taps() : taps_of_group) * range.count;

    int free_stage = 0;
    const auto bring_weights = [&](int step) {
        if (step < steps) {
            Piece* const to = shared.stages + free_stage * Shared::kStage + stage_slot;
            free_stage = free_stage + 1 < kStages ? free_stage + 1 : 0;
            const int tap = (ahead.rows.first + ahead_row * h.y.tap_step) * p.x.kernel +
                            ahead.columns.first + ahead_column * h.x.tap_step;
            const int number = ahead.chunk * kPieces + piece;
            const T* const from =
                weights + std::int64_t(tap * pieces + number) * p.padded_columns * kElements;
            Tile::template bring_right<false>(to, from, number < pieces ? 16 : 0);
            if (++ahead_column == ahead.columns.count) {
                ahead_column = 0;
                if (++ahead_row == ahead.rows.count) {
                    ahead_row = 0;
                    ahead.advance(h, range);
                }
            }
        }
        cp_async_commit();  // perhaps an empty group, so that the newest two are always the same
    };

    // Item i of a thread is its piece of slot first + i * kStep: what it reads of the halo that
    // comes next.
    HaloChunk<kTransposed> next = ahead;
    int dy, dx;
    std::int64_t from;
    bool whole;  // the piece exists
    const auto enter_next = [&]() {
        const int number = next.chunk * kPieces + piece;
        whole = number < pieces;
        dy = next.rows.least * p.y.pixel_step + next.plane_y;
        dx = next.columns.least * p.x.pixel_step + next.plane_x;
        from = dy * p.steps.row + dx * p.steps.column + std::int64_t(number) * kElements;
    };
    enter_next();
    struct Item {
        bool exists, reads;
        std::int64_t from;
        int y, x;
    };
    const auto find = [&](int i) -> Item {
        if (first + i * kStep >= h.slots) return {};
        const TapPixel pixel = shared.pixels[first + i * kStep];
        const int y = pixel.y + dy, x = pixel.x + dx;
        const bool inside = static_cast<unsigned>(y) < static_cast<unsigned>(p.height) &&
                            static_cast<unsigned>(x) < static_cast<unsigned>(p.width);
        return {pixel.y != kUnread, inside && whole, pixel.offset + from, y, x};
    };
    const auto load = [&](const Item& item) -> Vector<T, kElements> {
        Vector<T, kElements> vector = {};
        if (item.reads)
            vector = convert<T>(source.template load<kElements>(item.from, item.y, item.x));
        return vector;
    };
    const int halo_slot = kept(piece * kHaloSlots + first);
    const auto store = [&](Piece* halo, int i, Vector<T, kElements> vector) {
        if (p.rectify)
#pragma unroll
            for (T& value : vector.value) value = rectify(value);
        reinterpret_cast<Vector<T, kElements>*>(halo)[halo_slot + i * kStep] = vector;
    };
    const auto bring = [&](Piece* halo, int begin, int end) {
#pragma unroll 1
        for (int i = begin; i < end; ++i) {
            const Item item = find(i);
            if (!item.exists) continue;
            if constexpr (kTransposed)
                store(halo, i, load(item));
            else
                cp_async<16>(halo + halo_slot + i * kStep, source.values + item.from,
                             item.reads ? 16 : 0);
        }
    };

    const int items = (h.slots + kStep - 1) / kStep;
    if (steps > 0) bring(shared.halos, 0, items);
    for (int step = 0; step < kStages - 1; ++step) bring_weights(step);

    // The chunk that is multiplied; the next halo comes with its taps.
    HaloTaps own_rows = next.rows, own_columns = next.columns;
    int row = 0, column = 0, brought = 0, buffer = 0, stage = 0;
    int shift = own_rows.back * h.pitch + own_columns.back;
    int later = steps - own_rows.count * own_columns.count;  // steps after this chunk
    bool alone = false;  // this halo came with the only step of the chunk before
    next.advance(h, range);
    enter_next();
    for (int step = 0; step < steps; ++step) {
        // The copies of this step have come, and nobody reads what the next ones replace.
        if (alone)
            cp_async_wait<0>();
        else
            cp_async_wait<kStages - 2>();
        __syncthreads();

        constexpr int kHeld = kTransposed ? 2 : 0;  // on their way while this step is multiplied
        Piece* const empty = shared.halos + (1 - buffer) * Shared::kHalo;
        const int begin = brought, end = later > 0 ? min(begin + h.part, items) : begin;
        const int now = max(end - kHeld, begin);
        bring(empty, begin, now);
        bring_weights(step + kStages - 1);
        brought = end;
        bool exists[kHeld > 0 ? kHeld : 1];
        Vector<T, kElements> held[kHeld > 0 ? kHeld : 1];
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
            const Item item = now + i < end ? find(now + i) : Item{};
            exists[i] = item.exists;
            held[i] = load(item);
        }
        const Piece* const halo = shared.halos + buffer * Shared::kHalo + shift;
        Tile::template multiply<Factors>(
            [&](int k, int i, std::uint32_t (&bits)[4]) {
                load_matrices<false>(bits, halo + left[i] + 2 * k * kHaloSlots);
            },
            shared.stages + stage * Shared::kStage, right, sum);
#pragma unroll
        for (int i = 0; i < kHeld; ++i)
            if (exists[i]) store(empty, now + i, held[i]);

        alone = false;
        stage = stage + 1 < kStages ? stage + 1 : 0;
        shift += h.x.step;
        if (++column < own_columns.count) continue;
        column = 0;
        shift += h.y.step * h.pitch - own_columns.count * h.x.step;
        if (++row < own_rows.count) continue;
        row = 0;
        alone = own_rows.count * own_columns.count == 1;
        own_rows = next.rows, own_columns = next.columns;
        shift = own_rows.back * h.pitch + own_columns.back;
        later -= own_rows.count * own_columns.count;
        brought = 0;
        buffer = 1 - buffer;
        next.advance(h, range);
        enter_next();
    }
    cp_async_wait<0>();
    __syncthreads();
}

template <typename Factors, typename Tile, bool kTransposed, typename Source>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kResident)
    halo_mma_kernel(TapPlan p, HaloPlan h, Source source, const typename Factors::T* packed,
                    const typename Factors::T* bias, const typename Factors::T* forward,
                    void* result) {
    if constexpr (!kMultiplies<Factors>) return never_launched();
    ZF_DYNAMIC_SHARED(Piece, memory);
    const auto block = tap_block<kTransposed, Tile::kN>(p, blockIdx.x);
    if (block.first_pixel >= block.pixel_count) return;  // later phases have fewer pixels
    typename Tile::Accumulator sum = {};
    halo_product<Factors, Tile, kTransposed>(
        p, h, source, block.rows, block.columns, block.group, block.first_column, packed,
        HaloShared<Tile>(memory), sum, [&](int row) { return halo_slot(block, h, row); },
        [&](int slot) { return halo_pixel(block, p, h, slot); });
    auto* const targets = reinterpret_cast<TapPixel*>(memory);
    if constexpr (kStacks<kTransposed, Tile>)
        if (p.stacked()) {
            for (int row = threadIdx.x; row < Tile::kM; row += Tile::kThreads)
                targets[row] = block.target(p, row);
            __syncthreads();
            const auto to = tap_result<kTransposed>(p, forward, result);
#pragma unroll
            for (int j = 0; j < Tile::kQuads; ++j)
                store_phases<Tile::kRows, Tile::kPieces * Pack<typename Factors::T>::size>(
                    p, to, bias, source, packed, block.first_column + Tile::column(j), targets,
                    [](int i) { return Tile::row(i); },
                    [&](int i, int e) { return Tile::result(sum, i, j, e); });
            return;
        }
    store_results<Tile>(p, block, sum, targets, bias, forward, result, [](int row) { return row; });
}

template <typename Factors, bool kTransposed, typename Source>
void launch_halo_mma(const LoopPlan<kTransposed>& plan, const Source& source, Address packed,
                     Address partial, Address bias, Address forward, Address result,
                     const Exec& exec) {
    using T = typename Factors::T;
    const auto run = [&](auto tile, const TapPlan& p, dim3 grid, Address bias, Address forward,
                         Address result) {
        using Tile = decltype(tile);
        launch(halo_mma_kernel<Factors, Tile, kTransposed, Source>, grid, dim3(Tile::kThreads),
               HaloShared<Tile>::kBytes, exec, p, plan.halo, source, packed.as<const T>(),
               bias.as<const T>(), forward.as<const T>(), result.value);
    };
    with_tap_cut<Factors, kTransposed, false>(plan.tap, partial, bias, forward, result, exec, run);
}

}  // namespace zfcuda
