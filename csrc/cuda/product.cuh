// A convolution, or a transposed one, with its gate: the product of tap_gemm.cuh for tensors of any
// layout. conv2d_relu.cu and deconv2d.cu name what is its source and what its result.
#pragma once

#include "edge.cuh"
#include "tap_gemm.cuh"

namespace zfcuda {

template <bool kTransposed>
Edges<3> product_edges(const ConvShape& s, Dtype dtype, Address source = {}, Address forward = {},
                       Address result = {}) {
    const std::int64_t bytes = element_bytes(dtype);
    const Layout from = kTransposed ? s.maps() : s.image(), to = kTransposed ? s.image() : s.maps();
    return {Edge{from, bytes, source}, Edge{s.maps(), bytes, forward, Edge::Role::mask},
            Edge{to, bytes, result, Edge::Role::result}};
}

template <bool kTransposed>
std::int64_t product_workspace(const ConvShape& s, Dtype dtype, const Exec& exec) {
    const auto own = [&](const ConvShape& part) {
        return tap_workspace<kTransposed>(part, dtype, exec);
    };
    const Edges<3> edges = product_edges<kTransposed>(s, dtype);
    return by_copies<kTransposed>(s, dtype, edges, exec) ? workspace_of_copies(s, edges, exec, own)
                                                         : own(s);
}

// `forward` is a tensor of maps, of the signal that is gated or of the result.
template <bool kTransposed>
void product(const ConvShape& s, Dtype dtype, Gate gate, Address source, Address weight,
             Address bias, Address forward, Address result, Address workspace, const Exec& exec) {
    const Edges<3> edges = product_edges<kTransposed>(s, dtype, source, forward, result);
    if (by_copies<kTransposed>(s, dtype, edges, exec))
        return on_copies_of_parts(
            s, edges, workspace, exec,
            [&](const ConvShape& part, std::int64_t, const auto& copies, Address rest) {
                const auto [from, mask, to] = copies;
                product<kTransposed>(part, dtype, gate, from, weight, bias, mask, to, rest, exec);
            });
    const Way way = kTransposed ? tap_way<true>(s, dtype, exec, source, forward)
                                : tap_way<false>(s, dtype, exec, source);
    pack_weights<kTransposed>(s, dtype, way, weight, workspace, exec);
    tap_gemm<kTransposed>(s, dtype, way, gate, source, workspace,
                          partial_sums<kTransposed>(s, dtype, workspace), bias, forward, result,
                          exec);
}

}  // namespace zfcuda
