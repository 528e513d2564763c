// Bank conflicts: how often shared memory must be read or written for the accesses of a warp.
//
// Shared memory has 32 banks of one word. It serves a warp's accesses of up to 4 bytes at once, of
// 8 bytes a half of the warp at a time, of 16 bytes (ldmatrix and cp.async too) a quarter, and
// takes as many passes for each part as the most wanted bank has different words to give.
//
// What the lanes of a warp access at the same place in the code, each for the n-th time since the
// last barrier, counts as one instruction. Lanes that go round a loop unequally often between two
// barriers are so put together wrongly, which can only add conflicts of one instruction to another.
#include <array>
#include <map>
#include <unordered_map>

#include "runtime.h"

namespace simt {

bool recording_banks = false;

namespace {

struct Spot {
    const void* kernel;
    std::uint32_t pc;
    bool write;

    bool operator<(const Spot& other) const {
        return std::tie(kernel, pc, write) < std::tie(other.kernel, other.pc, other.write);
    }
};
struct Totals {
    unsigned bytes = 0;  // of a lane, at most
    std::uint64_t instructions = 0, passes = 0, least = 0, worst = 0;
};
std::map<Spot, Totals> totals;

// One instruction of a warp so far.
struct Group {
    unsigned mask = 0, bytes = 0;
    std::array<std::uint32_t, 32> at;
};
using Key = std::tuple<std::uint32_t, bool, unsigned, unsigned>;  // pc, write, warp, n
std::map<Key, Group> groups;
std::map<std::tuple<std::uint32_t, bool, unsigned>, unsigned> visits;  // by pc and thread

// The last access of each thread, to which its next may belong: compilers split wide accesses.
struct Last {
    std::uint32_t begin = 0, end = 0, pc = 0;
    bool write = false;
    Group* group = nullptr;
};
std::array<Last, kMaxThreads> last;

// The line of the source, and whence it was inlined, as a number.
std::size_t line_of(std::uint32_t pc) {
    static std::unordered_map<std::uint32_t, std::size_t> known;
    const auto found = known.find(pc);
    if (found != known.end()) return found->second;
    return known[pc] = std::hash<std::string>()(where(pc));
}

void count(const Spot& spot, const Group& group) {
    const unsigned lanes = group.bytes > 8 ? 8 : group.bytes > 4 ? 16 : 32;
    std::uint64_t passes = 0, least = 0;
    for (unsigned first = 0; first < 32; first += lanes) {
        std::array<std::vector<std::uint32_t>, 32> banks;  // the different words of each
        std::size_t most = 0;
        for (unsigned lane = first; lane < first + lanes; ++lane) {
            if (!(group.mask >> lane & 1)) continue;
            const std::uint32_t end = group.at[lane] + group.bytes;
            for (std::uint32_t word = group.at[lane] / 4; word * 4 < end; ++word) {
                auto& bank = banks[word % 32];
                if (std::find(bank.begin(), bank.end(), word) == bank.end()) bank.push_back(word);
                most = std::max(most, bank.size());
            }
        }
        passes += most;
        least += most > 0;
    }
    Totals& sum = totals[spot];
    sum.bytes = std::max(sum.bytes, group.bytes);
    ++sum.instructions;
    sum.passes += passes;
    sum.least += least;
    sum.worst = std::max(sum.worst, passes - least);
}

}  // namespace

void record_bank(std::uintptr_t address, unsigned bytes, bool write, const void* code) {
    const std::uint32_t pc = code_offset(code);
    const auto begin = std::uint32_t(address - std::uintptr_t(arena));
    const unsigned thread = now.stamp.thread(), lane = thread % 32;
    Last& before = last[thread];
    if (before.group && before.write == write && before.end == begin && before.pc != pc &&
        before.begin / 16 == (begin + bytes - 1) / 16 && line_of(before.pc) == line_of(pc)) {
        before.end = begin + bytes;
        before.pc = pc;
        before.group->bytes = std::max(before.group->bytes, before.end - before.begin);
        return;
    }
    const unsigned n = visits[{pc, write, thread}]++;
    Group& group = groups[{pc, write, thread / 32, n}];
    group.mask |= 1u << lane;
    group.bytes = std::max(group.bytes, bytes);
    group.at[lane] = begin;
    before = {begin, begin + bytes, pc, write, &group};
}

void finish_banks(const void* kernel, int first_warp, int warps) {
    const auto meant = [&](unsigned warp) { return warp - unsigned(first_warp) < unsigned(warps); };
    for (auto at = groups.begin(); at != groups.end();) {
        const auto& [pc, write, warp, n] = at->first;
        if (meant(warp)) count({kernel, pc, write}, at->second);
        at = meant(warp) ? groups.erase(at) : std::next(at);
    }
    for (auto at = visits.begin(); at != visits.end();)
        at = meant(std::get<2>(at->first) / 32) ? visits.erase(at) : std::next(at);
    std::fill_n(last.begin() + 32 * first_warp, 32 * warps, Last{});
}

}  // namespace simt

extern "C" __attribute__((visibility("default"))) void zf_simt_record_banks(int on) {
    simt::recording_banks = on != 0;
    simt::totals.clear();
}

// A line for each place: kernel, "read" or "write", bytes of a lane, instructions, passes, least
// passes, the most too many of one instruction, where; between tabs.
extern "C" __attribute__((visibility("default"))) const char* zf_simt_banks() {
    static std::string report;
    report.clear();
    for (const auto& [spot, sum] : simt::totals)
        report += simt::function_at(spot.kernel) +
                  simt::text("\t%s\t%u\t%zu\t%zu\t%zu\t%zu\t", spot.write ? "write" : "read",
                             sum.bytes, std::size_t(sum.instructions), std::size_t(sum.passes),
                             std::size_t(sum.least), std::size_t(sum.worst)) +
                  simt::where(spot.pc) + "\n";
    return report.c_str();
}
