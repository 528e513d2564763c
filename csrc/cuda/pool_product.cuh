// The kernels of conv2d_relu_max_pool2d.cu: the product of a block's pixels, and the windows of
// what comes out of it.
//
//   a block: pooled tile     the box of the maps that       x kN channels, in shared memory
//            +-----+         its windows read: at most kM   after the product: the tiles of the
//            |     |  <----  +---------+ pixels, the rows   operands are free by then
//            +-----+         +---------+ of the product
//
// The product is that of any loop of tap_gemm.cuh, with the pixels of the box as its rows, so that
// the sums are those of conv2d_relu.cu where that does not split them (tap_split.cuh); then the
// maps go to shared memory where the operands lay (of tap_product.cuh as many channels at a time as
// fit where the left one did), and each thread looks through windows of them.
// Boxes overlap by what windows share: for 3 x 3 of stride 2 the 25 windows of a block read 11 x 11
// pixels, of which they own 10 x 10: 1.21 times the work of the convolution alone, for maps that
// are never in memory.
#pragma once

#include "pool_block.cuh"
#include "tap_gemm.cuh"

namespace zfcuda {

template <typename T, typename Tile, bool kChannelsLast, int kVector>
__global__ void __launch_bounds__(kTileThreads, kResidentBlocks<Sum<T>>)
    conv2d_relu_max_pool2d_kernel(TapPlan p, PoolPlan pool, TensorSource<T> source,
                                  const Sum<T>* packed, const T* bias, PoolResults<T> results) {
    using V = Sum<T>;
    constexpr int kM = Tile::kM, kN = Tile::kN, kDepth = Tile::kDepth, kPack = Pack<V>::size;
    ZF_SHARED(Pack<V>, left_tiles, 2 * Tile::kLeftSize / kPack);
    ZF_SHARED(Pack<V>, right_tiles, 2 * Tile::kRightSize / kPack);
    ZF_SHARED(TapPixel, pixels, kM);
    const int thread = threadIdx.x;

    const PoolBlock block = pool_block<kN>(p, pool, blockIdx.x);
    if (thread < kM) pixels[thread] = block.pixel(p, pool, thread);
    __syncthreads();
    typename Tile::Accumulator sum = {};
    const TapTiles<V, Tile> tiles = {reinterpret_cast<V*>(left_tiles),
                                     reinterpret_cast<V*>(right_tiles), pixels};
    tap_product<V, Tile, false, kChannelsLast, kVector>(
        p, source, block.rows, block.columns, block.group, block.first_column, packed, tiles, sum);

    // Windows compare what the maps would hold, so that rounding makes the same ties.
    V shift[4];
    load_bias(p, block.group, bias, block.first_column + Tile::column(), shift);
#pragma unroll
    for (int i = 0; i < Tile::kRows; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
            sum[i][j] = static_cast<V>(static_cast<T>(sum[i][j] + shift[j]));

    // kPart channels at a time: channel c of pixel r of the box lies at r * kPart + c in NHWC, at
    // c * kM + r in NCHW, so that lanes write packs and then read neighbours.
    constexpr int kPart = 2 * kDepth < kN ? 2 * kDepth : kN;
    V* const maps = tiles.left;
    for (int part = 0; part < kN && block.first_column + part < p.columns; part += kPart) {
        const int column = Tile::column() - part;
        if (column >= 0 && column < kPart) {
#pragma unroll
            for (int i = 0; i < Tile::kRows; i += kPack)
#pragma unroll
                for (int j = 0; j < 4; j += kPack)
#pragma unroll
                    for (int e = 0; e < kPack; ++e) {
                        Pack<V> pack;
#pragma unroll
                        for (int f = 0; f < kPack; ++f)
                            pack.value[f] = kChannelsLast ? sum[i + e][j + f] : sum[i + f][j + e];
                        const int at = kChannelsLast ? Tile::row(i + e) * kPart + column + j
                                                     : (column + j + e) * kM + Tile::row(i);
                        store_vector(maps + at, pack);
                    }
        }
        __syncthreads();
        block.look_through<T, kPart, kTileThreads, kChannelsLast, false>(
            p, pool, part, maps,
            [](int pixel, int c) { return kChannelsLast ? pixel * kPart + c : c * kM + pixel; },
            results);
        __syncthreads();
    }
}

// The other main loops of whole tiles, for the pixels of a box.
template <typename Factors, typename Tile>
struct ByTaps {
    using T = typename Factors::T;
    const T* image;

    int bytes() const { return Tile::kSharedBytes; }
    __device__ void product(const TapPlan& p, const PoolPlan& pool, const PoolBlock& block,
                            const T* packed, Piece* memory, typename Tile::Accumulator& sum) const {
        mma_product<Factors, Tile>(p, image, block.rows, block.columns, block.group,
                                   block.first_column, packed, memory, sum,
                                   [&](int row) { return block.pixel(p, pool, row); });
    }
};

template <typename Factors, typename Tile>
struct ByHalo {
    using T = typename Factors::T;
    const T* image;
    HaloPlan h;

    int bytes() const { return HaloShared<Tile>::kBytes; }
    __device__ void product(const TapPlan& p, const PoolPlan& pool, const PoolBlock& block,
                            const T* packed, Piece* memory, typename Tile::Accumulator& sum) const {
        halo_product<Factors, Tile, false>(
            p, h, TensorSource<T>{image}, block.rows, block.columns, block.group,
            block.first_column, packed, HaloShared<Tile>(memory), sum,
            [&](int row) { return block.halo_slot(pool, h, row); },
            [&](int slot) { return block.halo_pixel(p, pool, h, slot); });
    }
};

// The maps of a tile in shared memory, as memory would hold them: at most 48 KiB of floats, 28 of
// halves. Eight lanes (of halves sixteen) write packs of four channels to two rows (four), pixels
// that are neighbours or two apart (patch_pixel): these go to other banks than each other, and so
// do windows, two pixels apart, that a warp reads.
template <typename T, typename Tile>
struct TileMaps {
    static constexpr int kN = Tile::kN, kPitch = sizeof(T) == 2 && kN == 96 ? 112 : kN;
    static constexpr int kBytes = Tile::kM * kPitch * int(sizeof(T));

    __device__ static int at(int pixel, int c) {
        const int place =
            kPitch != kN ? pixel >> 2 & 1 : (pixel ^ pixel >> 1) & (sizeof(T) == 2 ? 3 : 1);
        return pixel * kPitch + (c ^ (place << 4 & (kN - 1)));
    }
};

// The windows of a product in NHWC, whose maps take the place of what was multiplied; `pixel_of` is
// the pixel of a row of the tile.
template <typename Tile, typename T, typename PixelOf>
__device__ __forceinline__ void pool_sums(const TapPlan& p, const PoolPlan& pool,
                                          const PoolBlock& block,
                                          const typename Tile::Accumulator& sum, Piece* memory,
                                          const T* bias, const PoolResults<T>& results,
                                          PixelOf&& pixel_of) {
    using Maps = TileMaps<T, Tile>;
    auto* const maps = reinterpret_cast<T*>(memory);
#pragma unroll
    for (int j = 0; j < Tile::kQuads; ++j) {
        float shift[4];
        load_bias(p, block.group, bias, block.first_column + Tile::column(j), shift);
#pragma unroll
        for (int i = 0; i < Tile::kRows; ++i) {
            Vector<T, 4> pack;
#pragma unroll
            for (int e = 0; e < 4; ++e)
                pack.value[e] = static_cast<T>(Tile::result(sum, i, j, e) + shift[e]);
            store_vector(maps + Maps::at(pixel_of(Tile::row(i)), Tile::column(j)), pack);
        }
    }
    sync_team<Tile::kThreads>();
    block.look_through<T, Tile::kN, Tile::kThreads, true, true>(p, pool, 0, maps, Maps::at,
                                                                results);
}

// The same with one of these, tap_mma.cuh or halo_mma.cuh.
template <typename Factors, typename Tile, typename Loop>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kResident)
    conv2d_relu_max_pool2d_loop_kernel(TapPlan p, PoolPlan pool, Loop loop,
                                       const typename Factors::T* packed,
                                       const typename Factors::T* bias,
                                       PoolResults<typename Factors::T> results) {
    if constexpr (!kMultiplies<Factors>) return never_launched();
    ZF_DYNAMIC_SHARED(Piece, memory);
    const PoolBlock block = pool_block<Tile::kN>(p, pool, blockIdx.x);
    typename Tile::Accumulator sum = {};
    loop.product(p, pool, block, packed, memory, sum);
    pool_sums<Tile>(p, pool, block, sum, memory, bias, results, [](int row) { return row; });
}

// The same by patches (patch_product.cuh): all 96 maps of ZFNet's first layer in one block.
template <typename Factors, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads* kMostTeams<Factors>, 1)
    conv2d_relu_max_pool2d_patch_kernel(TapPlan p, PoolPlan pool, PatchPlan h,
                                        const typename Factors::T* image,
                                        const typename Factors::T* packed,
                                        const typename Factors::T* bias,
                                        PoolResults<typename Factors::T> results) {
    if constexpr (!kMultiplies<Factors>) return never_launched();
    ZF_DYNAMIC_SHARED(Piece, memory);
    for_tiles<Factors, Tile>(
        p, h, packed, memory, [&](unsigned tile, const auto& shared, auto&& pixel_of) {
            typename Tile::Accumulator sum = {};
            const PoolBlock from = pool_block<Tile::kN>(p, pool, tile);
            patch_product<Factors, Tile>(
                p, h, image, from.first_column, packed, shared, sum,
                [&](int row) { return from.patch_base(p, pool, h, pixel_of(row)); },
                [&](int row) { return from.patch_row(p, row); });
            const PoolBlock to = pool_block<Tile::kN>(p, pool, kept(tile));
            pool_sums<Tile>(p, pool, to, sum, shared.after, bias, results, pixel_of);
        });
}

}  // namespace zfcuda
