// The paper's constraint on filters, after each step of training.
//
//   filter *= max_rms / rms   where   max_rms < rms = sqrt(sum of filter² / size) < infinity
//
//   block i:  filter i  |0 1 2 … 255|0 1 2 …     a thread every 256th number, then a tree of sums
//
// A block a filter: it reads its filter for the sum, and once more, from the cache, if it is too
// large. Squares are added as doubles: no float overflows, and the few additions cost nothing
// beside the launch. Least bytes: the weight, once. Measured: not yet, for want of a GPU; `make
// bench` on one fills this line.
#include <cmath>
#include <limits>

#include "vector.cuh"

namespace zfcuda {
namespace {

constexpr int kFilterThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kFilterThreads)
    renormalize_filters_kernel(std::int64_t size, double max_rms, T* weight) {
    ZF_SHARED(double, sums, kFilterThreads);
    T* const filter = weight + std::int64_t(blockIdx.x) * size;
    double sum = 0;
    for (std::int64_t i = threadIdx.x; i < size; i += kFilterThreads)
        sum += double(Sum<T>(filter[i])) * double(Sum<T>(filter[i]));
    sums[threadIdx.x] = sum;
    __syncthreads();
    for (unsigned half = kFilterThreads / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
        __syncthreads();
    }
    const double rms = sqrt(sums[0] / double(size));
    if (!(rms > max_rms && rms < INFINITY)) return;
    const auto scale = static_cast<Sum<T>>(max_rms / rms);
    for (std::int64_t i = threadIdx.x; i < size; i += kFilterThreads)
        filter[i] = static_cast<T>(Sum<T>(filter[i]) * scale);
}

}  // namespace

void renormalize_filters(std::int64_t filters, std::int64_t size, Dtype dtype, double max_rms,
                         Address weight, const Exec& exec) {
    if (filters * size == 0) return;
    if (filters > std::numeric_limits<int>::max())
        throw std::runtime_error("zfcuda: renormalize_filters of over 2^31 filters");
    with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        launch(renormalize_filters_kernel<T>, dim3(static_cast<unsigned>(filters)),
               dim3(kFilterThreads), 0, exec, size, max_rms, weight.as<T>());
    });
}

}  // namespace zfcuda
