// CUTLASS's convolutions for sm_80, instantiated to be read, never run: see cutlass.py.
#include "cutlass/conv/kernel/default_conv2d_fprop.h"
#include "cutlass/device_kernel.h"
#include "cutlass/epilogue/thread/linear_combination.h"

using NHWC = cutlass::layout::TensorNHWC;
using Swizzle = cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<>;
template <int M, int N, int K>
using Shape = cutlass::gemm::GemmShape<M, N, K>;
template <typename Element, typename Class, typename Block, typename Warp, typename Instruction,
          int Vector, int Stages>
using Fprop = typename cutlass::conv::kernel::DefaultConv2dFprop<
    Element, NHWC, Element, NHWC, Element, NHWC, float, Class, cutlass::arch::Sm80, Block, Warp,
    Instruction, cutlass::epilogue::thread::LinearCombination<Element, Vector, float, float>,
    Swizzle, Stages, cutlass::arch::OpMultiplyAdd,
    cutlass::conv::IteratorAlgorithm::kOptimized>::Kernel;

using Simt = Fprop<float, cutlass::arch::OpClassSimt, Shape<128, 128, 8>, Shape<32, 64, 8>,
                   Shape<1, 1, 1>, 1, 4>;
using Bf16 = Fprop<cutlass::bfloat16_t, cutlass::arch::OpClassTensorOp, Shape<128, 128, 32>,
                   Shape<64, 64, 32>, Shape<16, 8, 16>, 8, 4>;
using Tf32 = Fprop<float, cutlass::arch::OpClassTensorOp, Shape<128, 128, 16>, Shape<64, 64, 16>,
                   Shape<16, 8, 8>, 4, 4>;

template __global__ void cutlass::Kernel<Simt>(Simt::Params);
template __global__ void cutlass::Kernel<Bf16>(Bf16::Params);
template __global__ void cutlass::Kernel<Tf32>(Tf32::Params);
