// Convolution, bias and rectifier in one pass.
//
//   maps[n,o,y,x] = gate(bias[o] + sum over i,ky,kx of weight[o,i,ky,kx] *
//                                   image[n, i, y*stride - padding + ky*dilation, …])
//
// Measured (ZFNet, batch 8, float32, Zen 4, AVX-512, one thread, processor time, medians, calls of
// both in turn, buffers reused), torch 2.13 / ours, channels_last:
//   conv1 1.33   conv2 0.99   conv3 0.92   conv4 0.92   conv5 0.89   (conv2-5 at 104 GFLOP/s, 90 %
//   of the core's 116; conv1 at 80)
//
// Narrow groups and contiguous images of few channels go ways of their own: grouped.h, planes.h.
#include "passes.h"

namespace zfcuda {
std::int64_t conv2d_workspace(const ConvShape& s, Dtype dtype, const Exec& exec) {
    std::int64_t bytes = 0;
    with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        const Pass<T> pass = forward_pass<T>(s, nullptr);
        bytes = kLine + sizeof(Sum<T>) * room(pass, false, exec);
    });
    return bytes;
}

void conv2d(const ConvShape& s, Dtype dtype, Gate gate, Address image, Address weight, Address bias,
            Address forward, Address maps, Address workspace, const Exec& exec) {
    with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        const Pass<T> pass = forward_pass(s, weight.as<const T>());
        const Epilogue<T> epilogue{gate, bias.as<const T>(), forward.as<const T>(), maps.as<T>()};
        const Source<Gate::none, T> source{image.as<const T>(), nullptr};
        run(pass, source, epilogue, aligned<Sum<T>>(workspace), exec);
    });
}

}  // namespace zfcuda
