// Convolution, bias and rectifier in one pass.
//
//   maps[n,o,y,x] = gate(bias[o] + sum over i,ky,kx of
//                        weight[o,i,ky,kx] * image[n,i, y*stride - padding + ky*dilation, ...])
//
// The product is tap_gemm.cuh's; the rectifier costs nothing there, since a result is in a
// register when it is finished. Least bytes: image + weights + maps, once each.
#include "tap_gemm.cuh"

namespace zfcuda {

std::int64_t conv2d_workspace(const ConvShape& s, Dtype dtype, const Exec& exec) {
    return tap_workspace<false>(s, dtype, exec);
}

void conv2d(const ConvShape& s, Dtype dtype, Gate gate, Address image, Address weight, Address bias,
            Address forward, Address maps, Address workspace, const Exec& exec) {
    const Way way = tap_way<false>(s, dtype, exec, image);
    pack_weights<false>(s, dtype, way, weight, workspace, exec);
    tap_gemm<false>(s, dtype, way, gate, image, workspace, partial_sums<false>(s, dtype, workspace),
                    bias, forward, maps, exec);
}

}  // namespace zfcuda
