// Gate, then transposed convolution: the way down of a deconvnet, and the data gradient.
//
//   image[n,i,y,x] = bias[i] + sum over o,ky,kx of weight[o,i,ky,kx] * gate(signal)[n,o,oy,ox]
//                    where oy*stride - padding + ky*dilation = y, likewise x.
//
// The positions y = phase, phase + stride, … meet the same taps, so each of the stride_h * stride_w
// phases is a plain convolution of stride 1 that gathers: no products with inserted zeros, no
// scattered additions, one order of the sum.
//
// Few image channels (conv1's three colours) go another way, in scatter.h.
//
// Measured in one run, one pinned thread of an AVX-512 server, batch 8, medians of 10 interleaved
// calls, torch's conv_transpose2d / ours, both channels_last (then both contiguous):
//   conv1 3.21 (3.72)  conv2 0.89 (0.81)  conv3 0.89 (0.87)  conv4 0.84 (0.85)  conv5 0.91 (0.84)
// Tried and lost: conv1 by phases as well, three columns for a vector of 16 lanes: 0.79 (0.55).
#include "scatter.h"

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
        if (scatters<T>(s)) {
            const std::int64_t packed = scatter_pass<T>(s, nullptr).packed_weight();
            bytes = kLine + sizeof(T) * (packed + scatter_scratch<T>(s) * max_threads(exec));
            return;
        }
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
        T* scratch = aligned<T>(workspace);
        if (scatters<T>(s)) {
            const Pass<T> pass = scatter_pass(s, weight.as<const T>());
            T* packed = scratch + scatter_scratch<T>(s) * max_threads(exec);
            with_source<T>(gate, signal, forward, [&](const auto& source) {
                run_scatter(s, pass, source, bias.as<const T>(), image.as<T>(), packed, scratch,
                            exec);
            });
            return;
        }
        const Epilogue<T> epilogue{Gate::none, bias.as<const T>(), nullptr, image.as<T>()};
        T* packed = scratch + pass_scratch<T>(s.in_per_group()) * max_threads(exec);
        with_source<T>(gate, signal, forward, [&](const auto& source) {
            for_phases(s, weight.as<const T>(), [&](const Pass<T>& pass) {
                run_pass(pass, source, epilogue, packed, scratch, exec);
            });
        });
    });
}

}  // namespace zfcuda
