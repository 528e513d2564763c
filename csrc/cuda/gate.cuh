// What stands between a signal and the filters (Gate in ops.h), as kernels apply it.
#pragma once

#include "vector.cuh"

namespace zfcuda {

// The gate's two halves: what the signal's own sign does, and what the forward map does. Kernels
// get the address of the forward map only where the second is asked for.
constexpr int kRectify = 1, kMask = 2;
static_assert(int(Gate::deconvnet) == kRectify && int(Gate::backprop) == kMask &&
                  int(Gate::guided) == (kRectify | kMask),
              "a gate is a set of its halves");

template <typename T>
ZF_HD T rectify(T value) {
    return Sum<T>(value) < Sum<T>(0) ? T(Sum<T>(0)) : value;  // keeps NaN
}

// Two halves are compared at once, each to sixteen equal bits: a third of the instructions that
// they take one by one.
template <typename T>
using HalfPair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;

template <typename T, int kSize>
constexpr bool kPairs = sizeof(T) == 2 && kSize % 2 == 0;

// Clears the halves of `vector` that `clears(pair)` of the pair in the same place of `by` has set.
template <typename T, int kSize, typename Clears>
__device__ void clear_pairs(Vector<T, kSize>& vector, const Vector<T, kSize>& by, Clears&& clears) {
#pragma unroll
    for (int i = 0; i < kSize; i += 2) {
        std::uint32_t bits;
        HalfPair<T> pair;
        memcpy(&bits, vector.value + i, 4);
        memcpy(&pair, by.value + i, 4);
        bits &= ~clears(pair);
        memcpy(vector.value + i, &bits, 4);
    }
}

template <typename T, int kSize>
__device__ void rectify_all(Vector<T, kSize>& vector) {
    if constexpr (kPairs<T, kSize>) {
        clear_pairs(vector, vector, [](auto pair) { return __hlt2_mask(pair, decltype(pair){}); });
    } else {
#pragma unroll
        for (T& value : vector.value) value = rectify(value);
    }
}

// kVector neighbours in one load; zero where `forward` is given and blocks them.
template <typename T, int kVector>
__device__ Vector<T, kVector> load_gated(const T* from, const T* forward, std::int64_t offset) {
    Vector<T, kVector> vector = load_vector<T, kVector>(from + offset);
    if (forward != nullptr) {
        const Vector<T, kVector> mask = load_vector<T, kVector>(forward + offset);
        if constexpr (kPairs<T, kVector>) {
            clear_pairs(vector, mask,
                        [](auto pair) { return __hle2_mask(pair, decltype(pair){}); });
        } else {
#pragma unroll
            for (int i = 0; i < kVector; ++i)
                if (Sum<T>(mask.value[i]) <= Sum<T>(0)) vector.value[i] = T(Sum<T>(0));
        }
    }
    return vector;
}

inline Address mask_of(Gate gate, Address forward) {
    return static_cast<int>(gate) & kMask ? forward : Address{};
}

}  // namespace zfcuda
