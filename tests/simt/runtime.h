// The inside of the emulator: what its own files share.
#pragma once

#include <algorithm>
#include <cstdarg>
#include <string>
#include <vector>

#include "simt.h"

#pragma GCC visibility push(hidden)

namespace simt {

#if defined(ZF_SIMT_FAST)
constexpr bool kChecked = false;  // compiled without the hooks: no shadow, no registry
#else
constexpr bool kChecked = true;
#endif

// ---- settings and errors (report.cpp)

struct Settings {
    int order = 0;  // of threads and of blocks: 0 forward, 1 reverse, 2 shuffled with `seed`
    std::uint64_t seed = 0;
    int preempt = 0;  // yield after about so many checked accesses; 0 never
    int arch = 86;
    int processors = 132;  // those of an H100
};
extern Settings settings;

// Stops the launch with an error of the running thread. `pc` is where in the kernel, if known.
[[noreturn]] void fail_at(const void* pc, const char* kind, const char* format, ...)
    __attribute__((format(printf, 3, 4)));
[[noreturn]] void stop(std::string error);  // (scheduler.cpp) the end of all failures
std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string text(const char* format, va_list arguments);
std::string where(const void* pc);  // "file:line", and whence, where it was inlined
std::string where(std::uint32_t code_offset);
std::string function_at(const void* start);
extern const char* const code_base;
inline std::uint32_t code_offset(const void* pc) {  // a pc in 32 bits, for the shadow
    return std::uint32_t(static_cast<const char*>(pc) - code_base);
}

// ---- fibers (fibers.cpp)

constexpr std::size_t kStackBytes = 64 * 1024;
constexpr int kMaxThreads = 1024;
extern char* stacks;  // kMaxThreads of them

struct Fiber {
    void* context = nullptr;
    void start(int index, void (*entry)());
    bool overflowed(int index) const;
};
void resume(Fiber& fiber);   // called by the scheduler
void suspend(Fiber& fiber);  // called by the fiber: back to the scheduler

// ---- the moment of an access (scheduler.cpp, shadow.cpp)

// Who accessed, where in the code, and when. `run` numbers blocks over all launches (1 stands for
// the host), `key` is block epoch (24 bits), warp epoch (23), thread (10), flags (7). A block's
// epoch is how many barriers its teams have passed.
struct Stamp {
    std::uint32_t run, pc;
    std::uint64_t key;

    static std::uint64_t key_of(std::uint64_t epoch, std::uint64_t warp_epoch, int thread) {
        return epoch << 40 | warp_epoch << 17 | std::uint64_t(thread) << 7;
    }
    std::uint64_t epoch() const { return key >> 40; }
    std::uint32_t warp_epoch() const { return key >> 17 & 0x7fffff; }
    unsigned thread() const { return key >> 7 & 0x3ff; }
};
enum Flag : std::uint64_t {
    kPending = 1,     // the target of an asynchronous copy in flight
    kAtomic = 2,      // the last write was atomic
    kManyWarp = 4,    // several unordered accesses of one warp,
    kManyTeam = 8,    // of several warps of a team,
    kManyBlock = 16,  // of several teams,
    kManyGrid = 32,   // of several blocks
    kSplit = 64,      // of a word: its four bytes have their own history
};

// The threads of a block with the same threadIdx.y, whole warps where there are several: the epochs
// that began with its last barrier, and with the last one of the whole block. What happened before
// in the team, or in the block, is ordered before what it does now.
struct TeamClock {
    std::uint64_t synced, all_synced;
};

// The order of events within one warp: every __syncwarp advances `epoch`, and synced[i][j] is the
// epoch that began with the last one that had both lanes.
struct WarpClock {
    std::uint32_t epoch;
    std::uint32_t synced[32][32];
    std::uint32_t all_synced;  // the same for a __syncwarp of the whole warp
};

struct Moment {
    bool in_kernel = false;
    std::uint32_t first_run = 2;  // of this launch
    Stamp stamp = {1, 0, 0};      // of the running thread; pc is filled in by each access
    const WarpClock* warp = nullptr;
    TeamClock team = {};
    int team_threads = 0;
    std::uint64_t many = kManyTeam;  // set in the stamp of all threads' reads
    int countdown = 0;               // accesses until the next preemption
};
extern Moment now;
void yield();
std::string thread_name(const Stamp& stamp);

// ---- memory (shadow.cpp, shared.cpp, global.cpp)

// History of one word or byte. A shared byte is initialised if it was written in this run.
struct Cell {
    Stamp write, read;
};

// The shadow of a range: a cell for each word, and on demand one for each byte.
struct Shadow {
    std::uintptr_t base = 0;  // of the first word
    std::size_t bytes = 0;
    Cell* words = nullptr;
    Cell* singles = nullptr;

    void map(std::uintptr_t begin, std::uintptr_t end);
    void unmap();
};

// The common cases of shared memory, before anything else is asked: whole words that this block has
// written (so they lie in an array), before its last barrier. False where there is more to check.
inline bool quick_read(const Shadow& shadow, std::size_t offset, unsigned bytes) {
    if ((offset | bytes) % 4) return false;
    const std::uint64_t epoch = now.stamp.epoch();
    for (const Cell *cell = shadow.words + offset / 4, *end = cell + bytes / 4; cell < end; ++cell)
        if (cell->write.run != now.stamp.run || cell->write.epoch() >= now.team.all_synced ||
            cell->write.key & (kPending | kSplit) || cell->read.run != now.stamp.run ||
            cell->read.epoch() != epoch || !(cell->read.key & now.many))
            return false;  // unless all are said to have read it, the reader is to be noted
    return true;
}
inline bool quick_write(const Shadow& shadow, std::size_t offset, unsigned bytes, const void* pc) {
    if ((offset | bytes) % 4) return false;
    const std::uint64_t epoch = now.team.all_synced;
    Cell *const first = shadow.words + offset / 4, *const end = first + bytes / 4;
    for (const Cell* cell = first; cell < end; ++cell)
        if (cell->write.run != now.stamp.run || cell->write.epoch() >= epoch ||
            cell->write.key & (kPending | kSplit) ||
            (cell->read.run == now.stamp.run && cell->read.epoch() >= epoch))
            return false;
    const Stamp fresh = {now.stamp.run, code_offset(pc), now.stamp.key};
    for (Cell* cell = first; cell < end; ++cell) cell->write = fresh;
    return true;
}

enum class Space { shared, global };
template <Space space>
void check_history(Shadow& shadow, std::uintptr_t address, unsigned bytes, Access access,
                   const void* pc);
void mark_pending(Shadow& shadow, std::uintptr_t address, unsigned bytes, bool pending,
                  const void* pc);

constexpr std::size_t kArenaBytes = 512 * 1024;  // the largest shared memory, and gaps
extern char* arena;
extern Shadow arena_shadow;
void begin_shared(std::size_t dynamic_bytes);  // for a launch
void fill_shared();                            // for a block
inline bool in_shared(std::uintptr_t address) {
    return address - std::uintptr_t(arena) < kArenaBytes;
}
void check_shared(std::uintptr_t address, unsigned bytes, Access access, const void* pc);
void check_shared_bounds(std::uintptr_t address, unsigned bytes, const void* pc);
std::size_t static_shared_bytes();

void check_global(std::uintptr_t address, unsigned bytes, Access access, const void* pc);
void set_parameters(const void* begin, std::size_t bytes);  // of the kernel: readable by all

// Routes an access to the right shadow; the hooks and `touch` end here.
void check_access(std::uintptr_t address, unsigned bytes, Access access, const void* pc);

// ---- asynchronous copies (async.cpp)

struct AsyncCopy {
    char* target;
    const char* source;
    int bytes, valid;
    const void* pc;
};
struct AsyncQueue {
    std::vector<std::vector<AsyncCopy>> groups;  // committed, oldest first
    std::vector<AsyncCopy> open;
    const AsyncCopy* in_flight() const {  // one of them; a group may be empty
        for (const auto& group : groups)
            if (!group.empty()) return &group[0];
        return open.empty() ? nullptr : &open[0];
    }
};
AsyncQueue& async_queue();  // of the running thread

// ---- bank conflicts (banks.cpp)

extern bool recording_banks;
void record_bank(std::uintptr_t address, unsigned bytes, bool write, const void* pc);
// At a barrier of these warps, and at the end of a block.
void finish_banks(const void* kernel, int first_warp, int warps);

// ---- launches (validate.cpp)

void validate_launch(const void* kernel, dim3 grid, dim3 block, std::size_t dynamic_bytes);
void validate_shared(std::size_t static_bytes, std::size_t dynamic_bytes);

}  // namespace simt

#pragma GCC visibility pop
