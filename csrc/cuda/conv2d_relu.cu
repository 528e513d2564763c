// Convolution, bias and rectifier in one pass.
//
//   maps[n,o,y,x] = gate(bias[o] + sum over i,ky,kx of
//                        weight[o,i,ky,kx] * image[n,i, y*stride - padding + ky*dilation, ...])
//
// The product is tap_gemm.cuh's; the rectifier costs nothing there, since a result is in a
// register when it is finished. Least bytes: image + weights + maps, once each.
#include "product.cuh"

namespace zfcuda {

std::int64_t conv2d_workspace(const ConvShape& s, Dtype dtype, const Exec& exec) {
    return product_workspace<false>(s, dtype, exec);
}

void conv2d(const ConvShape& s, Dtype dtype, Gate gate, Address image, Address weight, Address bias,
            Address forward, Address maps, Address workspace, const Exec& exec) {
    product<false>(s, dtype, gate, image, weight, bias, forward, maps, workspace, exec);
}

}  // namespace zfcuda
