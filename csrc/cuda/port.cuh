// The port header: the only place with inline PTX, and the only one that knows whether a kernel
// is compiled by nvcc for a GPU or by g++ for the SIMT emulator (ZF_SIMT, tests/simt). Kernels
// stay ordinary CUDA, but for three things that go through this header:
//
//   ZF_SHARED(float, tile, 64 * 17);       a static shared array, float tile[64 * 17]
//   ZF_DYNAMIC_SHARED(float, buffer);      the dynamic shared memory, float* buffer
//   launch(kernel, grid, block, shared_bytes, exec, arguments...);
//
// and the wrappers below, each with an emulated body beside it.
#pragma once

#include <stdexcept>
#include <string>

#include "../ops.h"

#if defined(ZF_SIMT)
#include "simt.h"
#else
#include <cuda_runtime.h>

#define ZF_SHARED(type, name, count) __shared__ type name[count]
#define ZF_DYNAMIC_SHARED(type, name)                      \
    extern __shared__ __align__(16) unsigned char zf_dynamic_shared[]; \
    type* const name = reinterpret_cast<type*>(zf_dynamic_shared)

namespace zfcuda {

inline void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess)
        throw std::runtime_error(std::string("zfcuda: ") + what + ": " + cudaGetErrorString(status));
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

}  // namespace zfcuda
#endif
