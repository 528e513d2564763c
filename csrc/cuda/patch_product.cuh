// Convolution of images of few channels, by patches: the kernel of both main loops.
//
// Weights stay in shared memory. A block is two or three teams of four warps, which share them,
// have a patch each, and go on from tile to tile by themselves: while one of them pools or waits
// for its patch, the others multiply. Blocks are as many as the GPU holds at once, one a
// multiprocessor.
//
//   shared memory   [ weights, once for all tiles | table | team 0's | team 1's | … ]
//
//   team 0          patch of tile 0 | product | what follows it | patch of tile 264 | product | …
//   team 1            patch of tile 1 | product | what follows it | patch of tile 265 | …
//
// What follows the product (a tile's maps and their windows, or the places of its results) takes
// the place of the patch. A team waits by a barrier of its own (sync_team), and never in its main
// loop. The weights are read from L2 once for a multiprocessor: conv1 of a batch of 128, with its
// pool, is 15488 tiles, and 60 KiB for each of them would be 950 MB, where 132 are 8 MB.
//
// Bytes of ZFNet's conv1:  weights and table       a team                  two     three teams
//   tf32, its pool behind it    61 KiB             48 KiB of maps         157       205 KiB
//   halves, likewise            31 KiB             28 KiB of maps          87       115 KiB
//   ieee, likewise              55 KiB             48 KiB of maps         151        -
//   tf32, by itself             61 KiB              9 KiB of patch         80        89 KiB
//
// An H100 (227 KiB) holds three teams of each, two where registers allow no more (kMostTeams); an
// A100 (163) two, of halves three; GPUs with 99 KiB two of halves, and three of a layer without a
// pool. Where two do not fit, or there are no tiles for them, a block is one team with one tile, of
// which a multiprocessor holds several, and weights come in stages: in float32 with a pool on GPUs
// of 99 KiB, whose products take three times as long as to read the weights again. team_grid
// decides.
//
// Registers: 65536 are 168 for each thread of three teams, and a tile's sums 96 of them. A loop
// over tiles costs more of them than it seems to: the compiler computes what is the same for all
// tiles, as the addresses of a thread's results, once before the loop, and keeps it. (It spilled up
// to 72 bytes.) Here nothing of that is known to be the same: rows come with zero_of(tile), what
// follows the product finds its tile again by kept(tile), and its threads their numbers by kept(),
// too.
//
// Tried: teams without a barrier of their own, which pool and multiply at the same time: then
// nobody multiplies while they pool (on paper). Weights streamed to blocks of one tile each, three
// on an A100 (the version before): a barrier and a wait in each chunk, 184 instructions instead of
// 168, and shared memory busy for 160 of 192 cycles of the product instead of 112. Whether an
// A100's two teams in float32 are faster than those three blocks, with half as many warps again, a
// GPU must tell.
#pragma once

#include <algorithm>

#include "patch_fma.cuh"
#include "patch_mma.cuh"

namespace zfcuda {

// Teams of a block, at most: what registers allow.
template <typename Factors>
constexpr int kMostTeams = std::is_same_v<Factors, Fma> || std::is_same_v<Factors, Tf32x3> ? 2 : 3;

struct TeamGrid {
    dim3 grid, block;
    std::size_t shared;
};

// How a launch shares its tiles, which are `grid`, and its shared memory, where what leaves the
// product takes `after` bytes of a team's.
template <typename Factors, typename Tile>
TeamGrid team_grid(const TapPlan& p, PatchPlan& h, dim3 grid, int after, const Exec& exec) {
    const auto up = [](int a, int b) { return (a + b - 1) / b; };
    const int tiles = static_cast<int>(grid.x), count = processors(exec);
    const int patch = static_cast<int>(h.bytes) - h.table_bytes(), columns = p.column_tiles;
    // Words of the packed weights, to the end of the last chunk.
    const int words = p.way == Way::fma ? p.y.kernel * p.run : h.words;
    const int kept = words * Tile::kN * 4;
    h.own = up(std::max(patch, after), 16) * 16;
    h.tiles = grid.x;
    const int fit = (shared_bytes(exec) - kept - h.table_bytes()) / h.own;
    const int teams = std::min(kMostTeams<Factors>, std::min(fit, up(tiles, count)));
    if (teams < 2 || grid.y > 1) {
        const std::int64_t bytes = PatchShared<Tile>::kStages + h.bytes;
        return {grid, dim3(Tile::kThreads), std::size_t(std::max<std::int64_t>(bytes, after))};
    }
    h.kept = kept;
    const int blocks = std::min(up(tiles / columns, teams), std::max(1, count / columns));
    return {dim3(columns * blocks), dim3(Tile::kThreads, teams),
            std::size_t(kept + h.table_bytes() + teams * h.own)};
}

// Before any tile: what they have in common.
template <typename Factors, typename Tile>
__device__ __forceinline__ void begin_patches(const TapPlan& p, const PatchPlan& h,
                                              const typename Factors::T* packed, Piece* memory) {
    const PatchShared<Tile> shared(memory, h, 0);
    const int first_column = static_cast<int>(blockIdx.x % p.column_tiles) * Tile::kN;
    if constexpr (std::is_same_v<Factors, Fma>)
        begin_patches_by_fma<Tile>(p, h, packed, first_column, shared);
    else
        begin_patches_by_mma<Factors, Tile>(p, h, packed, first_column, shared);
    if (h.kept == 0) return;
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
}

// Zero, of which the compiler does not know that it is the same for all tiles: what is computed
// with it takes no register from tile to tile.
__device__ __forceinline__ int zero_of(unsigned tile) { return static_cast<int>(tile >> 31); }

// body(tile, shared, pixel_of) for the tiles of this team, which are of the column tile of its
// block; `pixel_of` is the pixel of a row of the tile.
template <typename Factors, typename Tile, typename Body>
__device__ __forceinline__ void for_tiles(const TapPlan& p, const PatchPlan& h,
                                          const typename Factors::T* packed, Piece* memory,
                                          Body&& body) {
    begin_patches<Factors, Tile>(p, h, packed, memory);
    const unsigned columns = p.column_tiles, step = gridDim.x * blockDim.y;
    const unsigned row = blockIdx.x / columns * blockDim.y + threadIdx.y;
    for (unsigned tile = row * columns + blockIdx.x % columns; tile < h.tiles; tile += step) {
        const PatchShared<Tile> shared(memory, h, threadIdx.y + zero_of(tile));
        body(tile, shared, [&](int row) { return patch_pixel(h, row + zero_of(tile)); });
        // Nobody reads any more what the next patch takes the place of.
        sync_team<Tile::kThreads>();
    }
}

// `base_of(row)` is patch_base of the pixel of a row of the tile, `row_of(row)` is patch_row of the
// patch's; every thread of the team may use its shared memory again afterwards.
template <typename Factors, typename Tile, typename BaseOf, typename RowOf>
__device__ __forceinline__ void patch_product(const TapPlan& p, const PatchPlan& h,
                                              const typename Factors::T* image, int first_column,
                                              const typename Factors::T* packed,
                                              const PatchShared<Tile>& shared,
                                              typename Tile::Accumulator& sum, BaseOf&& base_of,
                                              RowOf&& row_of) {
    if constexpr (std::is_same_v<Factors, Fma>)
        patch_product_by_fma<Tile>(p, h, image, first_column, packed, shared, sum, base_of, row_of);
    else
        patch_product_by_mma<Factors, Tile>(p, h, image, first_column, packed, shared, sum, base_of,
                                            row_of);
}

template <typename Factors, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads* kMostTeams<Factors>, 1)
    patch_kernel(TapPlan p, PatchPlan h, const typename Factors::T* image,
                 const typename Factors::T* packed, const typename Factors::T* bias,
                 const typename Factors::T* forward, void* result) {
    if constexpr (!kMultiplies<Factors>) return never_launched();
    ZF_DYNAMIC_SHARED(Piece, memory);
    for_tiles<Factors, Tile>(
        p, h, packed, memory, [&](unsigned tile, const auto& shared, auto&& pixel_of) {
            typename Tile::Accumulator sum = {};
            const auto from = tap_block<false, Tile::kN>(p, tile);
            patch_product<Factors, Tile>(
                p, h, image, from.first_column, packed, shared, sum,
                [&](int row) { return patch_base(from, p, h, pixel_of(row)); },
                [&](int row) { return patch_row(from, p, h, row); });
            const auto to = tap_block<false, Tile::kN>(p, kept(tile));
            store_results<Tile>(p, to, sum, reinterpret_cast<TapPixel*>(shared.after), bias,
                                forward, result, pixel_of);
        });
}

template <typename Factors>
void launch_patch(const LoopPlan<false>& plan, Address image, Address packed, Address partial,
                  Address bias, Address forward, Address result, const Exec& exec) {
    using T = typename Factors::T;
    const auto run = [&](auto tile, const TapPlan& p, dim3 tiles, Address bias, Address forward,
                         Address result) {
        using Tile = decltype(tile);
        PatchPlan h = plan.patch;
        const int targets = Tile::kM * int(sizeof(TapPixel));
        const auto [grid, block, bytes] = team_grid<Factors, Tile>(p, h, tiles, targets, exec);
        launch(patch_kernel<Factors, Tile>, grid, block, bytes, exec, p, h, image.as<const T>(),
               packed.as<const T>(), bias.as<const T>(), forward.as<const T>(), result.value);
    };
    with_tap_cut<Factors, false, true>(plan.tap, partial, bias, forward, result, exec, run);
}

}  // namespace zfcuda
