// The gradient with respect to the bias: grad_bias[o] = sum over n,y,x of gate(signal)[n,o,y,x], in
// splits that a second pass adds up.
#pragma once

#include "gradient_splits.cuh"

namespace zfcuda {

// partial[split][o]: a block sums one split of one channel over the images of NCHW, or of 32
// channels over the pixels of NHWC, and then its threads as a tree.
template <typename T, bool kChannelsLast>
__global__ void bias_gradient_kernel(ConvShape s, bool rectified, std::int64_t split_units,
                                     int splits, const T* signal, const T* forward,
                                     Sum<T>* partial) {
    using V = Sum<T>;
    constexpr int kChannels = kChannelsLast ? 32 : 1, kRanks = kTileThreads / kChannels;
    ZF_SHARED(V, sums, kTileThreads);
    const int thread = threadIdx.x;
    const std::int64_t split = blockIdx.x % splits;
    const std::int64_t channel = blockIdx.x / splits * kChannels + thread % kChannels;
    const std::int64_t plane = s.out_height * s.out_width;
    const std::int64_t units = kChannelsLast ? s.batch * plane : s.batch;
    const std::int64_t first = split * split_units;
    const std::int64_t last = first + split_units < units ? first + split_units : units;

    V sum = V(0);
    auto add = [&](std::int64_t offset) {
        const V value = load_gated<T, 1>(signal, forward, offset).value[0];
        sum += rectified ? rectify(value) : value;
    };
    if (channel < s.out_channels) {
        if (kChannelsLast) {
            for (std::int64_t pixel = first + thread / kChannels; pixel < last; pixel += kRanks)
                add(pixel * s.out_channels + channel);
        } else {
            for (std::int64_t n = first; n < last; ++n)
                for (std::int64_t pixel = thread; pixel < plane; pixel += kRanks)
                    add((n * s.out_channels + channel) * plane + pixel);
        }
    }
    sums[thread] = sum;
    for (int half = kTileThreads / 2; half >= kChannels; half /= 2) {
        __syncthreads();
        if (thread < half) sums[thread] += sums[thread + half];
    }
    if (thread < kChannels && channel < s.out_channels)
        partial[split * s.out_channels + channel] = sums[thread];
}

inline Splits bias_splits(const ConvShape& s, const Exec& exec) {
    if (s.channels_last)
        return Splits(divide_up(s.out_channels, 32), s.batch * s.out_height * s.out_width, 64,
                      exec);
    return Splits(s.out_channels, s.batch, 1, exec);
}

template <typename T, bool kChannelsLast>
void bias_gradient(const ConvShape& s, bool rectified, Address signal, Address forward,
                   Address grad_bias, Sum<T>* partial, const Exec& exec) {
    const Splits splits = bias_splits(s, exec);
    const std::int64_t tiles = kChannelsLast ? divide_up(s.out_channels, 32) : s.out_channels;
    launch(bias_gradient_kernel<T, kChannelsLast>, gradient_grid(splits.count * tiles),
           dim3(kTileThreads), 0, exec, s, rectified, splits.units, static_cast<int>(splits.count),
           signal.as<const T>(), forward.as<const T>(), partial);
    sum_splits<T>({1, 1, s.out_channels}, partial, splits.count, grad_bias, exec);
}

}  // namespace zfcuda
