// Max-pooling that records switches, perhaps of a rectified input.
//
//   output[n,c,oy,ox] = max over the window;  switches = i * kernel_w + j of the first maximum in
//   row-major order, or of the last NaN, as in torch. The window's first valid position is the
//   switch of a window of -inf, and with `relu` of one without a positive value.
//
// A fused ReLU costs nothing: the maximum starts from 0 in place of -infinity, and what is not
// positive never wins.
//
// A thread an output, or four channels of one in NHWC, in storage order (places.cuh): lanes read
// windows that are neighbours. Least bytes: input + output + one byte a switch; overlapping
// windows meet in L1, so the DRAM sees about these.
// Measured: not yet, for want of a GPU; `make bench` on one fills this line.
#include <cmath>

#include "places.cuh"

namespace zfcuda {
namespace {

template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads)
    max_pool2d_kernel(PoolShape s, Places inputs, Places outputs, Sum<T> least, const T* input,
                      T* output, std::uint8_t* switches) {
    for_each_place(outputs, [&](std::int64_t index, const Place& place) {
        const std::int64_t top = place.y * s.stride_h - s.padding_h;
        const std::int64_t left = place.x * s.stride_w - s.padding_w;
        const T* const window = input + inputs.offset(place.slab, 0, 0, place.inner);
        Vector<Sum<T>, kVector> best;
        Vector<std::uint8_t, kVector> where = {};
#pragma unroll
        for (int e = 0; e < kVector; ++e) best.value[e] = least;
        bool first = true;
        for (int i = 0; i < s.kernel_h; ++i) {
            const std::int64_t y = top + i * s.dilation_h;
            if (y < 0 || y >= s.in_height) continue;
            for (int j = 0; j < s.kernel_w; ++j) {
                const std::int64_t x = left + j * s.dilation_w;
                if (x < 0 || x >= s.in_width) continue;
                const auto values = load_wide<T, kVector>(window + y * inputs.row_elements +
                                                          x * inputs.column_elements);
#pragma unroll
                for (int e = 0; e < kVector; ++e) {
                    const auto value = values.value[e];
                    const bool more = value > best.value[e] || value != value;
                    if (first || more)
                        where.value[e] = static_cast<std::uint8_t>(i * s.kernel_w + j);
                    if (more) best.value[e] = value;
                }
                first = false;
            }
        }
        store_rounded(output + index * kVector, best);
        store_vector(switches + index * kVector, where);
    });
}

}  // namespace

void max_pool2d(const PoolShape& s, Dtype dtype, bool relu, Address input, Address output,
                Address switches, const Exec& exec) {
    if (s.outputs() == 0) return;
    const bool four = four_channels(s.output(), dtype, input, output, switches);
    with_vector(dtype, four, [&](auto zero, auto vector) {
        using T = decltype(zero);
        const Places inputs(s.input(), s.batch, vector), outputs(s.output(), s.batch, vector);
        launch(max_pool2d_kernel<T, vector()>, outputs.grid(), dim3(kThreads), 0, exec, s, inputs,
               outputs, relu ? Sum<T>(0) : Sum<T>(-INFINITY), input.as<const T>(), output.as<T>(),
               switches.as<std::uint8_t>());
    });
}

}  // namespace zfcuda
