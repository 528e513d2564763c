// Convolution of images of few channels, by patches: the kernel of both main loops.
#pragma once

#include "patch_fma.cuh"
#include "patch_mma.cuh"

namespace zfcuda {

// `base_of(pixel)` is patch_base, `row_of(row)` patch_row; every thread may use the shared memory
// again afterwards.
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
__global__ void __launch_bounds__(Tile::kThreads, Tile::kResident)
    patch_kernel(TapPlan p, PatchPlan h, const typename Factors::T* image,
                 const typename Factors::T* packed, const typename Factors::T* bias,
                 const typename Factors::T* forward, void* result) {
    if constexpr (!kMultiplies<Factors>) return never_launched();
    ZF_DYNAMIC_SHARED(Piece, memory);
    const auto block = tap_block<false, Tile::kN>(p);
    typename Tile::Accumulator sum = {};
    patch_product<Factors, Tile>(
        p, h, image, block.first_column, packed, PatchShared<Tile>(memory, h), sum,
        [&](int pixel) { return patch_base(block, p, h, pixel); },
        [&](int row) { return patch_row(block, p, h, row); });
    store_results<Tile>(p, block, sum, reinterpret_cast<TapPixel*>(memory), bias, forward, result,
                        [&](int row) { return patch_pixel(h, row); });
}

template <typename Factors>
void launch_patch(const LoopPlan<false>& plan, Address image, Address packed, Address partial,
                  Address bias, Address forward, Address result, const Exec& exec) {
    using T = typename Factors::T;
    const auto run = [&](auto tile, const TapPlan& p, dim3 grid, Address bias, Address forward,
                         Address result) {
        using Tile = decltype(tile);
        launch(patch_kernel<Factors, Tile>, grid, dim3(Tile::kThreads),
               PatchShared<Tile>::bytes(plan.patch), exec, p, plan.patch, image.as<const T>(),
               packed.as<const T>(), bias.as<const T>(), forward.as<const T>(), result.value);
    };
    with_tap_cut<Factors, false, true>(plan.tap, partial, bias, forward, result, exec, run);
}

}  // namespace zfcuda
