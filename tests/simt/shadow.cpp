// The shadow: for each word (or byte, where bytes differ) the last write and the last reads, and
// the rule by which two accesses are ordered.
//
// A word keeps one write and one read. An access that is ordered after the one kept replaces it
// (whatever is ordered after the new one is ordered after the old one); one that is not is merged:
// the stamp keeps its moment and is flagged as that of many threads of a warp, team, block or grid.
#include <sys/mman.h>

#include <new>

#include "runtime.h"

namespace simt {

namespace {

Cell* map_cells(std::size_t count) {
    void* memory = mmap(nullptr, count * sizeof(Cell), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    return static_cast<Cell*>(memory);
}

inline int team_of(const Stamp& stamp) { return int(stamp.thread()) / now.team_threads; }

// Is all that the stamp stands for ordered before the running thread's present?
template <Space space>
inline bool ordered(const Stamp& stamp) {
    if (space == Space::shared) {
        if (stamp.run != now.stamp.run) return true;  // another block's memory
    } else {
        if (stamp.run < now.first_run) return true;                             // an earlier launch
        if (stamp.run != now.stamp.run || stamp.key & kManyGrid) return false;  // another block
    }
    if (stamp.epoch() < now.team.all_synced) return true;
    if (stamp.key & kManyBlock) return false;
    if (team_of(stamp) == team_of(now.stamp) && stamp.epoch() < now.team.synced) return true;
    if (stamp.key & kManyTeam) return false;
    if (!(stamp.key & kManyWarp) && stamp.thread() == now.stamp.thread()) return true;
    if (stamp.thread() / 32 != now.stamp.thread() / 32) return false;
    if (stamp.key & kManyWarp) return stamp.warp_epoch() < now.warp->all_synced;
    return stamp.warp_epoch() < now.warp->synced[stamp.thread() % 32][now.stamp.thread() % 32];
}

inline Stamp stamp_now(const void* pc) { return {now.stamp.run, code_offset(pc), now.stamp.key}; }

template <Space space>
inline void merge(Stamp& stamp, const Stamp& fresh) {
    if (ordered<space>(stamp)) {
        stamp = fresh;
        return;
    }
    std::uint64_t many = stamp.key & (kManyWarp | kManyTeam | kManyBlock | kManyGrid);
    if (stamp.run != fresh.run)
        many |= kManyGrid;
    else if (team_of(stamp) != team_of(fresh))
        many |= kManyBlock;
    else if (stamp.thread() / 32 != fresh.thread() / 32)
        many |= kManyTeam;
    else
        many |= kManyWarp;
    stamp = fresh;
    stamp.key |= many;
}

[[noreturn]] void race(const char* kind, const Stamp& earlier, std::uintptr_t address,
                       const void* pc) {
    fail_at(pc, kind, "no barrier orders this access to %#zx after that of %s at %s",
            std::size_t(address), thread_name(earlier).c_str(), where(earlier.pc).c_str());
}

template <Space space>
inline void check_cell(Cell& cell, std::uintptr_t address, Access access, const void* pc) {
    if (cell.write.key & kPending && (space == Space::global || cell.write.run == now.stamp.run))
        fail_at(pc, "access to a pending asynchronous copy",
                "%#zx is the target of a copy issued by %s at %s that is not yet waited for",
                std::size_t(address), thread_name(cell.write).c_str(),
                where(cell.write.pc).c_str());
    const bool both_atomic = access == Access::atomic && cell.write.key & kAtomic;
    if (access != Access::write) {
        const bool written =
            space == Space::shared ? cell.write.run == now.stamp.run : cell.write.run != 0;
        if (!written)
            fail_at(pc, "uninitialised read", "of %#zx, which no thread has written",
                    std::size_t(address));
        if (!both_atomic && !ordered<space>(cell.write))
            race("read after write without order", cell.write, address, pc);
    }
    const Stamp fresh = stamp_now(pc);
    if (access == Access::read) return merge<space>(cell.read, fresh);
    if (!both_atomic && !ordered<space>(cell.write))
        race("write after write without order", cell.write, address, pc);
    if (!ordered<space>(cell.read)) race("write after read without order", cell.read, address, pc);
    if (access == Access::atomic) {
        merge<space>(cell.write, fresh);
        cell.write.key |= kAtomic;
    } else {
        cell.write = fresh;
    }
}

// The four byte cells of a word, made from the word's if it had no own ones.
inline Cell* split(Shadow& shadow, std::size_t word) {
    if (!shadow.singles) shadow.singles = map_cells(shadow.bytes);
    Cell* singles = shadow.singles + word * 4;
    Cell& cell = shadow.words[word];
    if (!(cell.write.key & kSplit)) {
        for (int i = 0; i < 4; ++i) singles[i] = cell;
        cell.write.key |= kSplit;
    }
    return singles;
}

}  // namespace

void Shadow::map(std::uintptr_t begin, std::uintptr_t end) {
    base = begin & ~std::uintptr_t(3);
    bytes = (end - base + 3) & ~std::size_t(3);
    words = map_cells(bytes / 4);
}

void Shadow::unmap() {
    munmap(words, bytes / 4 * sizeof(Cell));
    if (singles) munmap(singles, bytes * sizeof(Cell));
}

template <Space space>
void check_history(Shadow& shadow, std::uintptr_t address, unsigned bytes, Access access,
                   const void* pc) {
    std::size_t offset = address - shadow.base;
    const std::size_t end = offset + bytes;
    while (offset < end) {
        Cell& word = shadow.words[offset / 4];
        const bool whole = offset % 4 == 0 && offset + 4 <= end;
        if (whole && !(word.write.key & kSplit)) {
            check_cell<space>(word, shadow.base + offset, access, pc);
            offset += 4;
            continue;
        }
        Cell* singles = split(shadow, offset / 4);
        const std::size_t stop = std::min(end, (offset & ~std::size_t(3)) + 4);
        for (; offset < stop; ++offset)
            check_cell<space>(singles[offset % 4], shadow.base + offset, access, pc);
        if (whole && access == Access::write) word = singles[0];  // one history again
    }
}
template void check_history<Space::shared>(Shadow&, std::uintptr_t, unsigned, Access, const void*);
template void check_history<Space::global>(Shadow&, std::uintptr_t, unsigned, Access, const void*);

void mark_pending(Shadow& shadow, std::uintptr_t address, unsigned bytes, bool pending,
                  const void* pc) {
    for (unsigned i = 0; i < bytes; i += 4) {
        Stamp& write = shadow.words[(address - shadow.base + i) / 4].write;
        write = stamp_now(pc);
        if (pending) write.key |= kPending;
    }
}

}  // namespace simt
