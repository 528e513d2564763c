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
    const char* function;  // what it waits in, and where
    Site site;
    Votes votes;  // of the last barrier
    AsyncQueue copies;
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
    std::vector<std::uint64_t> block_order;
    int running;  // thread
    int live, waiting;
    Votes votes;
    std::mt19937_64 random;
    std::string error;
};
Launch* launch_now;

Thread& self() { return launch_now->thread[launch_now->running]; }

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
    --launch_now->live;
    park();
}

void run(int index) {
    Launch& launch = *launch_now;
    launch.running = index;
    Thread& thread = launch.thread[index];
    zf_simt_thread_idx = thread.index;
    now.stamp.key = (now.stamp.key >> 40 << 40) | std::uint64_t(index) << 6;
    now.warp = &launch.clocks[index / 32];
    now.stamp.key |= std::uint64_t(now.warp->epoch) << 16;
    now.in_kernel = true;
    resume(thread.fiber);
    now.in_kernel = false;
    if (thread.fiber.overflowed(index))
        launch.error = "stack overflow: over 64 KiB of local memory";
}

void advance_epoch() {
    now.stamp.key = ((now.stamp.key >> 40) + 1) << 40;
    if (now.stamp.epoch() == (1 << 24) - 1) fail("limit", "more than 2^24 barriers in a block");
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
    launch.live = launch.threads;
    launch.waiting = 0;
    for (int i = 0; i < launch.threads; ++i) {
        Thread& thread = launch.thread[i];
        thread.status = Status::ready;
        thread.copies = {};
        thread.fiber.start(i, thread_main);
    }
    for (WarpClock& clock : launch.clocks) clock = {};
    for (auto& meetings : launch.meetings) meetings.clear();

    std::vector<int> order(launch.threads);
    while (launch.live > 0) {
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
    if (recording_banks) finish_banks(launch.kernel);
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
    Launch& launch = *launch_now;
    Thread& thread = self();
    if (launch.live < launch.threads)
        fail("barrier after exit",
             text("%s at %s:%d while %d threads of the block have exited", function, site.file,
                  site.line, launch.threads - launch.live)
                 .c_str());
    for (const Thread& other : launch.thread)
        if (other.status == Status::at_barrier) {
            if (!(other.site == site) || std::strcmp(other.function, function) != 0)
                fail("divergent barrier",
                     text("%s at %s:%d while thread (%u, %u, %u) waits in %s at %s:%d", function,
                          site.file, site.line, other.index.x, other.index.y, other.index.z,
                          other.function, other.site.file, other.site.line)
                         .c_str());
            break;
        }
    thread.function = function;
    thread.site = site;
    if (launch.waiting++ == 0) launch.votes = {0, launch.threads};
    launch.votes.count += predicate != 0;
    if (launch.waiting < launch.threads) {
        thread.status = Status::at_barrier;
        suspend(thread.fiber);
    } else {
        launch.waiting = 0;
        if (recording_banks) finish_banks(launch.kernel);
        for (Thread& other : launch.thread) {
            other.status = Status::ready;
            other.votes = launch.votes;  // kept: the first to go on may begin the next barrier
        }
        const std::uint64_t who = now.stamp.key & 0xffffffffff;
        advance_epoch();
        now.stamp.key |= who;
        suspend(thread.fiber);  // so that the order of the settings holds after it, too
    }
    return thread.votes;
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
        if (++clock.epoch == 1 << 24) fail("limit", "more than 2^24 __syncwarp in a block");
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
