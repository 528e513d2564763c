// k in splits: where a product has fewer tiles than a GPU has multiprocessors, each tile is given
// to several blocks, which multiply a part of k each, and a second kernel adds them up.
//
//   partial[split][i] = sum over the chunks of k of this split              the product's kernel
//   result[i]         = gate(bias + partial[0][i] + partial[1][i] + …)      add_splits_kernel
//
//   k in chunks   0 1 2 3 | 4 5 6 7 | 8 9      blockIdx.y is the split, gridDim.y their number;
//                 split 0 | split 1 | 2        each takes as many chunks, rounded up
//
// Partial sums are what sums are (Sum: float32, or float64) and lie as the result does, so that the
// second kernel is one pass over its elements and knows neither tiles nor phases nor layouts, but
// for the channel whose bias it adds. They stand in the workspace behind the packed weights:
// splits * results * sizeof(Sum) bytes, written once and read once, by a GPU that has just put them
// in its L2. A phase of fewer chunks than splits leaves zeros there.
// The order of a sum depends on nothing but the numbers of chunks and of splits, and these on the
// shape, the dtype and the GPU alone (tap_choice.cuh): the same bits in every run.
//
// A thread adds one result: there are few (less than a wave of tiles), so that threads and not wide
// loads are what hides the latency.
// Rejected: atomics (their order), and a last block of a tile that adds up the others' sums (no
// second launch, but a counter that must be zero before, and a fence).
//
// Measured: not yet, for want of a GPU; `make bench` on one fills this line.
#pragma once

#include "tap_block.cuh"

namespace zfcuda {

// The chunks of k that this block multiplies, of as many as there are: all, or those of its split.
struct ChunkRange {
    int first, count;
};

__device__ __forceinline__ ChunkRange chunk_range(int chunks) {
    const int splits = static_cast<int>(gridDim.y), split = static_cast<int>(blockIdx.y);
    const int each = (chunks + splits - 1) / splits, rest = chunks - split * each;
    return {split * each, rest < each ? (rest > 0 ? rest : 0) : each};
}

// Where this block's sums go: into the result, or (p.split_size, `result` then being the partial
// sums) as they are, behind those of the splits before; the launcher has left out bias and gate.
template <bool kTransposed, typename T>
__device__ __forceinline__ TapResult<T, kTransposed> tap_result(const TapPlan& p, const T* forward,
                                                                void* result) {
    auto* const sums = static_cast<Sum<T>*>(result) + blockIdx.y * p.split_size;
    if constexpr (std::is_same_v<T, Sum<T>>)
        return {sums, forward, p.rectify};
    else
        return {static_cast<T*>(result), forward, p.rectify, p.split_size != 0 ? sums : nullptr};
}

constexpr int kAddThreads = 256;

template <typename T, bool kTransposed>
__global__ void __launch_bounds__(kAddThreads)
    add_splits_kernel(TapPlan p, const Sum<T>* partial, int splits, const T* bias, const T* forward,
                      T* result) {
    const int count = static_cast<int>(p.split_size);
    const int i = static_cast<int>(blockIdx.x) * kAddThreads + static_cast<int>(threadIdx.x);
    if (i >= count) return;
    Sum<T> sum = partial[i];
#pragma unroll 4
    for (int split = 1; split < splits; ++split) sum += partial[std::int64_t(split) * count + i];
    const int plane = static_cast<int>(p.result.step_channel());
    const int channel = i / plane % static_cast<int>(p.result.channels);
    sum += bias != nullptr ? Sum<T>(bias[channel]) : Sum<T>(0);
    TapResult<T, kTransposed>{result, forward, p.rectify}.store(sum, i);
}

// product(p, bias, forward, result) launches a product; with splits into `partial`, and then these
// are added.
template <typename T, bool kTransposed, typename Product>
void with_splits(const TapPlan& p, int splits, Address partial, Address bias, Address forward,
                 Address result, const Exec& exec, Product&& product) {
    if (splits == 1) return product(p, bias, forward, result);
    TapPlan sum = p;
    sum.split_size = p.batch * p.result.step_image();
    TapPlan part = sum;
    if (!kTransposed) part.rectify = false;
    product(part, Address{}, Address{}, partial);
    const std::int64_t blocks = (sum.split_size + kAddThreads - 1) / kAddThreads;
    launch(add_splits_kernel<T, kTransposed>, tap_grid(blocks), dim3(kAddThreads), 0, exec, sum,
           partial.as<const Sum<T>>(), splits, bias.as<const T>(), forward.as<const T>(),
           result.as<T>());
}

}  // namespace zfcuda
