// Which architectures these sources were compiled for, and what this machine has.
#include "port.cuh"

#if !defined(ZF_CUDA_TARGETS)
#error "the build names the architectures in ZF_CUDA_TARGETS"
#endif

namespace zfcuda {

std::string target() { return ZF_CUDA_TARGETS; }

std::string machine() {
    int driver = 0, runtime = 0, count = 0;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    if (cudaGetDeviceCount(&count) != cudaSuccess) {
        count = 0;
        cudaGetLastError();  // no driver or no GPU is an answer here, not an error to leave behind
    }
    std::string facts = "driver " + std::to_string(driver) + "\nruntime " + std::to_string(runtime);
    for (int i = 0; i < count; ++i) {
        cudaDeviceProp properties;
        if (cudaGetDeviceProperties(&properties, i) != cudaSuccess) continue;
        facts += std::string("\ndevice ") + properties.name + "|sm_" +
                 std::to_string(properties.major * 10 + properties.minor) + "|" +
                 std::to_string(properties.totalGlobalMem);
    }
    return facts;
}

}  // namespace zfcuda
