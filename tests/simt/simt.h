// What a kernel sees when g++ compiles it for the emulator: CUDA's names (threads, barriers, warp
// operations, atomics, intrinsics) and the entry points that port.cuh calls. docs/emulator.md
// tells the whole story; runtime.h is the inside.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __shared__  // shared memory goes through ZF_SHARED and ZF_DYNAMIC_SHARED

// Code that stands for hardware: its accesses are checked by hand, not by the compiler's hooks.
#define ZF_SIMT_HARDWARE __attribute__((no_sanitize("thread", "alignment")))

// Constant for as long as one thread runs, which is all that the compiler may assume of them. (All
// uint3: g++ leaves reads of constants alone, but not those of a class with constructors.)
extern const uint3 threadIdx asm("zf_simt_thread_idx");
extern const uint3 blockIdx asm("zf_simt_block_idx");
extern const uint3 blockDim asm("zf_simt_block_dim");
extern const uint3 gridDim asm("zf_simt_grid_dim");
constexpr int warpSize = 32;

namespace simt {

// Where in the source a thread synchronises: every synchronising function takes one by default.
struct Site {
    const char* file;
    int line;

    bool operator==(const Site& other) const {
        return line == other.line && (file == other.file || std::strcmp(file, other.file) == 0);
    }
};
#define ZF_SIMT_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

// Runs `body(context)` as every thread of the grid; throws std::runtime_error for the first error.
void launch(const void* kernel, dim3 grid, dim3 block, std::size_t shared_bytes,
            void (*body)(void*), void* context, std::size_t context_bytes);

// The one that launches are checked for: 75, 80, …
int architecture();

// How many multiprocessors the device has, and how much shared memory a block may have, by which
// launchers choose their grids.
int processors();
std::size_t shared_limit();

// The shared array of the declaration `key`, the same for all threads of a block.
void* shared_array(const void* key, const char* name, std::size_t bytes);
void* dynamic_shared();

// Waits for all threads of the block; the same for the votes, which gather `predicate`.
struct Votes {
    int count, threads;
};
Votes barrier(const char* function, int predicate, Site site);

// Waits for the threads of the block whose threadIdx.y is the same, whole warps, so many.
void team_barrier(int threads, Site site);

// Waits for the lanes of `mask`; the last one to arrive calls `complete` with the `mine` of each.
void meet(unsigned mask, const char* function, Site site, void* mine,
          void (*complete)(void* const* lanes, unsigned mask));
void sync_warp(unsigned mask, Site site);
int lane();

// One access of the running thread that the compiler's hooks do not see.
enum class Access { read, write, atomic };
void touch(const void* address, std::size_t bytes, Access access, const char* what);

void copy_async(void* shared, const void* global, int bytes, int valid_bytes);
void commit_async();
void wait_async(int groups_left);

// ldmatrix: this lane's part of `count` matrices of 8 x 8 16-bit elements.
void load_matrices(std::uint32_t* matrix, int count, bool transposed, const void* row, Site site);

// d += a * b for one warp; Product holds a lane's registers.
struct Product {
    float* d;
    const std::uint32_t *a, *b;
};
enum class Element { tf32, bf16, fp16 };
void multiply(Element element, Product lane, Site site);

[[noreturn]] void fail(const char* kind, const char* message);

// Calls a kernel with a copy of its parameters for each thread, as the hardware does.
template <typename... Parameters>
struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> parameters;

    ZF_SIMT_HARDWARE static void run(void* self) {
        auto* call = static_cast<Call*>(self);
        std::apply(call->kernel, call->parameters);
    }
};

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes,
            Arguments... arguments) {
    Call<Parameters...> call{kernel, {static_cast<Parameters>(arguments)...}};
    launch(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes,
           &Call<Parameters...>::run, &call, sizeof call);
}

}  // namespace simt

// ---- barriers

inline void __syncthreads(ZF_SIMT_SITE) { simt::barrier("__syncthreads", 0, {file, line}); }
inline int __syncthreads_count(int predicate, ZF_SIMT_SITE) {
    return simt::barrier("__syncthreads_count", predicate, {file, line}).count;
}
inline int __syncthreads_or(int predicate, ZF_SIMT_SITE) {
    return simt::barrier("__syncthreads_or", predicate, {file, line}).count > 0;
}
inline int __syncthreads_and(int predicate, ZF_SIMT_SITE) {
    const simt::Votes votes = simt::barrier("__syncthreads_and", predicate, {file, line});
    return votes.count == votes.threads;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, ZF_SIMT_SITE) {
    simt::sync_warp(mask, {file, line});
}
inline void __threadfence() {}
inline void __threadfence_block() {}

// ---- warp operations

namespace simt {

struct Shuffle {
    std::uint64_t value;
    int source;  // lane to read; its own where the exchange leaves the segment
    std::uint64_t result;
};
void shuffle(unsigned mask, const char* function, Site site, Shuffle& mine);

struct Vote {
    bool predicate;
    unsigned ballot;
};
unsigned vote(unsigned mask, const char* function, Site site, bool predicate);

template <typename T>
ZF_SIMT_HARDWARE T shuffle(unsigned mask, const char* function, Site site, T value, int source) {
    static_assert(sizeof(T) <= 8, "shuffles move at most 8 bytes");
    Shuffle mine{0, source, 0};
    std::memcpy(&mine.value, &value, sizeof value);
    shuffle(mask, function, site, mine);
    std::memcpy(&value, &mine.result, sizeof value);
    return value;
}

}  // namespace simt

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, ZF_SIMT_SITE) {
    const int first = simt::lane() & -width;
    return simt::shuffle(mask, "__shfl_sync", {file, line}, value, first + (source & (width - 1)));
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, ZF_SIMT_SITE) {
    const int lane = simt::lane(), from = lane - int(delta);
    return simt::shuffle(mask, "__shfl_up_sync", {file, line}, value,
                         from >= (lane & -width) ? from : lane);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, ZF_SIMT_SITE) {
    const int lane = simt::lane(), from = lane + int(delta);
    return simt::shuffle(mask, "__shfl_down_sync", {file, line}, value,
                         from < (lane & -width) + width ? from : lane);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int other, int width = 32, ZF_SIMT_SITE) {
    const int lane = simt::lane(), from = lane ^ other;
    return simt::shuffle(mask, "__shfl_xor_sync", {file, line}, value,
                         from < (lane & -width) + width ? from : lane);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, ZF_SIMT_SITE) {
    return simt::vote(mask, "__ballot_sync", {file, line}, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate, ZF_SIMT_SITE) {
    return simt::vote(mask, "__any_sync", {file, line}, predicate != 0) != 0;
}
inline int __all_sync(unsigned mask, int predicate, ZF_SIMT_SITE) {
    return simt::vote(mask, "__all_sync", {file, line}, predicate != 0) == mask;
}

// ---- atomics

namespace simt {

template <typename T, typename Change>
ZF_SIMT_HARDWARE T atomic(T* address, Change change, const char* what) {
    touch(address, sizeof(T), Access::atomic, what);
    const T old = *address;
    *address = change(old);
    return old;
}

}  // namespace simt

template <typename T>
T atomicAdd(T* address, T value) {
    return simt::atomic(address, [=](T old) { return T(old + value); }, "atomicAdd");
}
template <typename T>
T atomicMin(T* address, T value) {
    return simt::atomic(address, [=](T old) { return std::min(old, value); }, "atomicMin");
}
template <typename T>
T atomicMax(T* address, T value) {
    return simt::atomic(address, [=](T old) { return std::max(old, value); }, "atomicMax");
}
template <typename T>
T atomicExch(T* address, T value) {
    return simt::atomic(address, [=](T) { return value; }, "atomicExch");
}
template <typename T>
T atomicCAS(T* address, T compare, T value) {
    return simt::atomic(address, [=](T old) { return old == compare ? value : old; }, "atomicCAS");
}

// ---- intrinsics

template <typename T>
T __ldg(const T* address) {
    return *address;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline std::uint32_t __float_as_uint(float x) { return __builtin_bit_cast(std::uint32_t, x); }
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline float __uint_as_float(std::uint32_t x) { return __builtin_bit_cast(float, x); }
inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
using std::isfinite;
using std::isinf;
using std::isnan;
using std::max;
using std::min;
