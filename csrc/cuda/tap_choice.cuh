// How a product of taps is cut into blocks: by which tile, and k into how many splits
// (tap_split.cuh). One table and one estimate, for the launchers and for the sizes of workspaces.
//
// Of its blocks, a multiprocessor gets n = blocks / processors, rounded up. A chunk (64 bytes of k)
// of them takes it
//
//   cycles(n) = max(n * work, n / resident, rounded up, * latency)
//
// `work` is what a block costs where others hide its latencies, `latency` how long it takes when it
// has the multiprocessor to itself. Splits shorten the loop over the chunks, cost a second kernel,
// and write and read their partial sums:
//
//   time = chunks / splits, rounded up, * cycles(n)
//        + (splits > 1: kPass + splits * bytes of the results' sums * 2 / (kBytes * processors))
//
// The cheapest tile and number of splits are taken. Splits must keep all blocks in one wave
// (n <= resident), which bounds their partial sums, too; and they must halve the time of their
// tile, for the figures below are a model, and a sum in splits has other bits than one in a block
// that goes on with it (conv2d_relu_max_pool2d.cu).
//
// Where halos serve (halo_mma.cuh), splits are of channels, each with all its taps.
//
// Example: ZFNet's conv3 (13 x 13 x 256 to 384 maps, 3 x 3) in tf32 on an H100, 132 processors.
// k is 16 chunks of 16 channels, of 9 taps each: 144 turns of the loop.
//   Batch 1, 169 rows. Tiles of 128 x 64: 2 * 6 = 12 blocks, n = 1: 144 * 500 = 72 000 cycles
//   with 120 processors idle. 8 splits of two chunks: 18 * 500 + 5000 for the pass + 2000 for 2.1
//   MB of partial sums = 16 000. Tiles of 128 x 128: 6 blocks, 108 000; 16 splits are 96 blocks,
//   still n = 1: 9 * 750 + 5000 + 3900 = 15 700. So 128 x 128, 16 splits.
//   Batch 128, 21632 rows. 128 x 128: 507 blocks, n = 4: 144 * 4 * 600 = 346 000. 128 x 64: 1014
//   blocks, n = 8: 144 * 8 * 400 = 461 000. So 128 x 128, and more than a wave: no splits.
//
// The table is a model for sm_80 to sm_90: multiply-adds over the lanes (FMA: times the share of
// docs/kernels.md; tensor cores: 512 tf32 a cycle, or the bytes of a chunk at 24 to 48 a cycle from
// L2), and the waits of a chunk, a barrier and the shared loads behind it, in `latency`. Phases of
// fewer taps than the first count like it. What sources do when they gather is not in it.
//
// Measured: not yet, for want of a GPU; `make bench` on one fills this line.
#pragma once

#include <algorithm>

#include "mma_tile.cuh"
#include "patch_fma.cuh"
#include "tap_weights.cuh"
#include "tile.cuh"

namespace zfcuda {

// The main loops that have blocks of their own: tap_mma.cuh, halo_mma.cuh, patch_product.cuh.
enum class MainLoop { taps, halo, patch };

// Which of them runs a product, and on which blocks. `bytes` are those of an element.
template <bool kTransposed>
struct LoopPlan {
    TapPlan tap;
    MainLoop loop = MainLoop::taps;
    HaloPlan halo = {};
    PatchPlan patch = {};

    LoopPlan(const TapPlan& plan, int bytes) : tap(plan) {
        const int pieces = tap.channels * bytes / 16;
        if (tap.run != 0) {
            loop = MainLoop::patch;
            patch = patch_plan(tap, bytes);
        } else if (kTransposed || halo_pays(tap, pieces)) {
            loop = MainLoop::halo;
            halo = halo_plan<kTransposed>(tap, pieces);
            tap.by_channels = true;
        }
    }
};

struct TileCost {
    int rows, columns, resident, work, latency;  // cycles a chunk
};

template <typename Tile>
constexpr TileCost tile_cost(int resident, int work, int latency) {
    return {Tile::kM, Tile::kN, resident, work, latency};
}

using SquareTile = Tile<float, 128, 128, 8, 128>;
using PlainTile = Tile<float, 128, 64>;
using NarrowTile = Tile<float, 256, 16>;
using DoubleTile = Tile<double, 64, 64>;

//                                                  (resident, work, latency)
constexpr TileCost kSquareTile = tile_cost<SquareTile>(2, 2300, 2800);
constexpr TileCost kPlainTile = tile_cost<PlainTile>(2, 1700, 2100);
constexpr TileCost kMergedTile = tile_cost<PatchTile<96>>(2, 1800, 2200);
constexpr TileCost kMergedPlainTile = tile_cost<PatchTile<64>>(2, 1300, 1700);
constexpr TileCost kNarrowTile = tile_cost<NarrowTile>(2, 1500, 1900);
constexpr TileCost kDoubleTile = tile_cost<DoubleTile>(1, 1400, 1400);
constexpr TileCost kWideMmaTile = tile_cost<WideMmaTile>(2, 600, 750);
constexpr TileCost kMediumMmaTile = tile_cost<MediumMmaTile>(2, 400, 500);
constexpr TileCost kThirdsMmaTile = tile_cost<ThirdsMmaTile>(2, 500, 600);
constexpr TileCost kNarrowMmaTile = tile_cost<NarrowMmaTile>(2, 250, 350);

constexpr int kTf32x3 = 2;   // times the cycles of the same tile in tf32
constexpr int kPass = 5000;  // cycles of a second kernel: its launch, its first and last blocks
constexpr int kBytes = 16;   // of partial sums, a cycle and multiprocessor
constexpr int kMostSplits = 32;

// A tile, by its columns, and splits of k; `cycles` is the estimate.
struct TapCut {
    int columns, splits;
    std::int64_t cycles;
};

// The cycles of `tiles` tiles' loops over k, of elements of `bytes` bytes.
inline std::int64_t loop_cycles(const TapPlan& p, const TileCost& tile, int bytes,
                                std::int64_t tiles, int splits, int processors) {
    const auto up = [](std::int64_t a, std::int64_t b) { return (a + b - 1) / b; };
    const std::int64_t taps = up(p.y.kernel, p.y.tap_step) * up(p.x.kernel, p.x.tap_step);
    const std::int64_t turns = p.by_channels ? taps : 1;  // of the loop that no split divides
    const std::int64_t chunks = up(taps / turns * p.channels * bytes, 64);
    const std::int64_t n = up(tiles * splits, processors);
    const std::int64_t chunk = std::max(n * tile.work, up(n, tile.resident) * tile.latency);
    return up(chunks, splits) * turns * chunk * (p.way == Way::tf32x3 ? kTf32x3 : 1);
}

// The best cut with tiles of this size; `bytes` are those of an element of k, `sum` of a sum.
inline TapCut tile_cut(TapPlan p, const TileCost& tile, int bytes, int sum, bool may_split,
                       int processors) {
    const int rows = p.block_pixels > 0 ? p.block_pixels : tile.rows;
    const std::int64_t tiles = tap_grid(p, rows, tile.columns).x;
    const std::int64_t partial = p.batch * p.result.step_image() * sum * 2 / (kBytes * processors);
    const auto cycles = [&](int splits) {
        const std::int64_t loop = loop_cycles(p, tile, bytes, tiles, splits, processors);
        return splits == 1 ? loop : loop + kPass + splits * partial;
    };
    const std::int64_t whole = cycles(1), wave = std::int64_t(tile.resident) * processors;
    TapCut best = {tile.columns, 1, whole};
    if (!may_split || whole < 2 * kPass) return best;
    for (int splits = 2; splits <= kMostSplits && tiles * splits <= wave; ++splits) {
        const std::int64_t time = cycles(splits);
        if (time < best.cycles && 2 * time <= whole) best = {tile.columns, splits, time};
    }
    return best;
}

// The tile that a product has where it has not the wide one of its way; that of a fused pool.
inline TileCost small_tile(const TapPlan& p, int bytes) {
    if (p.way == Way::fma) {
        if (p.run != 0) return p.thirds ? kMergedTile : kMergedPlainTile;
        return bytes == 8 ? kDoubleTile : p.padded_columns == 16 ? kNarrowTile : kPlainTile;
    }
    if (p.thirds) return kThirdsMmaTile;
    return p.padded_columns == 16 ? kNarrowMmaTile : kMediumMmaTile;
}

// Bytes of an element of k: by FMA halves are widened.
inline int factor_bytes(const TapPlan& p, int bytes) {
    return p.way == Way::fma && bytes < 4 ? 4 : bytes;
}

// The best cut of a product of elements of `bytes` bytes; `square`: whether it may have the tile of
// that name.
inline TapCut tap_cut(const TapPlan& p, int bytes, bool square, bool may_split, int processors) {
    const auto with = [&](const TileCost& tile) {
        return tile_cut(p, tile, factor_bytes(p, bytes), bytes < 4 ? 4 : bytes, may_split,
                        processors);
    };
    const auto cheaper = [&](const TileCost& large, const TileCost& small) {
        const TapCut one = with(large), other = with(small);
        return one.cycles <= other.cycles ? one : other;
    };
    const TileCost small = small_tile(p, bytes);
    const bool even = p.padded_columns % 128 == 0;  // no columns that are padding alone
    if (p.way == Way::fma) return square && even ? cheaper(kSquareTile, small) : with(small);
    // Split factors would spill in the larger one.
    return even && p.run == 0 && p.way != Way::tf32x3 ? cheaper(kWideMmaTile, small) : with(small);
}

// What the choice looks at.
template <bool kTransposed>
TapPlan choice_plan(const ConvShape& s, Dtype dtype, Way way) {
    const TapPlan p = tap_plan<kTransposed>(s, dtype, way, Gate::none);
    if (way == Way::fma && p.run == 0) return p;
    return LoopPlan<kTransposed>(p, static_cast<int>(element_bytes(dtype))).tap;
}

// Cycles of a product by itself.
template <bool kTransposed>
std::int64_t product_cycles(const ConvShape& s, Dtype dtype, Way way, const Exec& exec) {
    const bool square = !kTransposed && dtype == Dtype::float32 && four_channels(s.image(), dtype);
    return tap_cut(choice_plan<kTransposed>(s, dtype, way), static_cast<int>(element_bytes(dtype)),
                   square, true, processors(exec))
        .cycles;
}

inline ConvShape in_nhwc(ConvShape s) {
    s.channels_last = 1;
    return s;
}

inline PoolShape in_nhwc(PoolShape pool, std::int64_t batch) {
    pool.channels_last = 1, pool.batch = batch;
    return pool;
}

// The images that go at a time through what keeps something of each in its workspace: so many that
// the last of some waves of blocks hardly counts.
inline std::int64_t images_at_a_time(const ConvShape& s, const Exec& exec) {
    constexpr std::int64_t kWaves = 8, kResults = 2 * 128 * 128;  // of a multiprocessor at once
    const std::int64_t wanted = kWaves * kResults * processors(exec);
    const std::int64_t image = std::max(s.image().step_image(), s.maps().step_image());
    const std::int64_t most = std::max<std::int64_t>(1, wanted / image);
    const std::int64_t turns = std::max<std::int64_t>(1, (s.batch + most - 1) / most);
    return (s.batch + turns - 1) / turns;
}

// body(part, first) for parts of a batch of so many images, in turn.
template <typename Body>
void for_parts(ConvShape s, const Exec& exec, Body&& body) {
    const std::int64_t batch = s.batch, images = images_at_a_time(s, exec);
    for (std::int64_t first = 0; first < batch; first += images) {
        s.batch = std::min(images, batch - first);
        body(s, first);
    }
}

// The workspace that serves all of them: bytes_of(part) for the first, and for the rest.
template <typename BytesOf>
std::int64_t workspace_of_parts(ConvShape s, const Exec& exec, BytesOf&& bytes_of) {
    const std::int64_t batch = s.batch;
    s.batch = images_at_a_time(s, exec);
    const std::int64_t bytes = bytes_of(s);
    if (s.batch == 0 || batch % s.batch == 0) return bytes;
    s.batch = batch % s.batch;
    return std::max(bytes, bytes_of(s));
}

// Where the partial sums stand in a workspace: behind the packed weights.
template <bool kTransposed>
Address partial_sums(const ConvShape& s, Dtype dtype, Address workspace) {
    return {workspace.as<char>() + packed_weights<kTransposed>(s, dtype)};
}

// Bytes of a workspace for both, whichever way the product will run: the addresses decide that.
template <bool kTransposed>
std::int64_t tap_workspace(const ConvShape& s, Dtype dtype, const Exec& exec) {
    std::int64_t splits = 0;  // of which partial sums are kept
    const auto cut = [&](Way way, bool square) {
        const TapCut cut =
            tap_cut(choice_plan<kTransposed>(s, dtype, way), static_cast<int>(element_bytes(dtype)),
                    square, true, processors(exec));
        if (cut.splits > 1) splits = std::max<std::int64_t>(splits, cut.splits);
    };
    cut(Way::fma, false);
    if (!kTransposed && dtype == Dtype::float32) cut(Way::fma, true);
    const Way way = tap_way<kTransposed>(s, dtype, exec);
    if (way != Way::fma) cut(way, false);
    const std::int64_t results = s.batch * (kTransposed ? s.image() : s.maps()).step_image();
    const std::int64_t packs = (splits * results * sum_bytes(dtype) + 15) / 16;
    return packed_weights<kTransposed>(s, dtype) + packs * 16;
}

}  // namespace zfcuda
