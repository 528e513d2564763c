// cp.async: a copy that happens when it is waited for, and whose target is poison until then.
#include "runtime.h"

namespace simt {

void copy_async(void* shared, const void* global, int bytes, int valid_bytes) {
    const void* pc = __builtin_return_address(0);
    const auto target = std::uintptr_t(shared), source = std::uintptr_t(global);
    if (target % bytes || source % bytes)
        fail_at(pc, "misaligned access", "an asynchronous copy of %d bytes from %#zx to %#zx",
                bytes, std::size_t(source), std::size_t(target));
    if (valid_bytes < 0 || valid_bytes > bytes)
        fail_at(pc, "asynchronous copy", "%d valid bytes of %d", valid_bytes, bytes);
    if (!in_shared(target))
        fail_at(pc, "out of bounds", "the target of an asynchronous copy, %#zx, is not shared",
                std::size_t(target));
    if (recording_banks) record_bank(target, bytes, true, pc);
    if (kChecked) {
        if (valid_bytes > 0) check_global(source, valid_bytes, Access::read, pc);
        check_shared(target, bytes, Access::write, pc);
        mark_pending(arena_shadow, target, bytes, true, pc);
        std::memset(shared, 0xff, bytes);
    }
    async_queue().open.push_back(
        {static_cast<char*>(shared), static_cast<const char*>(global), bytes, valid_bytes, pc});
}

void commit_async() {
    AsyncQueue& queue = async_queue();
    queue.groups.push_back(std::move(queue.open));
    queue.open.clear();
}

// The copies of a retired group count as written by this thread, now.
void wait_async(int groups_left) {
    const void* pc = __builtin_return_address(0);
    auto& groups = async_queue().groups;
    while (int(groups.size()) > groups_left) {
        for (const AsyncCopy& copy : groups.front()) {
            std::memcpy(copy.target, copy.source, copy.valid);
            std::memset(copy.target + copy.valid, 0, copy.bytes - copy.valid);
            if (kChecked)
                mark_pending(arena_shadow, std::uintptr_t(copy.target), copy.bytes, false, pc);
        }
        groups.erase(groups.begin());
    }
}

}  // namespace simt
