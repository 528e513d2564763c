// A small tensor-core product, c = a b, as the wrappers of port.cuh are meant to be used: two
// stages of cp.async with zero fill, ldmatrix, mma. And the wrappers one by one, to compare with
// the fragment layouts of the PTX ISA. Bug 0 is right; test_bugs.py has the list.
//
// A block of two warps makes 32 rows of the 8 columns of c (rows, 8). a is (rows, depth) with rows
// `pitch` bytes apart; b is (depth, 8) in bf16 and fp16, and (8, depth), `pitch` apart, in tf32.
#include "call.h"
#include "port.cuh"

namespace zfcuda {
namespace {

enum class Kind : int { tf32, bf16, fp16 };
constexpr int kBugs = 8, kPiece = 16, kChunk = 2 * kPiece;  // bytes of a copy, of a row of a stage
constexpr int kStageA = 32 * kChunk, kStage = kStageA + 16 * kPiece;

template <Kind kind>
__device__ void mma(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    if constexpr (kind == Kind::tf32)
        mma_tf32(d, a, b);
    else if constexpr (kind == Kind::bf16)
        mma_bf16(d, a, b);
    else
        mma_fp16(d, a, b);
}

__device__ inline int clamp(int bytes) { return bytes < 0 ? 0 : bytes > kPiece ? kPiece : bytes; }

template <Kind kind, int Bug>
__device__ void load_stage(char* stage, int chunk, int rows, int depth, int pitch, const char* a,
                           const char* b) {
    constexpr int element = kind == Kind::tf32 ? 4 : 2;
    const int thread = threadIdx.x, row = blockIdx.x * 32 + thread / 2;
    const int at = chunk * kChunk + thread % 2 * kPiece;
    const int valid = row < rows ? clamp(depth * element - at) : 0;
    cp_async<16>(stage + thread * kPiece, a + (valid ? row * pitch + at : 0) + (Bug == 4 ? 2 : 0),
                 valid);
    if (thread < 16) {
        int from, bytes;
        if constexpr (kind == Kind::tf32) {
            from = thread / 2 * pitch + at;
            bytes = clamp(depth * element - at);
        } else {
            const int k = chunk * 16 + thread;
            from = k * kPiece;
            bytes = k < depth ? kPiece : 0;
        }
        cp_async<16>(stage + kStageA + thread * kPiece, b + (bytes ? from : 0), bytes);
    }
    cp_async_commit();
}

template <Kind kind, int Bug>
__global__ void product_kernel(int rows, int depth, int pitch, const char* a, const char* b,
                               float* c) {
    ZF_DYNAMIC_SHARED(char, stages);
    constexpr int element = kind == Kind::tf32 ? 4 : 2;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int chunks = (depth * element + kChunk - 1) / kChunk;
    float d[4] = {};
    load_stage<kind, Bug>(stages, 0, rows, depth, pitch, a, b);
    for (int chunk = 0; chunk < chunks; ++chunk) {
        char* stage = stages + chunk % 2 * kStage;
        if (chunk + 1 < chunks)
            load_stage<kind, Bug>(stages + (chunk + 1) % 2 * kStage, chunk + 1, rows, depth, pitch,
                                  a, b);
        else
            cp_async_commit();  // an empty group: the same wait holds for the last chunk
        cp_async_wait<Bug == 2 ? 2 : 1>();
        if (Bug != 3) __syncthreads();
        std::uint32_t fragment_a[4], fragment_b[2];
        const int row = warp * 16 + lane / 8 % 2 * 8 + lane % 8;
        load_matrices<false>(fragment_a, stage + row * kChunk + lane / 16 * kPiece);
        const int place = kind == Kind::tf32 ? lane % 8 * 2 + lane / 8 % 2 : lane % 16;
        load_matrices<kind != Kind::tf32>(fragment_b,
                                          stage + kStageA + place * kPiece + (Bug == 6 ? 8 : 0));
        if (Bug == 5) {
            const std::uint32_t swapped = fragment_a[1];
            fragment_a[1] = fragment_a[2];
            fragment_a[2] = swapped;
        }
        mma<kind>(d, fragment_a, fragment_b);
        if (Bug != 1) __syncthreads();
    }
    if (Bug == 7) load_stage<kind, Bug>(stages, 0, rows, depth, pitch, a, b);
    for (int i = 0; i < 4; ++i) {
        const int row = blockIdx.x * 32 + warp * 16 + lane / 4 + i / 2 * 8;
        if (row < rows) c[row * 8 + 2 * (lane % 4) + i % 2] = d[i];
    }
}

template <Kind kind>
__global__ void mma_kernel(const std::uint32_t* a, const std::uint32_t* b, const float* c,
                           float* d) {
    const int lane = threadIdx.x;
    std::uint32_t fragment_a[4], fragment_b[2];
    float sums[4];
    for (int i = 0; i < 4; ++i) fragment_a[i] = a[lane * 4 + i];
    for (int i = 0; i < 2; ++i) fragment_b[i] = b[lane * 2 + i];
    for (int i = 0; i < 4; ++i) sums[i] = c[lane * 4 + i];
    mma<kind>(sums, fragment_a, fragment_b);
    for (int i = 0; i < 4; ++i) d[lane * 4 + i] = sums[i];
}

// in: 32 rows of 16 bytes; out: N registers of each lane.
template <bool Transposed, int N>
__global__ void ldmatrix_kernel(const std::uint32_t* in, std::uint32_t* out) {
    ZF_SHARED(std::uint32_t, rows, 32 * 4);
    const int lane = threadIdx.x;
    for (int i = 0; i < 4; ++i) rows[lane * 4 + i] = in[lane * 4 + i];
    __syncwarp();
    std::uint32_t matrix[N];
    load_matrices<Transposed>(matrix, rows + lane * 4);
    for (int i = 0; i < N; ++i) out[lane * N + i] = matrix[i];
}

// out: `count` pieces of Bytes, each `valid` bytes of `in` and zeros.
template <int Bytes>
__global__ void copy_kernel(int valid, const char* in, char* out) {
    ZF_SHARED(char, pieces, 32 * Bytes);
    const int at = threadIdx.x * Bytes;
    cp_async<Bytes>(pieces + at, in + at, valid);
    cp_async_commit();
    cp_async_wait<0>();
    for (int i = 0; i < Bytes; ++i) out[at + i] = pieces[at + i];
}

__global__ void round_kernel(const float* in, std::uint32_t* out) {
    out[threadIdx.x] = to_tf32(in[threadIdx.x]);
}

}  // namespace

ZF_EXPORT const char* product(int bug, int kind, int rows, int depth, int pitch, const char* a,
                              const char* b, float* c) {
    return message_of([&] {
        with_constant<kBugs>(bug, [&](auto bug_) {
            with_constant<3>(kind, [&](auto kind_) {
                launch(product_kernel<Kind(decltype(kind_)::value), decltype(bug_)::value>,
                       dim3((rows + 31) / 32), dim3(64), 2 * kStage, Exec{}, rows, depth, pitch, a,
                       b, c);
            });
        });
    });
}

ZF_EXPORT const char* multiply(int kind, const std::uint32_t* a, const std::uint32_t* b,
                               const float* c, float* d) {
    return message_of([&] {
        with_constant<3>(kind, [&](auto kind_) {
            launch(mma_kernel<Kind(decltype(kind_)::value)>, dim3(1), dim3(32), 0, Exec{}, a, b, c,
                   d);
        });
    });
}

ZF_EXPORT const char* ldmatrix(int transposed, int count, const std::uint32_t* in,
                               std::uint32_t* out) {
    const auto run = [&](auto kernel) { launch(kernel, dim3(1), dim3(32), 0, Exec{}, in, out); };
    return message_of([&] {
        if (count == 1) transposed ? run(ldmatrix_kernel<true, 1>) : run(ldmatrix_kernel<false, 1>);
        if (count == 2) transposed ? run(ldmatrix_kernel<true, 2>) : run(ldmatrix_kernel<false, 2>);
        if (count == 4) transposed ? run(ldmatrix_kernel<true, 4>) : run(ldmatrix_kernel<false, 4>);
    });
}

ZF_EXPORT const char* copy(int bytes, int valid, const char* in, char* out) {
    const auto run = [&](auto kernel) {
        launch(kernel, dim3(1), dim3(32), 0, Exec{}, valid, in, out);
    };
    return message_of([&] {
        if (bytes == 4) run(copy_kernel<4>);
        if (bytes == 8) run(copy_kernel<8>);
        if (bytes == 16) run(copy_kernel<16>);
    });
}

ZF_EXPORT const char* round_to_tf32(const float* in, std::uint32_t* out) {
    return message_of([&] { launch(round_kernel, dim3(1), dim3(256), 0, Exec{}, in, out); });
}

}  // namespace zfcuda
