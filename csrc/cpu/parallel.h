// How CPU operators share work. The OpenMP runtime is the one torch has loaded; one thread opens
// no parallel region, because a region after fork() would hang in a DataLoader's worker.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>

#include "../ops.h"
#include "half.h"

namespace zfcuda {

inline std::int64_t max_threads(const Exec& exec) {
    return std::max<std::int64_t>(exec.threads, 1);
}

// body(i, thread) for each i in [0, count), in chunks of consecutive indices a thread.
template <typename Body>
void parallel_for_thread(std::int64_t count, const Exec& exec, Body&& body) {
    const auto team = static_cast<int>(std::min(count, max_threads(exec)));
    if (team <= 1) {
        for (std::int64_t i = 0; i < count; ++i) body(i, 0);
        return;
    }
#pragma omp parallel for schedule(static) num_threads(team)
    for (std::int64_t i = 0; i < count; ++i) body(i, omp_get_thread_num());
}

// body(i) for each i in [0, count), in chunks of consecutive indices a thread.
template <typename Body>
void parallel_for(std::int64_t count, const Exec& exec, Body&& body) {
    parallel_for_thread(count, exec, [&](std::int64_t i, int) { body(i); });
}

// Halves are summed as floats; some ways are for types that are their own sums.
template <typename T>
constexpr bool kWhole = std::is_same_v<T, Sum<T>>;

// Workspaces are cut at cache lines.
constexpr std::int64_t kLine = 64;
template <typename T>
T* aligned(Address workspace) {
    const auto address = reinterpret_cast<std::uintptr_t>(workspace.value);
    return reinterpret_cast<T*>((address + kLine - 1) / kLine * kLine);
}

// The smallest body(i), i in [0, count), or `none` where there is nothing smaller.
template <typename Body>
std::int64_t parallel_min(std::int64_t count, std::int64_t none, const Exec& exec, Body&& body) {
    std::int64_t smallest = none;
    parallel_for(count, exec, [&](std::int64_t i) {
        const std::int64_t value = body(i);
        if (value >= none) return;
#pragma omp critical(zfcuda_parallel_min)
        if (value < smallest) smallest = value;
    });
    return smallest;
}

// Calls body(T{}) with the C++ type of a dtype.
template <typename Body>
void with_dtype(Dtype dtype, Body&& body) {
    switch (dtype) {
        case Dtype::float32:
            return body(float{});
        case Dtype::float64:
            return body(double{});
        case Dtype::float16:
            return body(Float16{});
        case Dtype::bfloat16:
            return body(Bfloat16{});
    }
}

}  // namespace zfcuda
