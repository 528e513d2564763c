// The emulator's own part of the backend module: its identity, and its settings for the tests.
#include "../../csrc/ops.h"
#include "runtime.h"

#if defined(ZF_SIMT_BACKEND)
namespace zfcuda {

std::string target() { return "emulator"; }
std::string machine() { return "emulator"; }

}  // namespace zfcuda
#endif

extern "C"
    __attribute__((visibility("default"))) void zf_simt_configure(int order, std::uint64_t seed,
                                                                  int preempt, int arch,
                                                                  int processors) {
    simt::settings = {order, seed, preempt, arch, processors};
}

#if defined(ZF_SIMT_COVERAGE)
extern "C" void __gcov_dump();
extern "C" __attribute__((visibility("default"))) void zf_simt_dump_coverage() { __gcov_dump(); }
#endif
