// The second pass of a gradient in splits: it adds them up.
#pragma once

#include "gradient_plan.cuh"
#include "tile.cuh"

namespace zfcuda {

// Partial sums of one split: [row][tap][channel]. The result has them as [row][channel][tap], and
// only the first `kept` channels of each tap.
struct PartialOrder {
    std::int64_t rows, taps, channels, kept;

    ZF_HD std::int64_t count() const { return rows * taps * channels; }
};

// The second pass: a result is the sum of its partial sums in the order of the splits, rounded.
template <typename T>
__global__ void __launch_bounds__(kTileThreads)
    sum_splits_kernel(PartialOrder order, const Sum<T>* partial, int splits, T* result) {
    const std::int64_t i = std::int64_t(blockIdx.x) * kTileThreads + threadIdx.x;
    if (i >= order.count()) return;
    const std::int64_t line = i / order.channels, channel = i - line * order.channels;
    if (channel >= order.kept) return;
    Sum<T> sum = partial[i];
#pragma unroll 8
    for (int split = 1; split < splits; ++split) sum += partial[split * order.count() + i];
    const std::int64_t row = line / order.taps, tap = line - row * order.taps;
    result[(row * order.kept + channel) * order.taps + tap] = static_cast<T>(sum);
}

template <typename T>
void sum_splits(const PartialOrder& order, const Sum<T>* partial, std::int64_t splits,
                Address result, const Exec& exec) {
    launch(sum_splits_kernel<T>, gradient_grid(divide_up(order.count(), kTileThreads)),
           dim3(kTileThreads), 0, exec, order, partial, static_cast<int>(splits), result.as<T>());
}

}  // namespace zfcuda
