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

// kVector neighbours in one load; zero where `forward` is given and blocks them.
template <typename T, int kVector>
__device__ Vector<T, kVector> load_gated(const T* from, const T* forward, std::int64_t offset) {
    Vector<T, kVector> vector = load_vector<T, kVector>(from + offset);
    if (forward != nullptr) {
        const Vector<T, kVector> mask = load_vector<T, kVector>(forward + offset);
#pragma unroll
        for (int i = 0; i < kVector; ++i)
            if (Sum<T>(mask.value[i]) <= Sum<T>(0)) vector.value[i] = T(Sum<T>(0));
    }
    return vector;
}

inline Address mask_of(Gate gate, Address forward) {
    return static_cast<int>(gate) & kMask ? forward : Address{};
}

}  // namespace zfcuda
