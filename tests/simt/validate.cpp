// What a GPU of the chosen architecture refuses to launch.
#include "runtime.h"

namespace simt {
namespace {

constexpr std::size_t kKiB = 1024, kDefaultShared = 48 * kKiB;

}  // namespace

std::size_t shared_limit() {
    switch (settings.arch) {
        case 75:
            return 64 * kKiB;
        case 80:
        case 87:
            return 163 * kKiB;
        case 90:
        case 100:
        case 103:
            return 227 * kKiB;
        default:
            return 99 * kKiB;  // 86, 89, 120
    }
}

void validate_launch(const void* kernel, dim3 grid, dim3 block, std::size_t dynamic_bytes) {
    const auto refuse = [&](const char* what) {
        fail("invalid launch",
             text("%s: grid (%u, %u, %u), block (%u, %u, %u), %zu bytes of dynamic shared memory, "
                  "sm_%d\n  kernel %s",
                  what, grid.x, grid.y, grid.z, block.x, block.y, block.z, dynamic_bytes,
                  settings.arch, function_at(kernel).c_str())
                 .c_str());
    };
    const std::uint64_t threads = std::uint64_t(block.x) * block.y * block.z;
    if (threads == 0 || threads > 1024 || block.x > 1024 || block.y > 1024 || block.z > 64)
        refuse("a block has 1 to 1024 threads, 1024 x 1024 x 64 at most");
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) refuse("an empty grid");
    if (grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
        refuse("a grid has at most (2^31 - 1) x 65535 x 65535 blocks");
    if (dynamic_bytes > shared_limit()) refuse("too much shared memory");
}

// `launch` of port.cuh raises the attribute if, and only if, dynamic memory alone needs it.
void validate_shared(std::size_t static_bytes, std::size_t dynamic_bytes) {
    const std::size_t total = static_bytes + dynamic_bytes;
    const char* problem = static_bytes > kDefaultShared ? "more than 48 KiB of it static"
                          : total > shared_limit()      ? "more than the architecture has"
                          : total > kDefaultShared && dynamic_bytes <= kDefaultShared
                              ? "more than 48 KiB without the attribute, which launch() raises for "
                                "dynamic memory alone"
                              : nullptr;
    if (problem)
        fail("shared memory", text("%zu bytes static, %zu dynamic on sm_%d: %s", static_bytes,
                                   dynamic_bytes, settings.arch, problem)
                                  .c_str());
}

}  // namespace simt
