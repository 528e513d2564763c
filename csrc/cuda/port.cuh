// The port header: the only place with inline PTX, and the only one that knows whether a kernel
// is compiled by nvcc for a GPU or by g++ for the SIMT emulator (ZF_SIMT, tests/simt). Kernels
// stay ordinary CUDA, but for three things that go through this header:
//
//   ZF_SHARED(float, tile, 64 * 17);       a static shared array, float tile[64 * 17]
//   ZF_DYNAMIC_SHARED(float, buffer);      the dynamic shared memory, float* buffer
//   launch(kernel, grid, block, shared_bytes, exec, arguments...);
//
// both kinds of shared memory aligned to 16 bytes, and the wrappers below, each with its PTX and
// its emulated body side by side.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../ops.h"

#if defined(ZF_SIMT)

#include "simt.h"
// The last parameter of a wrapper that threads must call from the same line.
#define ZF_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define ZF_AND_SITE , ZF_SITE

#define ZF_SHARED(type, name, count)           \
    static const char name##_key = 0;          \
    auto& name = *static_cast<type(*)[count]>( \
        simt::shared_array(&name##_key, #name, sizeof(type) * (count)))
#define ZF_DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(simt::dynamic_shared())

namespace zfcuda {

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes,
            const Exec&, Arguments... arguments) {
    simt::launch(kernel, grid, block, shared_bytes, arguments...);
}

template <typename... Parameters>
int architecture(void (*)(Parameters...), const Exec&) {
    return simt::architecture();
}
inline int processors(const Exec&) { return simt::processors(); }
inline int memory_bytes(const Exec&) { return 15 * simt::processors(); }
inline int shared_bytes(const Exec&) { return static_cast<int>(simt::shared_limit()); }

}  // namespace zfcuda

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#if !defined(__CUDACC_RTC__)
#include <map>
#include <mutex>
#include <utility>
#endif
#define ZF_SITE
#define ZF_AND_SITE

#define ZF_SHARED(type, name, count) __shared__ __align__(16) type name[count]
#define ZF_DYNAMIC_SHARED(type, name)                                  \
    extern __shared__ __align__(16) unsigned char zf_dynamic_shared[]; \
    type* const name = reinterpret_cast<type*>(zf_dynamic_shared)

namespace zfcuda {

#if defined(__CUDACC_RTC__)

// NVRTC compiles kernels alone: it reads the launchers, and leaves them out.
template <typename... Parameters, typename... Arguments>
void launch(void (*)(Parameters...), dim3, dim3, std::size_t, const Exec&, Arguments...) {}
template <typename... Parameters>
int architecture(void (*)(Parameters...), const Exec&) {
    return 0;
}
inline int processors(const Exec&) { return 1; }
inline int memory_bytes(const Exec&) { return 1; }
inline int shared_bytes(const Exec&) { return 1; }

#else

inline void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess)
        throw std::runtime_error(std::string("zfcuda: ") + what + ": " +
                                 cudaGetErrorString(status));
}

// Makes a device current and puts the former one back.
class DeviceGuard {
  public:
    explicit DeviceGuard(int device) {
        check(cudaGetDevice(&former_), "cudaGetDevice");
        if (former_ != device) check(cudaSetDevice(device), "cudaSetDevice");
    }
    ~DeviceGuard() { cudaSetDevice(former_); }
    DeviceGuard(const DeviceGuard&) = delete;

  private:
    int former_ = 0;
};

// Launches on the stream and device of `exec`; an error of this very launch throws.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes,
            const Exec& exec, Arguments... arguments) {
    const DeviceGuard guard(static_cast<int>(exec.device));
    if (shared_bytes > 48 * 1024)
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(shared_bytes)),
              "shared memory of the kernel");
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = reinterpret_cast<cudaStream_t>(exec.stream);
    check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), "launch");
}

// What ask() says of a kernel (or null: of the device itself) on a device. It never changes, and so
// is asked once: convolutions are chosen by it in every call, captures of graphs included.
template <typename Ask>
int known(const void* kernel, const Exec& exec, Ask&& ask) {
    static std::mutex mutex;
    static std::map<std::pair<const void*, std::int64_t>, int> answers;
    const std::lock_guard<std::mutex> lock(mutex);
    const std::pair<const void*, std::int64_t> key = {kernel, exec.device};
    const auto answer = answers.find(key);
    return answer != answers.end() ? answer->second : (answers[key] = ask());
}

// The architecture that a kernel's code on this device was compiled for (75, 80, …): kArch of it,
// which is less than the device's where newer ones run older code.
template <typename... Parameters>
int architecture(void (*kernel)(Parameters...), const Exec& exec) {
    return known(reinterpret_cast<const void*>(kernel), exec, [&] {
        const DeviceGuard guard(static_cast<int>(exec.device));
        cudaFuncAttributes attributes;
        check(cudaFuncGetAttributes(&attributes, kernel), "attributes of a kernel");
        return attributes.ptxVersion;
    });
}

inline int attribute(cudaDeviceAttr which, const Exec& exec) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, static_cast<int>(exec.device)),
          "attributes of the device");
    return value;
}

// The device's multiprocessors.
inline int processors(const Exec& exec) {
    return known(nullptr, exec, [&] { return attribute(cudaDevAttrMultiProcessorCount, exec); });
}

// Bytes that its memory, of double data rate, moves in one of their cycles: 1970 of an H100 (SXM),
// 400 of an RTX 4090; 15 a multiprocessor where the device keeps its clocks to itself.
inline int memory_bytes(const Exec& exec) {
    return known(nullptr, exec, [&] {
        const std::int64_t clock = attribute(cudaDevAttrClockRate, exec);
        const std::int64_t rate = std::int64_t(attribute(cudaDevAttrMemoryClockRate, exec)) *
                                  attribute(cudaDevAttrGlobalMemoryBusWidth, exec) / 4;
        return clock > 0 && rate >= clock ? static_cast<int>(rate / clock) : 15 * processors(exec);
    });
}

// The shared memory that a block may have.
inline int shared_bytes(const Exec& exec) {
    return known(nullptr, exec,
                 [&] { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, exec); });
}

#endif

}  // namespace zfcuda

#endif

namespace zfcuda {

#if defined(__CUDA_ARCH__)
constexpr int kArch = __CUDA_ARCH__ / 10;
#else
constexpr int kArch = 80;  // nvcc's host pass, and the emulator
#endif

// The same number, of unknown origin. The compiler prefers to compute cheap indices anew in every
// turn of a loop to keeping them in registers, and the loads that need them wait; it cannot do
// that with what a shuffle gave.
template <typename Number>
__device__ __forceinline__ Number kept(Number number) {
#if defined(ZF_SIMT)
    return number;
#else
    return __shfl_sync(0xffffffffu, number, threadIdx.x % 32);
#endif
}

// Waits for the kThreads threads of the same threadIdx.y: the whole block, or where it is of
// several teams of whole warps, one of these, which have a barrier each. (There are sixteen; 0 is
// __syncthreads.) The number is read anew each time, so that it takes no register meanwhile.
template <int kThreads>
__device__ __forceinline__ void sync_team(ZF_SITE) {
#if defined(ZF_SIMT)
    simt::team_barrier(kThreads, {file, line});
#else
    asm volatile(
        "{ .reg .u32 own; mov.u32 own, %%tid.y; add.u32 own, own, 1; bar.sync own, %0; }" ::"n"(
            kThreads)
        : "memory");
#endif
}

#if !defined(ZF_SIMT)
__device__ __forceinline__ unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}
#endif

// ---- Asynchronous copies, global to shared memory. Bytes is 4, 8 or 16 and both sides are so
// aligned; what lies beyond valid_bytes is not read but filled with zeros. Copies of 16 bytes go
// past the first-level cache unless FirstLevel; the others cannot. Before sm_80 the copy is an
// ordinary one.

template <int Bytes, bool FirstLevel = Bytes != 16>
__device__ __forceinline__ void cp_async(void* shared, const void* global,
                                         int valid_bytes = Bytes) {
    static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async copies 4, 8 or 16 bytes");
    static_assert(FirstLevel || Bytes == 16, "only copies of 16 bytes go past the first level");
#if defined(ZF_SIMT)
    simt::copy_async(shared, global, Bytes, valid_bytes);
#else
    if constexpr (kArch < 80) {
        struct alignas(Bytes) Words {
            unsigned word[Bytes / 4];
        };
        if (valid_bytes == Bytes) {
            *static_cast<Words*>(shared) = *static_cast<const Words*>(global);
            return;
        }
        for (int i = 0; i < Bytes; i += 4) {
            unsigned word = 0;
            if (valid_bytes >= i + 4)
                word = *reinterpret_cast<const unsigned*>(static_cast<const char*>(global) + i);
            else
                for (int j = i; j < valid_bytes; ++j)
                    word |= unsigned(static_cast<const unsigned char*>(global)[j]) << 8 * (j - i);
            *reinterpret_cast<unsigned*>(static_cast<char*>(shared) + i) = word;
        }
    } else if constexpr (!FirstLevel) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                     "l"(__cvta_generic_to_global(global)), "r"(valid_bytes)
                     : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)),
                     "l"(__cvta_generic_to_global(global)), "n"(Bytes), "r"(valid_bytes)
                     : "memory");
    }
#endif
}

// Closes a group of the copies issued since the last one.
__device__ __forceinline__ void cp_async_commit() {
#if defined(ZF_SIMT)
    simt::commit_async();
#else
    if constexpr (kArch >= 80) asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `Groups` of this thread's groups are in flight. A barrier must follow before
// other threads read what they brought.
template <int Groups>
__device__ __forceinline__ void cp_async_wait() {
#if defined(ZF_SIMT)
    simt::wait_async(Groups);
#else
    if constexpr (kArch >= 80) asm volatile("cp.async.wait_group %0;" ::"n"(Groups) : "memory");
#endif
}

// ---- Fragments of the tensor cores. ldmatrix reads N (1, 2 or 4) matrices of 8 rows of 16 bytes;
// lane 8 i + r gives the address of row r of matrix i, and gets element pair lane % 4 of row
// lane / 4 in matrix[i]; transposed: elements 2 (lane % 4) and the next of column lane / 4.

template <bool Transposed, int N>
__device__ __forceinline__ void load_matrices(std::uint32_t (&matrix)[N],
                                              const void* row ZF_AND_SITE) {
    static_assert(N == 1 || N == 2 || N == 4, "ldmatrix loads 1, 2 or 4 matrices");
#if defined(ZF_SIMT)
    simt::load_matrices(matrix, N, Transposed, row, {file, line});
#else
    const unsigned address = shared_address(row);
    if constexpr (N == 1 && !Transposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                     : "=r"(matrix[0])
                     : "r"(address)
                     : "memory");
    else if constexpr (N == 1)
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                     : "=r"(matrix[0])
                     : "r"(address)
                     : "memory");
    else if constexpr (N == 2 && !Transposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                     : "=r"(matrix[0]), "=r"(matrix[1])
                     : "r"(address)
                     : "memory");
    else if constexpr (N == 2)
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                     : "=r"(matrix[0]), "=r"(matrix[1])
                     : "r"(address)
                     : "memory");
    else if constexpr (!Transposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
                     : "r"(address)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
                     : "r"(address)
                     : "memory");
#endif
}

// ---- Products of one warp, d += a b, with float accumulators. The fragments are those of the PTX
// ISA: with g = lane / 4 and t = lane % 4, d holds rows g, g, g + 8, g + 8 and columns 2t, 2t + 1,
// 2t, 2t + 1 of a 16 x 8 tile.

// 16 x 8 x 8, tf32: a holds (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4); b holds (t, g),
// (t + 4, g). The elements are bits of floats, of which the tensor cores ignore the low 13: a
// float that was not rounded by to_tf32 is truncated (and a NaN that is nothing but low bits is an
// infinity; arithmetic makes no such NaN).
__device__ __forceinline__ void mma_tf32(float (&d)[4], const std::uint32_t (&a)[4],
                                         const std::uint32_t (&b)[2] ZF_AND_SITE) {
#if defined(ZF_SIMT)
    simt::multiply(simt::Element::tf32, {d, a, b}, {file, line});
#else
    if constexpr (kArch >= 80)
        asm volatile(
            "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, "
            "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Ends a kernel that the launcher never chooses on this architecture.
__device__ __forceinline__ void never_launched() {
#if !defined(ZF_SIMT)
    __trap();
#endif
}

// 16 x 8 x 16, bf16: each register holds the two elements of columns (a) or rows (b) 2t and 2t + 1,
// the lower in the low half; a: rows g, g + 8, then the same 8 columns on; b: then 8 rows on.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const std::uint32_t (&a)[4],
                                         const std::uint32_t (&b)[2] ZF_AND_SITE) {
#if defined(ZF_SIMT)
    simt::multiply(simt::Element::bf16, {d, a, b}, {file, line});
#else
    if constexpr (kArch >= 80)
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
            "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// The same in fp16; sm_75 multiplies each half of the 16 by an instruction of its own.
__device__ __forceinline__ void mma_fp16(float (&d)[4], const std::uint32_t (&a)[4],
                                         const std::uint32_t (&b)[2] ZF_AND_SITE) {
#if defined(ZF_SIMT)
    simt::multiply(simt::Element::fp16, {d, a, b}, {file, line});
#else
    if constexpr (kArch >= 80)
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
            "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    else
#pragma unroll
        for (int half = 0; half < 2; ++half)
            asm volatile(
                "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, "
                "{%6}, {%0, %1, %2, %3};"
                : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
#endif
}

// A float's bits rounded to tf32 (10 bits of fraction), to nearest, ties away from zero.
__device__ __forceinline__ std::uint32_t to_tf32(float x) {
#if defined(ZF_SIMT)
    const std::uint32_t bits = __float_as_uint(x);
    return std::isfinite(x) ? (bits + 0x1000u) & ~0x1fffu : bits;
#else
    if constexpr (kArch >= 80) {
        std::uint32_t rounded;
        asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(x));
        return rounded;
    } else {
        __trap();
        return 0;
    }
#endif
}

}  // namespace zfcuda
