// Max-pooling that records switches.
//
//   output[n,c,oy,ox] = max over the window;  switches = i * kernel_w + j of the first maximum in
//   row-major order, or of the last NaN, as in torch.
//
// One thread an output in storage order: neighbours in a warp read neighbours in memory in both
// layouts (channels in channels_last; windows stride_w apart otherwise).
#include "port.cuh"

namespace zfcuda {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void max_pool2d_kernel(PoolShape s, const T* input, T* output, std::uint8_t* switches) {
    const std::int64_t index = std::int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (index >= s.outputs()) return;
    // TEMPLATE: the kernels' helper replaces this body.
    (void)input; (void)output; (void)switches;
}

}  // namespace

void max_pool2d(const PoolShape& s, Dtype dtype, Address input, Address output, Address switches,
                const Exec& exec) {
    const auto blocks = static_cast<unsigned>((s.outputs() + kThreads - 1) / kThreads);
    if (dtype == Dtype::float32)
        launch(max_pool2d_kernel<float>, dim3(blocks), dim3(kThreads), 0, exec, s,
               input.as<const float>(), output.as<float>(), switches.as<std::uint8_t>());
    else
        launch(max_pool2d_kernel<double>, dim3(blocks), dim3(kThreads), 0, exec, s,
               input.as<const double>(), output.as<double>(), switches.as<std::uint8_t>());
}

}  // namespace zfcuda
