// Fibers: a GPU thread is a stack and a saved stack pointer.
#include <sys/mman.h>

#include <new>

#include "runtime.h"

#if defined(__x86_64__)
// Saves the callee-saved registers on the old stack, its pointer in *from, and loads those of `to`.
extern "C" void zf_simt_switch(void** from, void* to);
asm(R"(
.text
.hidden zf_simt_switch
.globl zf_simt_switch
.type zf_simt_switch, @function
zf_simt_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size zf_simt_switch, . - zf_simt_switch
)");
#else
#include <ucontext.h>
#endif

namespace simt {
namespace {

constexpr std::uint64_t kCanary = 0x5a464e6574313321;

char* map_stacks() {
    void* memory = mmap(nullptr, kStackBytes * kMaxThreads, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    return static_cast<char*>(memory);
}

}  // namespace

char* stacks = map_stacks();

bool Fiber::overflowed(int index) const {
    return *reinterpret_cast<std::uint64_t*>(stacks + index * kStackBytes) != kCanary;
}

#if defined(__x86_64__)

static void* scheduler_context;

void Fiber::start(int index, void (*entry)()) {
    char* bottom = stacks + index * kStackBytes;
    *reinterpret_cast<std::uint64_t*>(bottom) = kCanary;
    auto** top = reinterpret_cast<void**>(bottom + kStackBytes);
    *--top = nullptr;  // the entry's return address: it never returns
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    context = top;
}

void resume(Fiber& fiber) { zf_simt_switch(&scheduler_context, fiber.context); }
void suspend(Fiber& fiber) { zf_simt_switch(&fiber.context, scheduler_context); }

#else

static ucontext_t scheduler_context, contexts[kMaxThreads];

void Fiber::start(int index, void (*entry)()) {
    char* bottom = stacks + index * kStackBytes;
    *reinterpret_cast<std::uint64_t*>(bottom) = kCanary;
    ucontext_t& fresh = contexts[index];
    getcontext(&fresh);
    fresh.uc_stack.ss_sp = bottom;
    fresh.uc_stack.ss_size = kStackBytes;
    makecontext(&fresh, entry, 0);
    context = &fresh;
}

void resume(Fiber& fiber) {
    swapcontext(&scheduler_context, static_cast<ucontext_t*>(fiber.context));
}
void suspend(Fiber& fiber) {
    swapcontext(static_cast<ucontext_t*>(fiber.context), &scheduler_context);
}

#endif
}  // namespace simt
