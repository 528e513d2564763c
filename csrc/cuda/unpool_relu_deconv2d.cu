// One step down the deconvnet: unpool, gate, transposed convolution, in one pass.
//
//   maps[n,o,my,mx] = sum of signal[n,o,w] over the windows w whose switch points to (my, mx), in
//                     row-major order; with overwrite: the last of them
//   image[n,i,y,x]  = bias[i] + sum over o,ky,kx of weight[o,i,ky,kx] * gate(maps)[n,o,my,mx]
//                     with my*stride - padding + ky*dilation = y, likewise mx
//
// The product is tap_gemm.cuh's transposed one, whose source is not a tensor: what a thread would
// load from the maps it gathers from the windows that cover the place (pool_windows.cuh): 1, 2 or 4
// of a 3 x 3 window of stride 2, whose values and switches neighbours share through L1. `forward`
// blocks a value before the sum, the rectifier acts after it, on the way to shared memory. A place
// is gathered once for each tap and column tile that reads it, from a signal a quarter of the
// maps' size; the maps are never in memory.
// On the tensor cores (tap_mma.cuh) the gathering issues many more instructions than the products
// (4 % of the main loop's code are HMMA): a halo that is gathered once for all taps is the form to
// come.
// Least bytes: signal + one byte a switch (+ forward) + weights + image.
// Measured: not yet, for want of a GPU; `make bench` on one fills this line.
#include "packed_deconv2d.cuh"
#include "pool_windows.cuh"
#include "tap_gemm.cuh"

namespace zfcuda {
namespace {

template <typename T>
struct UnpooledSource {
    using Value = Sum<T>;
    WindowAxis y, x;
    std::int64_t row_step, column_step;  // of the signal
    const T* signal;
    const std::uint8_t* switches;
    const T* forward;
    bool overwrite;

    // kVector channels of the maps at a row and column; `offset` is that of window (0, 0).
    template <int kVector>
    __device__ Vector<Value, kVector> load(std::int64_t offset, int row, int column) const {
        Vector<Value, kVector> sum = {};
        const int last_y = y.last(row), last_x = x.last(column);
        for (int oy = y.first(row); oy <= last_y; ++oy) {
            const int i = y.tap(row, oy);
            if (i < 0) continue;
            for (int ox = x.first(column); ox <= last_x; ++ox) {
                const int j = x.tap(column, ox);
                if (j < 0) continue;
                const std::int64_t at = offset + oy * row_step + ox * column_step;
                const auto where = load_vector<std::uint8_t, kVector>(switches + at);
                const auto value = convert<Value>(load_gated<T, kVector>(signal, forward, at));
#pragma unroll
                for (int e = 0; e < kVector; ++e)
                    if (where.value[e] == i * x.kernel + j)
                        sum.value[e] = overwrite ? value.value[e] : sum.value[e] + value.value[e];
            }
        }
        return sum;
    }
};

}  // namespace

std::int64_t unpool_relu_deconv2d_workspace(const ConvShape& s, const PoolShape&, Dtype dtype,
                                            const Exec& exec) {
    return deconv2d_workspace(s, dtype, exec);
}

void unpool_relu_deconv2d(const ConvShape& s, const PoolShape& pool, Dtype dtype, Gate gate,
                          bool overwrite, Address signal, Address switches, Address forward,
                          Address weight, Address bias, Address image, Address workspace,
                          const Exec& exec) {
    const Way way = tap_way<true>(s, dtype, exec, signal, switches, forward);
    pack_weights<true>(s, dtype, way, weight, workspace, exec);
    TapPlan p = tap_plan<true>(s, dtype, way, gate);
    const Layout pooled = pool.output();
    p.steps = {pooled.step_image(), pooled.step_channel(), 0, 0};
    const Windows windows(pool, 1);
    const bool channels_last = s.channels_last != 0;
    const bool vector = channels_last && p.channels % 4 == 0 && aligned(signal, switches, forward);
    const auto source = [&](auto zero) {
        using T = decltype(zero);
        return UnpooledSource<T>{windows.y,
                                 windows.x,
                                 pooled.step_y(),
                                 pooled.step_x(),
                                 signal.as<const T>(),
                                 switches.as<const std::uint8_t>(),
                                 mask_of(gate, forward).template as<const T>(),
                                 overwrite};
    };
    if (way != Way::fma)
        return with_factors(way, dtype, [&](auto factors) {
            using Factors = decltype(factors);
            const auto from = source(typename Factors::T{});
            launch_tap_mma<Factors, true>(p, from, workspace, bias, Address{}, image, exec);
        });
    with_variant(p, dtype, channels_last, vector, [&](auto variant) {
        using Variant = decltype(variant);
        const auto from = source(typename Variant::T{});
        launch_tap_gemm<Variant, true>(p, from, workspace, bias, Address{}, image, exec);
    });
}

}  // namespace zfcuda
