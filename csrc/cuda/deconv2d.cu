// Gate and transposed convolution in one pass: the way down of the deconvnet and of
// backpropagation.
//
//   image[n,i,y,x] = bias[i] + sum over o,ky,kx of weight[o,i,ky,kx] * gate(signal)[n,o,my,mx]
//                    with my*stride - padding + ky*dilation = y, likewise mx
//
// The product is tap_gemm.cuh's, a slice of the grid for each phase of the stride: a 7x7 filter
// with stride 2 becomes 16 + 12 + 12 + 9 taps instead of four times 49 with zeros between; to an
// image of three colours, 16 taps for all four together (columns.cuh). The gate acts while the
// signal is loaded. Least bytes: signal (and forward) + weights + image.
#include "layouts.cuh"
#include "packed_deconv2d.cuh"
#include "tap_gemm.cuh"

namespace zfcuda {

namespace {

bool by_copies(const ConvShape& s, Dtype dtype, const Exec& exec) {
    const std::int64_t elements = s.image().step_image() + s.maps().step_image();
    return converts<true>(s, dtype, s.batch * elements * element_bytes(dtype), exec);
}

}  // namespace

std::int64_t deconv2d_workspace(const ConvShape& s, Dtype dtype, const Exec& exec) {
    if (!by_copies(s, dtype, exec)) return tap_workspace<true>(s, dtype, exec);
    return workspace_of_parts(in_nhwc(s), exec, [&](const ConvShape& part) {
        const std::int64_t bytes = element_bytes(dtype);
        return 2 * Copies::size(part.maps(), part.batch, bytes) +
               Copies::size(part.image(), part.batch, bytes) +
               tap_workspace<true>(part, dtype, exec);
    });
}

void deconv2d(const ConvShape& s, Dtype dtype, Gate gate, Address signal, Address forward,
              Address weight, Address bias, Address image, Address workspace, const Exec& exec) {
    if (by_copies(s, dtype, exec))
        return for_parts(in_nhwc(s), exec, [&](const ConvShape& part, std::int64_t first) {
            const std::int64_t bytes = element_bytes(dtype);
            Copies copies(first, part.batch, workspace, exec);
            const Address from = copies.in(s.maps(), bytes, signal);
            const Address mask = copies.in(s.maps(), bytes, forward);
            const Address to = copies.room(s.image(), bytes, image);
            deconv2d(part, dtype, gate, from, mask, weight, bias, to, copies.rest(), exec);
            copies.out(s.image(), bytes, to, image);
        });
    const Way way = tap_way<true>(s, dtype, exec, signal, forward);
    pack_weights<true>(s, dtype, way, weight, workspace, exec);
    tap_gemm<true>(s, dtype, way, gate, signal, workspace, partial_sums<true>(s, dtype, workspace),
                   bias, forward, image, exec);
}

std::int64_t deconv2d_packed_bytes(const ConvShape& s, Dtype dtype, const Exec& exec) {
    return packed_weights<true>(s, dtype, tap_way<true>(s, dtype, exec));
}

void deconv2d_pack(const ConvShape& s, Dtype dtype, Address weight, Address packed,
                   const Exec& exec) {
    pack_weights<true>(s, dtype, tap_way<true>(s, dtype, exec), weight, packed, exec);
}

void deconv2d_packed(const ConvShape& s, Dtype dtype, Gate gate, Address signal, Address packed,
                     Address image, const Exec& exec) {
    tap_gemm<true>(s, dtype, tap_way<true>(s, dtype, exec), gate, signal, packed, Address{},
                   Address{}, Address{}, image, exec);
}

}  // namespace zfcuda
