// Convolution, bias and rectifier in one pass.
//
//   maps[n,o,y,x] = gate(bias[o] + sum over i,ky,kx of
//                        weight[o,i,ky,kx] * image[n,i, y*stride - padding + ky*dilation, ...])
//
// The product is tap_gemm.cuh's; the rectifier costs nothing there, since a result is in a
// register when it is finished. Least bytes: image + weights + maps, once each.
#include "layouts.cuh"
#include "tap_gemm.cuh"

namespace zfcuda {

namespace {

bool by_copies(const ConvShape& s, Dtype dtype, const Exec& exec) {
    const std::int64_t elements = s.image().step_image() + s.maps().step_image();
    return converts<false>(s, dtype, s.batch * elements * element_bytes(dtype), exec);
}

}  // namespace

std::int64_t conv2d_workspace(const ConvShape& s, Dtype dtype, const Exec& exec) {
    if (!by_copies(s, dtype, exec)) return tap_workspace<false>(s, dtype, exec);
    return workspace_of_parts(in_nhwc(s), exec, [&](const ConvShape& part) {
        const std::int64_t bytes = element_bytes(dtype);
        return Copies::size(part.image(), part.batch, bytes) +
               2 * Copies::size(part.maps(), part.batch, bytes) +
               tap_workspace<false>(part, dtype, exec);
    });
}

void conv2d(const ConvShape& s, Dtype dtype, Gate gate, Address image, Address weight, Address bias,
            Address forward, Address maps, Address workspace, const Exec& exec) {
    if (by_copies(s, dtype, exec))
        return for_parts(in_nhwc(s), exec, [&](const ConvShape& part, std::int64_t first) {
            const std::int64_t bytes = element_bytes(dtype);
            Copies copies(first, part.batch, workspace, exec);
            const Address from = copies.in(s.image(), bytes, image);
            const Address mask = copies.in(s.maps(), bytes, forward);
            const Address to = copies.room(s.maps(), bytes, maps);
            conv2d(part, dtype, gate, from, weight, bias, mask, to, copies.rest(), exec);
            copies.out(s.maps(), bytes, to, maps);
        });
    const Way way = tap_way<false>(s, dtype, exec, image);
    pack_weights<false>(s, dtype, way, weight, workspace, exec);
    tap_gemm<false>(s, dtype, way, gate, image, workspace, partial_sums<false>(s, dtype, workspace),
                    bias, forward, maps, exec);
}

}  // namespace zfcuda
