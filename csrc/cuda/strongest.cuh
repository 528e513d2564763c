// The largest value of a map and its first position, and how those of many threads become one: what
// map_maximum.cu and conv2d_relu_max_pool2d.cu share.
#pragma once

#include <cmath>

#include "places.cuh"

namespace zfcuda {

template <typename V>
struct Strongest {
    V value = V(-INFINITY);
    int position = 0;

    // NaN is never taken: it is not > anything. The order of the offers does not matter.
    __device__ void offer(V other, int at) {
        if (other > value || (other == value && at < position)) {
            value = other;
            position = at;
        }
    }
    __device__ void offer(const Strongest& other) { offer(other.value, other.position); }
};

// What the kThreads threads of a block have found of `maps` neighbouring maps of image n, the
// thread's own of map c: they meet in shared memory, halving.
template <typename T>
__device__ void meet(const Strongest<Sum<T>>& found, Strongest<Sum<T>>* met, int maps,
                     std::int64_t channels, std::int64_t n, std::int64_t c, T* values,
                     std::int64_t* positions) {
    const int thread = threadIdx.x;
    met[thread] = found;
    for (int half = kThreads / 2; half >= maps; half /= 2) {
        __syncthreads();
        if (thread < half) met[thread].offer(met[thread + half]);
    }
    if (thread < maps && c < channels) {
        values[n * channels + c] = static_cast<T>(met[thread].value);
        positions[n * channels + c] = met[thread].position;
    }
}

// Blocks for `maps` maps each.
inline dim3 maps_grid(std::int64_t batch, std::int64_t channels, int maps) {
    const std::int64_t blocks = batch * ((channels + maps - 1) / maps);
    if (blocks > std::numeric_limits<int>::max())
        throw std::runtime_error("zfcuda: the maxima of over 2^31 maps");
    return dim3(static_cast<unsigned>(blocks));
}

}  // namespace zfcuda
