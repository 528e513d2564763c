// Global memory: the registry of the tensors that a call may touch, with their exact bounds.
#include <algorithm>

#include "runtime.h"

namespace simt {
namespace {

struct Region {
    std::uintptr_t begin, end;
    bool read_only;
    std::string name;
    Shadow shadow;  // of writable regions

    bool holds(std::uintptr_t address, unsigned bytes) const {
        return address >= begin && address + bytes <= end;
    }
};
std::vector<Region> regions;
std::uintptr_t parameters_begin, parameters_end;

[[noreturn]] void out_of_bounds(std::uintptr_t address, unsigned bytes, const void* pc) {
    const Region* nearest = nullptr;
    std::uintptr_t least = ~std::uintptr_t(0);
    for (const Region& region : regions) {
        const std::uintptr_t distance = address < region.begin
                                            ? region.begin - address
                                            : std::max(address + bytes, region.end) - region.end;
        if (distance < least) least = distance, nearest = &region;
    }
    if (!nearest || least > 1 << 20)
        fail_at(pc, "out of bounds", "%u bytes at %#zx, which is in no tensor of this call", bytes,
                std::size_t(address));
    fail_at(pc, "out of bounds", "%u bytes at byte %zd of %s, which has %zu", bytes,
            std::ptrdiff_t(address - nearest->begin), nearest->name.c_str(),
            std::size_t(nearest->end - nearest->begin));
}

Region& find(std::uintptr_t address, unsigned bytes, const void* pc) {
    static std::size_t recent;
    if (recent < regions.size() && regions[recent].holds(address, bytes)) return regions[recent];
    for (std::size_t i = 0; i < regions.size(); ++i)
        if (regions[i].holds(address, bytes)) return regions[recent = i];
    out_of_bounds(address, bytes, pc);
}

}  // namespace

void set_parameters(const void* begin, std::size_t bytes) {
    parameters_begin = std::uintptr_t(begin);
    parameters_end = parameters_begin + bytes;
}

void check_global(std::uintptr_t address, unsigned bytes, Access access, const void* pc) {
    if (address >= parameters_begin && address < parameters_end) return;
    Region& region = find(address, bytes, pc);
    if (region.read_only) {
        if (access != Access::read)
            fail_at(pc, "write to an input", "%u bytes at byte %zu of %s", bytes,
                    std::size_t(address - region.begin), region.name.c_str());
        return;
    }
    check_history<Space::global>(region.shadow, address, bytes, access, pc);
}

// For the tests: registers [address, address + bytes) for the launches to come. What is writable
// holds nothing yet, unless it is to be updated: then the host has written it.
extern "C" __attribute__((visibility("default"))) void zf_simt_register(std::uintptr_t address,
                                                                        std::size_t bytes,
                                                                        int writable, int updated,
                                                                        const char* name) {
    Region region{address, address + bytes, !writable, name, {}};
    if (kChecked && writable && bytes > 0) {
        region.shadow.map(region.begin, region.end);
        for (std::size_t i = 0; updated && i < region.shadow.bytes / 4; ++i)
            region.shadow.words[i].write.run = 1;
    }
    regions.push_back(std::move(region));
}

extern "C" __attribute__((visibility("default"))) void zf_simt_forget() {
    for (Region& region : regions)
        if (region.shadow.words) region.shadow.unmap();
    regions.clear();
}

// The first byte of a registered output that no thread has written, or -1.
extern "C" __attribute__((visibility("default"))) std::int64_t zf_simt_unwritten(
    std::uintptr_t address) {
    if (!kChecked) return -1;
    for (const Region& region : regions) {
        if (region.begin != address || region.read_only) continue;
        const Shadow& shadow = region.shadow;
        for (std::uintptr_t at = region.begin; at < region.end; ++at) {
            const Cell& word = shadow.words[(at - shadow.base) / 4];
            const Cell& cell = word.write.key & kSplit ? shadow.singles[at - shadow.base] : word;
            if (cell.write.run == 0) return std::int64_t(at - region.begin);
        }
    }
    return -1;
}

}  // namespace simt
