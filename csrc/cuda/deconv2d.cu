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
#include "packed_deconv2d.cuh"
#include "product.cuh"

namespace zfcuda {

std::int64_t deconv2d_workspace(const ConvShape& s, Dtype dtype, const Exec& exec) {
    return product_workspace<true>(s, dtype, exec);
}

void deconv2d(const ConvShape& s, Dtype dtype, Gate gate, Address signal, Address forward,
              Address weight, Address bias, Address image, Address workspace, const Exec& exec) {
    product<true>(s, dtype, gate, signal, weight, bias, forward, image, workspace, exec);
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
