// Launches of every size, to be refused or not as a GPU would; and the votes.
#include "call.h"
#include "port.cuh"

namespace zfcuda {
namespace {

template <int StaticKiB>
__global__ void store_kernel(float* out) {
    ZF_DYNAMIC_SHARED(float, dynamic);
    if constexpr (StaticKiB > 0) {
        ZF_SHARED(char, bytes, StaticKiB * 1024);
        bytes[threadIdx.x] = 1;
    }
    if (threadIdx.x + threadIdx.y + threadIdx.z + blockIdx.x + blockIdx.y + blockIdx.z == 0) {
        out[0] = blockDim.x;
        out[1] = gridDim.x;
        (void)dynamic;
    }
}

__global__ void votes_kernel(const int* in, int* out) {
    const int thread = threadIdx.x, value = in[thread];
    const int count = __syncthreads_count(value > 0);
    const int any = __syncthreads_or(value > 0), all = __syncthreads_and(value > 0);
    const int lanes = __popc(__ballot_sync(~0u, value > 0));
    const int any_lane = __any_sync(~0u, value > 0), all_lanes = __all_sync(~0u, value > 0);
    const int results[6] = {count, any, all, lanes, any_lane, all_lanes};
    for (int i = 0; i < 6; ++i) out[thread * 6 + i] = results[i];
}

// The four shuffles with segments of `width`.
__global__ void shuffles_kernel(int by, int width, const int* in, int* out) {
    const int thread = threadIdx.x, value = in[thread];
    out[thread * 4] = __shfl_sync(~0u, value, by, width);
    out[thread * 4 + 1] = __shfl_up_sync(~0u, value, by, width);
    out[thread * 4 + 2] = __shfl_down_sync(~0u, value, by, width);
    out[thread * 4 + 3] = __shfl_xor_sync(~0u, value, by, width);
}

}  // namespace

ZF_EXPORT const char* store(unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                            unsigned bz, int static_kib, int dynamic_bytes, float* out) {
    return message_of([&] {
        const auto run = [&](auto kernel) {
            launch(kernel, dim3(gx, gy, gz), dim3(bx, by, bz), dynamic_bytes, Exec{}, out);
        };
        static_kib == 0 ? run(store_kernel<0>) : run(store_kernel<32>);
    });
}

ZF_EXPORT const char* votes(const int* in, int* out) {
    return message_of([&] { launch(votes_kernel, dim3(1), dim3(64), 0, Exec{}, in, out); });
}

ZF_EXPORT const char* shuffles(int by, int width, const int* in, int* out) {
    return message_of(
        [&] { launch(shuffles_kernel, dim3(1), dim3(64), 0, Exec{}, by, width, in, out); });
}

}  // namespace zfcuda
