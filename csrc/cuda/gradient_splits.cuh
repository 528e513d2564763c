// The second pass of a gradient in splits: it adds them up.
#pragma once

#include "folded_image.cuh"

namespace zfcuda {

// Partial sums of one split: [row][tap][channel], which the result has as [row][channel][tap]. Of a
// folded image (folded_image.cuh) a channel is one of `kept` of a tap that the fold has beside the
// others, and some are none: filled up, or beyond the kernel.
struct PartialOrder {
    std::int64_t rows, taps, channels, kept;
    int kernel_h, kernel_w, taps_w, fold_y, fold_x;

    PartialOrder(std::int64_t all_rows, std::int64_t all_taps, std::int64_t all_channels)
        : rows(all_rows),
          taps(all_taps),
          channels(all_channels),
          kept(all_channels),
          kernel_h(1),
          kernel_w(static_cast<int>(all_taps)),
          taps_w(kernel_w),
          fold_y(1),
          fold_x(1) {}
    PartialOrder(const ConvShape& s, const FoldedImage& image)
        : PartialOrder(s.out_channels, image.shape.taps(), image.shape.in_per_group()) {
        kept = s.in_per_group();
        kernel_h = static_cast<int>(s.kernel_h), kernel_w = static_cast<int>(s.kernel_w);
        taps_w = static_cast<int>(image.shape.kernel_w);
        fold_y = static_cast<int>(image.y.fold), fold_x = static_cast<int>(image.x.fold);
    }
    ZF_HD std::int64_t count() const { return rows * taps * channels; }

    // Where partial sum i goes; -1 for one that is none.
    ZF_HD std::int64_t place(std::int64_t i) const {
        const std::int64_t line = i / channels, row = line / taps;
        const int tap = static_cast<int>(line - row * taps), tap_y = tap / taps_w;
        const std::int64_t channel = i - line * channels, beside = channel / kept;
        const int down = static_cast<int>(beside) / fold_x;
        const int y = tap_y * fold_y + down;
        const int x = (tap - tap_y * taps_w - down) * fold_x + static_cast<int>(beside);
        if (down >= fold_y || y >= kernel_h || x >= kernel_w) return -1;
        return ((row * kept + channel - beside * kept) * kernel_h + y) * kernel_w + x;
    }
};

// The second pass: a result is the sum of its partial sums in the order of the splits, rounded.
template <typename T>
__global__ void __launch_bounds__(kTileThreads)
    sum_splits_kernel(PartialOrder order, const Sum<T>* partial, int splits, T* result) {
    const std::int64_t i = std::int64_t(blockIdx.x) * kTileThreads + threadIdx.x;
    if (i >= order.count()) return;
    const std::int64_t place = order.place(i);
    if (place < 0) return;
    Sum<T> sum = partial[i];
#pragma unroll 8
    for (int split = 1; split < splits; ++split) sum += partial[split * order.count() + i];
    result[place] = static_cast<T>(sum);
}

template <typename T>
void sum_splits(const PartialOrder& order, const Sum<T>* partial, std::int64_t splits,
                Address result, const Exec& exec) {
    launch(sum_splits_kernel<T>, gradient_grid(divide_up(order.count(), kTileThreads)),
           dim3(kTileThreads), 0, exec, order, partial, static_cast<int>(splits), result.as<T>());
}

}  // namespace zfcuda
