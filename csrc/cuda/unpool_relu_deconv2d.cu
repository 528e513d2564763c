// One step down the deconvnet: unpool, gate, transposed convolution, in one pass.
//
//   maps[n,o,my,mx] = sum of signal[n,o,w] over the windows w whose switch points to (my, mx), in
//                     row-major order; with overwrite: the last of them
//   image[n,i,y,x]  = bias[i] + sum over o,ky,kx of weight[o,i,ky,kx] * gate(maps)[n,o,my,mx]
//                     with my*stride - padding + ky*dilation = y, likewise mx
//
// The product is tap_gemm.cuh's transposed one, whose source is not a tensor: what a thread would
// load from the maps it gathers (unpooled_source.cuh): from 1, 2 or 4 windows of 3 x 3 of stride 2,
// whose values and switches neighbours share through L1. The rectifier acts on the way to shared
// memory. A place
// is gathered once for each tap and column tile that reads it, from a signal a quarter of the
// maps' size; the maps are never in memory.
// On the tensor cores (halo_mma.cuh) a place is gathered once for all taps.
// Least bytes: signal + one byte a switch (+ forward) + weights + image.
// Measured: not yet, for want of a GPU; `make bench` on one fills this line.
#include "edge.cuh"
#include "packed_deconv2d.cuh"
#include "tap_gemm.cuh"
#include "unpooled_source.cuh"

namespace zfcuda {

namespace {

Edges<4> unpooled_edges(const ConvShape& s, const PoolShape& pool, Dtype dtype, Address signal = {},
                        Address switches = {}, Address forward = {}, Address image = {}) {
    const std::int64_t bytes = element_bytes(dtype);
    return {Edge{pool.output(), bytes, signal}, Edge{pool.output(), 1, switches},
            Edge{pool.output(), bytes, forward, Edge::Role::mask},
            Edge{s.image(), bytes, image, Edge::Role::result}};
}

}  // namespace

std::int64_t unpool_relu_deconv2d_workspace(const ConvShape& s, const PoolShape& pool, Dtype dtype,
                                            const Exec& exec) {
    const auto own = [&](const ConvShape& part) { return tap_workspace<true>(part, dtype, exec); };
    const Edges<4> edges = unpooled_edges(s, pool, dtype);
    return by_copies<true>(s, dtype, edges, exec) ? workspace_of_copies(s, edges, exec, own)
                                                  : own(s);
}

void unpool_relu_deconv2d(const ConvShape& s, const PoolShape& pool, Dtype dtype, Gate gate,
                          bool overwrite, Address signal, Address switches, Address forward,
                          Address weight, Address bias, Address image, Address workspace,
                          const Exec& exec) {
    const Edges<4> edges = unpooled_edges(s, pool, dtype, signal, switches, forward, image);
    if (by_copies<true>(s, dtype, edges, exec))
        return on_copies_of_parts(
            s, edges, workspace, exec,
            [&](const ConvShape& part, std::int64_t, const auto& copies, Address rest) {
                const auto [from, where, mask, to] = copies;
                unpool_relu_deconv2d(part, in_nhwc(pool, part.batch), dtype, gate, overwrite, from,
                                     where, mask, weight, bias, to, rest, exec);
            });
    const Way way = tap_way<true>(s, dtype, exec, signal, switches, forward);
    pack_weights<true>(s, dtype, way, weight, workspace, exec);
    TapPlan p = tap_plan<true>(s, dtype, way, gate);
    p.steps = UnpooledSource<float>::steps(pool);
    const Address partial = partial_sums<true>(s, dtype, workspace);
    const bool channels_last = s.channels_last != 0;
    const bool vector = channels_last && p.channels % 4 == 0 && aligned(signal, switches, forward);
    const auto source = [&](auto zero) {
        using T = decltype(zero);
        return UnpooledSource<T>(pool, gate, overwrite, signal, switches, forward);
    };
    if (way != Way::fma)
        return with_factors(way, dtype, [&](auto factors) {
            using Factors = decltype(factors);
            const auto from = source(typename Factors::T{});
            const LoopPlan<true> plan(p, sizeof(typename Factors::T));
            launch_halo_mma<Factors, true>(plan, from, workspace, partial, bias, Address{}, image,
                                           exec);
        });
    with_variant(p, dtype, channels_last, vector, [&](auto variant) {
        using Variant = decltype(variant);
        const auto from = source(typename Variant::T{});
        launch_tap_gemm<Variant, true>(p, from, workspace, partial, bias, Address{}, image, exec);
    });
}

}  // namespace zfcuda
