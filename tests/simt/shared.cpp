// Shared memory: one arena, the arrays in it with gaps between them, their bounds.
#include <sys/mman.h>

#include <new>

#include "runtime.h"

namespace simt {
namespace {

constexpr std::size_t kGap = 256;  // nothing lies between two arrays, so overruns are seen

struct Array {
    const void* key;
    const char* name;
    std::uintptr_t begin, end;
};
std::vector<Array> arrays;  // of this launch
std::size_t used, dynamic_bytes, static_bytes;

char* map_arena() {
    void* memory = mmap(nullptr, kArenaBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    return static_cast<char*>(memory);
}

void* add(const void* key, const char* name, std::size_t bytes) {
    char* begin = arena + used + kGap;
    used = (used + kGap + bytes + 127) & ~std::size_t(127);
    if (used > kArenaBytes) fail("shared memory", "more than the emulator's arena");
    std::memset(begin, 0xff, bytes);
    arrays.push_back({key, name, std::uintptr_t(begin), std::uintptr_t(begin) + bytes});
    return begin;
}

}  // namespace

char* arena = map_arena();
Shadow arena_shadow = [] {
    Shadow shadow;
    shadow.map(std::uintptr_t(arena), std::uintptr_t(arena) + kArenaBytes);
    return shadow;
}();

void begin_shared(std::size_t bytes) {
    arrays.clear();
    used = static_bytes = 0;
    dynamic_bytes = bytes;
    add(&dynamic_bytes, "dynamic shared memory", bytes);
}

// Starts each block with NaNs, so that a value left by the last block cannot pass for right.
void fill_shared() {
    for (const Array& array : arrays)
        std::memset(reinterpret_cast<void*>(array.begin), 0xff, array.end - array.begin);
}

void* dynamic_shared() { return reinterpret_cast<void*>(arrays[0].begin); }

void* shared_array(const void* key, const char* name, std::size_t bytes) {
    for (const Array& array : arrays)
        if (array.key == key) return reinterpret_cast<void*>(array.begin);
    static_bytes += bytes;
    validate_shared(static_bytes, dynamic_bytes);
    return add(key, name, bytes);
}

void check_shared_bounds(std::uintptr_t address, unsigned bytes, const void* pc) {
    const Array* nearest = nullptr;
    for (const Array& array : arrays) {
        if (address >= array.begin && address + bytes <= array.end) return;
        if (address >= array.begin && (!nearest || array.begin > nearest->begin)) nearest = &array;
    }
    if (!nearest) nearest = &arrays[0];
    fail_at(pc, "out of bounds", "%u bytes at byte %zd of %s, which has %zu", bytes,
            std::ptrdiff_t(address - nearest->begin), nearest->name,
            std::size_t(nearest->end - nearest->begin));
}

void check_shared(std::uintptr_t address, unsigned bytes, Access access, const void* pc) {
    static std::size_t recent;  // index of the array that the last access was in
    if (recent >= arrays.size() || address < arrays[recent].begin ||
        address + bytes > arrays[recent].end) {
        check_shared_bounds(address, bytes, pc);
        for (recent = 0; address < arrays[recent].begin || address >= arrays[recent].end;) ++recent;
    }
    check_history<Space::shared>(arena_shadow, address, bytes, access, pc);
}

}  // namespace simt
