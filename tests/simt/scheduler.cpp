// The scheduler: blocks one after the other, the threads of a block in turn, each until it next
// waits; barriers and the meetings of warps.
#include <algorithm>
#include <numeric>
#include <random>
#include <stdexcept>

#include "runtime.h"

// Read by the kernels under their CUDA names.
uint3 zf_simt_thread_idx asm("zf_simt_thread_idx"), zf_simt_block_idx asm("zf_simt_block_idx");
dim3 zf_simt_block_dim asm("zf_simt_block_dim"), zf_simt_grid_dim asm("zf_simt_grid_dim");

namespace simt {

Moment now;

namespace {

enum class Status { ready, at_barrier, meeting, exited };

struct Thread {
    Fiber fiber;
    Status status;
    uint3 index;
    const void* barrier;   // that it waits at
    const char* function;  // what it waits in, and where
    Site site;
    Votes votes;  // of the last barrier
    AsyncQueue copies;
};

// Threads that meet again and again: those of the block, or of one of its teams.
struct Barrier {
    int first, threads, live, waiting;
    Votes votes;
};

// Lanes that met so far for one warp operation.
struct Meeting {
    unsigned mask, arrived;
    const char* function;
    Site site;
    void* data[32];
};

struct Launch {
    const void* kernel;
    dim3 grid, block;
    void (*body)(void*);
    void* context;
    int threads;
    std::vector<Thread> thread;
    std::vector<WarpClock> clocks;
    std::vector<std::vector<Meeting>> meetings;  // of each warp
    Barrier whole;
    std::vector<Barrier> teams;
    std::vector<TeamClock> team_clocks;
    std::vector<std::uint64_t> block_order;
    int running;  // thread
    std::mt19937_64 random;
    std::string error;
};
Launch* launch_now;

Thread& self() { return launch_now->thread[launch_now->running]; }
Barrier& own_team() { return launch_now->teams[launch_now->running / now.team_threads]; }

uint3 block_index(std::uint64_t linear) {
    const dim3& grid = launch_now->grid;
    return {unsigned(linear % grid.x), unsigned(linear / grid.x % grid.y),
            unsigned(linear / grid.x / grid.y)};
}

// Puts indices into the order of the settings.
template <typename T>
void arrange(std::vector<T>& indices, std::mt19937_64& random) {
    if (settings.order == 1) std::reverse(indices.begin(), indices.end());
    if (settings.order == 2) std::shuffle(indices.begin(), indices.end(), random);
}

[[noreturn]] void park() {
    Thread& thread = self();
    thread.status = Status::exited;
    for (;;) suspend(thread.fiber);
}

void thread_main() {
    launch_now->body(launch_now->context);
    if (const AsyncCopy* copy = self().copies.in_flight())
        fail_at(copy->pc, "asynchronous copies in flight",
                "the thread exits with a copy that no cp_async_wait has retired, issued");
    --launch_now->whole.live;
    --own_team().live;
    park();
}

void run(int index) {
    Launch& launch = *launch_now;
    launch.running = index;
    Thread& thread = launch.thread[index];
    zf_simt_thread_idx = thread.index;
    now.warp = &launch.clocks[index / 32];
    now.team = launch.team_clocks[index / now.team_threads];
    now.stamp.key = Stamp::key_of(now.stamp.epoch(), now.warp->epoch, index);
    now.in_kernel = true;
    resume(thread.fiber);
    now.in_kernel = false;
    if (thread.fiber.overflowed(index))
        launch.error = "stack overflow: over 64 KiB of local memory";
}

// Begins an epoch, after a barrier of all threads or of a team.
void advance_epoch(const Barrier& barrier) {
    Launch& launch = *launch_now;
    const std::uint64_t epoch = now.stamp.epoch() + 1;
    if (epoch == (1 << 24) - 1) fail("limit", "more than 2^24 barriers in a block");
    now.stamp.key = Stamp::key_of(epoch, now.stamp.warp_epoch(), launch.running);
    for (std::size_t i = 0; i < launch.teams.size(); ++i) {
        const bool all = &barrier == &launch.whole || launch.teams.size() == 1;
        if (all || &barrier == &launch.teams[i]) launch.team_clocks[i].synced = epoch;
        if (all) launch.team_clocks[i].all_synced = epoch;
    }
}

void report_deadlock() {
    Launch& launch = *launch_now;
    std::string waits;
    int listed = 0;
    for (int i = 0; i < launch.threads && listed < 6; ++i) {
        Thread& thread = launch.thread[i];
        const bool repeats = i > 0 && thread.status == launch.thread[i - 1].status &&
                             thread.site == launch.thread[i - 1].site;
        if (repeats) continue;
        ++listed;
        waits += text("\n  thread %d on: ", i) +
                 (thread.status == Status::exited ? "exited"
                                                  : text("waits in %s at %s:%d", thread.function,
                                                         thread.site.file, thread.site.line));
    }
    launch.error = "deadlock: no thread of the block can go on" + waits;
}

void run_block(std::uint64_t linear) {
    Launch& launch = *launch_now;
    zf_simt_block_idx = block_index(linear);
    ++now.stamp.run;
    now.stamp.key = 0;
    fill_shared();
    launch.whole = {0, launch.threads, launch.threads, 0, {}};
    launch.teams.clear();
    for (int first = 0; first < launch.threads; first += now.team_threads)
        launch.teams.push_back({first, now.team_threads, now.team_threads, 0, {}});
    launch.team_clocks.assign(launch.teams.size(), {});
    for (int i = 0; i < launch.threads; ++i) {
        Thread& thread = launch.thread[i];
        thread.status = Status::ready;
        thread.copies = {};
        thread.fiber.start(i, thread_main);
    }
    for (WarpClock& clock : launch.clocks) clock = {};
    for (auto& meetings : launch.meetings) meetings.clear();

    std::vector<int> order(launch.threads);
    while (launch.whole.live > 0) {
        std::iota(order.begin(), order.end(), 0);
        arrange(order, launch.random);
        bool progress = false;
        for (int index : order) {
            if (launch.thread[index].status != Status::ready) continue;
            progress = true;
            run(index);
            if (!launch.error.empty()) return;
        }
        if (!progress) return report_deadlock();
    }
    if (recording_banks) finish_banks(launch.kernel, 0, int(launch.clocks.size()));
}

Votes wait_at(Barrier& barrier, const char* function, int predicate, Site site) {
    Launch& launch = *launch_now;
    Thread& thread = self();
    if (barrier.live < barrier.threads)
        fail("barrier after exit",
             text("%s at %s:%d while %d threads of its %d have exited", function, site.file,
                  site.line, barrier.threads - barrier.live, barrier.threads)
                 .c_str());
    const auto first = launch.thread.begin() + barrier.first, last = first + barrier.threads;
    const auto other = std::find_if(first, last, [&](const Thread& one) {
        return one.status == Status::at_barrier && one.barrier == &barrier;
    });
    if (other != last && (!(other->site == site) || std::strcmp(other->function, function) != 0))
        fail("divergent barrier",
             text("%s at %s:%d while thread (%u, %u, %u) waits in %s at %s:%d", function, site.file,
                  site.line, other->index.x, other->index.y, other->index.z, other->function,
                  other->site.file, other->site.line)
                 .c_str());
    thread.barrier = &barrier;
    thread.function = function;
    thread.site = site;
    if (barrier.waiting++ == 0) barrier.votes = {0, barrier.threads};
    barrier.votes.count += predicate != 0;
    if (barrier.waiting < barrier.threads) {
        thread.status = Status::at_barrier;
        suspend(thread.fiber);
    } else {
        barrier.waiting = 0;
        if (recording_banks)
            finish_banks(launch.kernel, barrier.first / 32, (barrier.threads + 31) / 32);
        for (auto one = first; one != last; ++one) {
            one->status = Status::ready;
            one->votes = barrier.votes;  // kept: the first to go on may begin the next barrier
        }
        advance_epoch(barrier);
        suspend(thread.fiber);  // so that the order of the settings holds after it, too
    }
    return thread.votes;
}

}  // namespace

// Ends the running thread with the launch's error, or throws it where no thread runs.
[[noreturn]] void stop(std::string error) {
    if (!now.in_kernel) throw std::runtime_error("emulator: " + error);
    launch_now->error = error + "\n  in " + thread_name(now.stamp);
    park();
}

std::string thread_name(const Stamp& stamp) {
    if (stamp.run < now.first_run) return "an earlier launch";
    const Launch& launch = *launch_now;
    const uint3 thread = launch.thread[stamp.thread()].index;
    const uint3 block = block_index(launch.block_order[stamp.run - now.first_run]);
    return text("thread (%u, %u, %u) of block (%u, %u, %u)", thread.x, thread.y, thread.z, block.x,
                block.y, block.z);
}

void yield() {
    now.countdown = settings.preempt;
    Thread& thread = self();
    suspend(thread.fiber);
}

int lane() { return launch_now->running % 32; }

AsyncQueue& async_queue() { return self().copies; }

Votes barrier(const char* function, int predicate, Site site) {
    return wait_at(launch_now->whole, function, predicate, site);
}

void team_barrier(int threads, Site site) {
    constexpr int kMostTeams = 15;  // of sixteen barriers, but for that of the block
    const dim3& block = launch_now->block;
    if (block.y > 1 && (block.x % 32 != 0 || block.y > kMostTeams || block.z > 1))
        fail("team barrier", "teams are at most 15, of whole warps");
    if (own_team().threads != threads)
        fail("team barrier", text("for %d threads, in a team of %d at %s:%d", threads,
                                  own_team().threads, site.file, site.line)
                                 .c_str());
    wait_at(own_team(), "sync_team", 0, site);
}

void meet(unsigned mask, const char* function, Site site, void* mine,
          void (*complete)(void* const* lanes, unsigned mask)) {
    Launch& launch = *launch_now;
    Thread& thread = self();
    const int warp = launch.running / 32, lanes = std::min(32, launch.threads - warp * 32);
    const unsigned bit = 1u << lane();
    if (!(mask & bit))
        fail("warp mask", text("%s at %s:%d: lane %d calls with mask %08x, which does not name it",
                               function, site.file, site.line, lane(), mask)
                              .c_str());
    if (lanes < 32) mask &= (1u << lanes) - 1;  // as the hardware: lanes that never were
    for (int i = 0; i < lanes; ++i)
        if (mask >> i & 1 && launch.thread[warp * 32 + i].status == Status::exited)
            fail("warp operation after exit", text("%s at %s:%d names lane %d, which has exited",
                                                   function, site.file, site.line, i)
                                                  .c_str());
    auto& meetings = launch.meetings[warp];
    auto meeting = std::find_if(meetings.begin(), meetings.end(), [&](const Meeting& m) {
        return m.mask == mask && m.site == site && std::strcmp(m.function, function) == 0;
    });
    if (meeting == meetings.end())
        meeting = meetings.insert(meetings.end(), Meeting{mask, 0, function, site, {}});
    meeting->arrived |= bit;
    meeting->data[lane()] = mine;
    if (meeting->arrived != mask) {
        thread.function = function;
        thread.site = site;
        thread.status = Status::meeting;
        suspend(thread.fiber);
        return;
    }
    const Meeting met = *meeting;
    meetings.erase(meeting);
    complete(met.data, mask);
    for (int i = 0; i < lanes; ++i)
        if (mask >> i & 1) launch.thread[warp * 32 + i].status = Status::ready;
    suspend(thread.fiber);
}

void sync_warp(unsigned mask, Site site) {
    meet(mask, "__syncwarp", site, nullptr, [](void* const*, unsigned lanes) {
        WarpClock& clock = launch_now->clocks[launch_now->running / 32];
        if (++clock.epoch == 1 << 23) fail("limit", "more than 2^23 __syncwarp in a block");
        const int warp = launch_now->running / 32;
        const int present = std::min(32, launch_now->threads - warp * 32);
        const unsigned all = present < 32 ? (1u << present) - 1 : ~0u;
        if (lanes == all) clock.all_synced = clock.epoch;
        for (int i = 0; i < 32; ++i)
            if (lanes >> i & 1)
                for (int j = 0; j < 32; ++j)
                    if (lanes >> j & 1) clock.synced[i][j] = clock.epoch;
    });
}

void launch(const void* kernel, dim3 grid, dim3 block, std::size_t shared_bytes,
            void (*body)(void*), void* context, std::size_t context_bytes) {
    validate_launch(kernel, grid, block, shared_bytes);
    Launch launch = {};
    launch.kernel = kernel;
    launch.grid = zf_simt_grid_dim = grid;
    launch.block = zf_simt_block_dim = block;
    launch.body = body;
    launch.context = context;
    launch.threads = int(block.x * block.y * block.z);
    now.team_threads = block.x % 32 == 0 ? int(block.x) : launch.threads;
    now.many = now.team_threads < launch.threads ? kManyBlock : kManyTeam;
    launch.thread.resize(launch.threads);
    for (int i = 0; i < launch.threads; ++i)
        launch.thread[i].index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
    launch.clocks.resize((launch.threads + 31) / 32);
    launch.meetings.resize(launch.clocks.size());
    launch.random.seed(settings.seed);
    launch.block_order.resize(std::size_t(grid.x) * grid.y * grid.z);
    std::iota(launch.block_order.begin(), launch.block_order.end(), 0);
    arrange(launch.block_order, launch.random);

    launch_now = &launch;
    now.first_run = now.stamp.run + 1;
    now.countdown = settings.preempt;
    set_parameters(context, context_bytes);
    begin_shared(shared_bytes);
    for (std::uint64_t linear : launch.block_order) {
        run_block(linear);
        if (!launch.error.empty()) break;
    }
    launch_now = nullptr;
    if (!launch.error.empty())
        throw std::runtime_error("emulator: " + launch.error + "\n  kernel " + function_at(kernel));
}

}  // namespace simt
