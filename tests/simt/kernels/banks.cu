// Accesses of one warp to shared memory in known patterns, whose passes test_banks.py knows.
#include "call.h"
#include "vector.cuh"

namespace zfcuda {
namespace {

// Lane i writes and then reads kSize floats at float i * stride.
template <int kSize>
__global__ void strided_kernel(int stride, float* out) {
    ZF_SHARED(float, shared, 32 * 36);
    const int lane = threadIdx.x;
    Vector<float, kSize> vector;
    for (int i = 0; i < kSize; ++i) vector.value[i] = float(lane);
    store_vector(shared + lane * stride, vector);
    __syncthreads();
    vector = load_vector<float, kSize>(shared + lane * stride);
    for (int i = 0; i < kSize; ++i) out[lane * kSize + i] = vector.value[i];
}

// Every lane reads the same word; then lane i reads word i in every round but lane 0 in the last.
__global__ void broadcast_kernel(float* out) {
    ZF_SHARED(float, shared, 32);
    const int lane = threadIdx.x;
    shared[lane] = 1;
    __syncthreads();
    float sum = shared[7];
    for (int i = 0; i < 3 - (lane == 0); ++i) sum += shared[lane];
    out[lane] = sum;
}

// Rows of 16 bytes, `pitch` bytes apart, brought by cp.async and read by ldmatrix.
__global__ void fragment_kernel(int pitch, const char* in, std::uint32_t* out) {
    ZF_DYNAMIC_SHARED(char, rows);
    const int lane = threadIdx.x;
    cp_async<16>(rows + lane * pitch, in + lane * 16);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    std::uint32_t matrix[4];
    load_matrices<false>(matrix, rows + lane * pitch);
    for (int i = 0; i < 4; ++i) out[lane * 4 + i] = matrix[i];
}

}  // namespace

ZF_EXPORT const char* strided(int size, int stride, float* out) {
    const auto run = [&](auto kernel) {
        launch(kernel, dim3(1), dim3(32), 0, Exec{}, stride, out);
    };
    return message_of([&] {
        if (size == 1) run(strided_kernel<1>);
        if (size == 2) run(strided_kernel<2>);
        if (size == 4) run(strided_kernel<4>);
    });
}

ZF_EXPORT const char* broadcast(float* out) {
    return message_of([&] { launch(broadcast_kernel, dim3(1), dim3(32), 0, Exec{}, out); });
}

ZF_EXPORT const char* fragment(int pitch, const char* in, std::uint32_t* out) {
    return message_of(
        [&] { launch(fragment_kernel, dim3(1), dim3(32), 32 * 144, Exec{}, pitch, in, out); });
}

}  // namespace zfcuda
