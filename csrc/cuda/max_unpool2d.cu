// Unpooling by switches, its transpose, and the check of switches.
//
//   unpooled[p] = sum of pooled[w] over the windows w whose switch points to p, in row-major order;
//                 with overwrite: pooled of the last such window
//   pooled[w]   = unpooled[switch of w]; with overwrite: zero unless w is that last window
//
// Both gather: a thread a result, or four channels of one in NHWC, in storage order (places.cuh).
// A pixel looks at the windows that cover it (pool_windows.cuh), which its neighbours share through
// L1; nothing is cleared first, nothing is added atomically, and every order is fixed.
// Least bytes: pooled + one byte a switch + unpooled.
// Measured: not yet, for want of a GPU; `make bench` on one fills this line.
#include "pool_windows.cuh"

namespace zfcuda {
namespace {

template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads)
    max_unpool2d_kernel(Windows w, bool overwrite, const T* pooled, const std::uint8_t* switches,
                        T* unpooled) {
    for_each_place(w.unpooled, [&](std::int64_t index, const Place& place) {
        Vector<Sum<T>, kVector> sum = {};
        for_each_window(w, place, [&](std::int64_t offset, int here) {
            const auto where = load_vector<std::uint8_t, kVector>(switches + offset);
            const auto value = load_wide<T, kVector>(pooled + offset);
#pragma unroll
            for (int e = 0; e < kVector; ++e)
                if (where.value[e] == here)
                    sum.value[e] = overwrite ? value.value[e] : sum.value[e] + value.value[e];
        });
        store_rounded(unpooled + index * kVector, sum);
    });
}

// The place that a window's switch points to; y is -1 where it points outside.
__device__ Place switch_target(const Windows& w, const Place& window, int where) {
    const int i = where / w.x.kernel, j = where - i * w.x.kernel;
    const int y = w.y.position(window.y, i), x = w.x.position(window.x, j);
    const bool inside = i < w.y.kernel && y >= 0 && y < w.height && x >= 0 && x < w.width;
    return {window.slab, inside ? y : -1, x, window.inner};
}

template <typename Word>
__global__ void __launch_bounds__(kThreads)
    switch_gather_kernel(Windows w, bool overwrite, const Word* unpooled,
                         const std::uint8_t* switches, Word* pooled) {
    for_each_place(w.pooled, [&](std::int64_t index, const Place& place) {
        const Place target = switch_target(w, place, switches[index]);
        std::int64_t owner = target.y >= 0 ? index : -1;
        if (overwrite && target.y >= 0)
            for_each_window(w, target, [&](std::int64_t offset, int here) {
                if (switches[offset] == here) owner = offset;
            });
        pooled[index] =
            owner == index
                ? unpooled[w.unpooled.offset(target.slab, target.y, target.x, target.inner)]
                : Word(0);
    });
}

__global__ void clear_first_kernel(unsigned long long* first) { *first = ~0ull; }

// -1 is the largest unsigned number, so the smallest index wins.
__global__ void __launch_bounds__(kThreads)
    find_invalid_switch_kernel(Windows w, const std::uint8_t* switches, unsigned long long* first) {
    for_each_place(w.pooled, [&](std::int64_t index, const Place& place) {
        if (switch_target(w, place, switches[index]).y < 0)
            atomicMin(first, static_cast<unsigned long long>(index));
    });
}

}  // namespace

void max_unpool2d(const PoolShape& s, Dtype dtype, bool overwrite, Address pooled, Address switches,
                  Address unpooled, const Exec& exec) {
    if (s.inputs() == 0) return;
    const bool four = four_channels(s.input(), dtype, pooled, switches, unpooled);
    with_vector(dtype, four, [&](auto zero, auto vector) {
        using T = decltype(zero);
        const Windows windows(s, vector);
        launch(max_unpool2d_kernel<T, vector()>, windows.unpooled.grid(), dim3(kThreads), 0, exec,
               windows, overwrite, pooled.as<const T>(), switches.as<const std::uint8_t>(),
               unpooled.as<T>());
    });
}

void switch_gather(const PoolShape& s, Dtype dtype, bool overwrite, Address unpooled,
                   Address switches, Address pooled, const Exec& exec) {
    if (s.outputs() == 0) return;
    with_word(dtype, [&](auto word) {
        using Word = decltype(word);
        const Windows windows(s, 1);
        launch(switch_gather_kernel<Word>, windows.pooled.grid(), dim3(kThreads), 0, exec, windows,
               overwrite, unpooled.as<const Word>(), switches.as<const std::uint8_t>(),
               pooled.as<Word>());
    });
}

void find_invalid_switch(const PoolShape& s, Address switches, Address first_invalid,
                         const Exec& exec) {
    launch(clear_first_kernel, dim3(1), dim3(1), 0, exec, first_invalid.as<unsigned long long>());
    if (s.outputs() == 0) return;
    const Windows windows(s, 1);
    launch(find_invalid_switch_kernel, windows.pooled.grid(), dim3(kThreads), 0, exec, windows,
           switches.as<const std::uint8_t>(), first_invalid.as<unsigned long long>());
}

}  // namespace zfcuda
