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

    const PoolBlock block = pool_block<kN>(p, pool);
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

// The other main loops, for the pixels of a box.
template <typename Factors, typename Tile>
struct ByTaps {
    using T = typename Factors::T;
    const T* image;

    int bytes() const { return Tile::kSharedBytes; }
    __device__ int pixel(int row) const { return row; }
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
    __device__ int pixel(int row) const { return row; }
    __device__ void product(const TapPlan& p, const PoolPlan& pool, const PoolBlock& block,
                            const T* packed, Piece* memory, typename Tile::Accumulator& sum) const {
        halo_product<Factors, Tile, false>(
            p, h, TensorSource<T>{image}, block.rows, block.columns, block.group,
            block.first_column, packed, HaloShared<Tile>(memory), sum,
            [&](int row) { return block.halo_slot(pool, h, row); },
            [&](int slot) { return block.halo_pixel(p, pool, h, slot); });
    }
};

template <typename Factors, typename Tile>
struct ByPatch {
    using T = typename Factors::T;
    const T* image;
    PatchPlan h;

    int bytes() const { return static_cast<int>(PatchShared<Tile>::bytes(h)); }
    __device__ int pixel(int row) const { return patch_pixel(h, row); }
    __device__ void product(const TapPlan& p, const PoolPlan& pool, const PoolBlock& block,
                            const T* packed, Piece* memory, typename Tile::Accumulator& sum) const {
        patch_product<Factors, Tile>(
            p, h, image, block.first_column, packed, PatchShared<Tile>(memory, h), sum,
            [&](int number) { return block.patch_base(p, pool, h, number); },
            [&](int row) { return block.patch_row(p, row); });
    }
};

// The same with one of these, in NHWC: tap_mma.cuh, halo_mma.cuh or patch_product.cuh; by the last
// all 96 maps of ZFNet's first layer in one block. The maps, at most 48 KiB, take the place of what
// was multiplied. Eight lanes write four packs of two rows at once: where a row fills the banks,
// the two, one pixel apart or two (patch_pixel), differ in the half of the banks that they write;
// and so do the windows, two pixels apart, that a warp reads.
template <typename Factors, typename Tile, typename Loop>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kResident)
    conv2d_relu_max_pool2d_loop_kernel(TapPlan p, PoolPlan pool, Loop loop,
                                       const typename Factors::T* packed,
                                       const typename Factors::T* bias,
                                       PoolResults<typename Factors::T> results) {
    using T = typename Factors::T;
    constexpr int kN = Tile::kN;
    if constexpr (!kMultiplies<Factors>) return never_launched();
    ZF_DYNAMIC_SHARED(Piece, memory);
    const PoolBlock block = pool_block<kN>(p, pool);
    typename Tile::Accumulator sum = {};
    loop.product(p, pool, block, packed, memory, sum);

    auto* const maps = reinterpret_cast<float*>(memory);
    const auto at = [](int pixel, int c) {
        return pixel * kN + (c ^ ((pixel ^ pixel >> 1) << 4 & 16 & (kN - 1)));
    };
#pragma unroll
    for (int j = 0; j < Tile::kQuads; ++j) {
        float shift[4];
        load_bias(p, block.group, bias, block.first_column + Tile::column(j), shift);
#pragma unroll
        for (int i = 0; i < Tile::kRows; ++i) {
            Vector<float, 4> pack;
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const float value = Tile::result(sum, i, j, e) + shift[e];
                pack.value[e] = static_cast<float>(static_cast<T>(value));
            }
            store_vector(maps + at(loop.pixel(Tile::row(i)), Tile::column(j)), pack);
        }
    }
    __syncthreads();
    block.look_through<T, kN, Tile::kThreads, true, true>(p, pool, 0, maps, at, results);
}

}  // namespace zfcuda
