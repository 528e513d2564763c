// The calls that g++ -fsanitize=thread,alignment plants at every access of a kernel. The
// sanitizers' own runtimes are not linked: these are all there is.
#include "runtime.h"

namespace simt {

void check_access(std::uintptr_t address, unsigned bytes, Access access, const void* pc) {
    if (address - std::uintptr_t(stacks) < kStackBytes * kMaxThreads) return;  // local memory
    if (now.countdown > 0 && --now.countdown == 0) yield();
    if (in_shared(address)) return check_shared(address, bytes, access, pc);
    check_global(address, bytes, access, pc);
}

void touch(const void* address, std::size_t bytes, Access access, const char* what) {
    const void* pc = __builtin_return_address(0);
    if (std::uintptr_t(address) % (bytes & -bytes))
        fail_at(pc, "misaligned access", "%s of %zu bytes at %p", what, bytes, address);
    if (kChecked) check_access(std::uintptr_t(address), unsigned(bytes), access, pc);
}

namespace {
inline void hook(const void* pointer, std::size_t bytes, Access access, const void* pc) {
    if (!now.in_kernel) return;
    const auto address = std::uintptr_t(pointer);
    if (recording_banks && in_shared(address))
        for (std::size_t i = 0; i < bytes; i += 16)
            record_bank(address + i, unsigned(std::min<std::size_t>(bytes - i, 16)),
                        access != Access::read, pc);
    const std::size_t offset = address - arena_shadow.base;
    if (offset < kArenaBytes && now.countdown == 0) {
        if (access == Access::read ? quick_read(arena_shadow, offset, unsigned(bytes))
                                   : quick_write(arena_shadow, offset, unsigned(bytes), pc))
            return;
    }
    check_access(address, unsigned(bytes), access, pc);
}
}  // namespace
}  // namespace simt

using simt::Access;

#define ZF_SIMT_HOOK(name, bytes, access)                                \
    extern "C" void __tsan_##name(void* address) {                       \
        simt::hook(address, bytes, access, __builtin_return_address(0)); \
    }
#define ZF_SIMT_HOOKS(bytes)                                 \
    ZF_SIMT_HOOK(read##bytes, bytes, Access::read)           \
    ZF_SIMT_HOOK(write##bytes, bytes, Access::write)         \
    ZF_SIMT_HOOK(unaligned_read##bytes, bytes, Access::read) \
    ZF_SIMT_HOOK(unaligned_write##bytes, bytes, Access::write)
ZF_SIMT_HOOKS(1)
ZF_SIMT_HOOKS(2)
ZF_SIMT_HOOKS(4)
ZF_SIMT_HOOKS(8)
ZF_SIMT_HOOKS(16)

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_read_range(void* address, std::size_t bytes) {
    simt::hook(address, bytes, Access::read, __builtin_return_address(0));
}
void __tsan_write_range(void* address, std::size_t bytes) {
    simt::hook(address, bytes, Access::write, __builtin_return_address(0));
}

// The guard of a static local variable of the host code.
char __tsan_atomic8_load(const volatile char* address, int) { return *address; }

// What UBSan passes for a misaligned access (its ABI, version 1).
struct TypeMismatch {
    struct {
        const char* file;
        std::uint32_t line, column;
    } location;
    const void* type;
    unsigned char log_alignment, kind;
};
void __ubsan_handle_type_mismatch_v1(TypeMismatch* data, void* address) {
    simt::fail("misaligned access",
               simt::text("%p is not aligned to %d bytes\n  at %s:%u", address,
                          1 << data->log_alignment, data->location.file, data->location.line)
                   .c_str());
}

}  // extern "C"
