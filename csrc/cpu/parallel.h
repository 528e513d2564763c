// How CPU operators share work. The OpenMP runtime is the one torch has loaded; one thread opens
// no parallel region, because a region after fork() would hang in a DataLoader's worker.
#pragma once

#include <cstdint>

#include "../ops.h"

namespace zfcuda {

// body(i) for each i in [0, count), in chunks of consecutive indices a thread.
template <typename Body>
void parallel_for(std::int64_t count, const Exec& exec, Body&& body) {
    if (exec.threads <= 1 || count <= 1) {
        for (std::int64_t i = 0; i < count; ++i) body(i);
        return;
    }
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(exec.threads))
    for (std::int64_t i = 0; i < count; ++i) body(i);
}

// Calls body(T{}) with the C++ type of a dtype.
template <typename Body>
void with_dtype(Dtype dtype, Body&& body) {
    if (dtype == Dtype::float32)
        body(float{});
    else
        body(double{});
}

}  // namespace zfcuda
