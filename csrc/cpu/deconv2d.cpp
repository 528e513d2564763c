// Gate, then transposed convolution: the way down of a deconvnet, and the data gradient.
//
//   image[n,i,y,x] = bias[i] + sum over o,ky,kx of weight[o,i,ky,kx] * gate(signal)[n,o,oy,ox]
//                    where oy*stride - padding + ky*dilation = y, likewise x.
//
// The positions y = phase, phase + stride, … meet the same taps, so each of the stride_h * stride_w
// phases is a plain convolution of stride 1 that gathers: no products with inserted zeros, no
// scattered additions, one order of the sum.
//
// Measured as in conv2d_relu.cpp, against torch's data gradient, torch / ours, channels_last:
//   conv1 0.65   conv2 0.90   conv3 0.89   (13, 89 and 103 GFLOP/s)
// conv1 has three columns for a vector of 16 lanes: pixels as lanes would serve it better.
#include "convolution.h"

namespace zfcuda {
namespace {

template <typename T>
Pass<T> phase_pass(const ConvShape& s, const T* weight, std::int64_t phase_y,
                   std::int64_t phase_x) {
    const Axis rows = transposed_axis(s.in_height, s.out_height, s.kernel_h, s.stride_h,
                                      s.padding_h, s.dilation_h, phase_y);
    const Axis columns = transposed_axis(s.in_width, s.out_width, s.kernel_w, s.stride_w,
                                         s.padding_w, s.dilation_w, phase_x);
    const std::int64_t filter = s.in_per_group() * s.taps();
    return {{s.maps(), rows, columns, 0, s.out_per_group()},
            s.image(),
            s.batch,
            s.groups,
            s.in_per_group(),
            weight,
            s.out_per_group() * filter,
            s.taps(),
            filter,
            s.kernel_w};
}

// body(pass) for each phase that has positions.
template <typename T, typename Body>
void for_phases(const ConvShape& s, const T* weight, Body&& body) {
    for (std::int64_t y = 0; y < std::min(s.stride_h, s.in_height); ++y)
        for (std::int64_t x = 0; x < std::min(s.stride_w, s.in_width); ++x)
            body(phase_pass(s, weight, y, x));
}

}  // namespace

std::int64_t deconv2d_workspace(const ConvShape& s, Dtype dtype, const Exec& exec) {
    std::int64_t bytes = 0;
    with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        std::int64_t packed = 0;
        for_phases<T>(s, nullptr, [&](const Pass<T>& pass) {
            packed = std::max(packed, pass.packed_weight());
        });
        bytes =
            kLine + sizeof(T) * (packed + pass_scratch<T>(s.in_per_group()) * max_threads(exec));
    });
    return bytes;
}

void deconv2d(const ConvShape& s, Dtype dtype, Gate gate, Address signal, Address forward,
              Address weight, Address bias, Address image, Address workspace, const Exec& exec) {
    with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        const Epilogue<T> epilogue{Gate::none, bias.as<const T>(), nullptr, image.as<T>()};
        T* scratch = aligned<T>(workspace);
        T* packed = scratch + pass_scratch<T>(s.in_per_group()) * max_threads(exec);
        with_source<T>(gate, signal, forward, [&](const auto& source) {
            for_phases(s, weight.as<const T>(), [&](const Pass<T>& pass) {
                run_pass(pass, source, epilogue, packed, scratch, exec);
            });
        });
    });
}

}  // namespace zfcuda
