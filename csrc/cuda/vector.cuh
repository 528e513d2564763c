// Neighbours in memory that one instruction loads or stores.
#pragma once

#include "port.cuh"

namespace zfcuda {

template <typename T, int kSize>
struct alignas(sizeof(T) * kSize) Vector {
    static constexpr int size = kSize;
    T value[kSize];
};

// The widest: 16 bytes.
template <typename T>
using Pack = Vector<T, 16 / sizeof(T)>;

template <typename T, int kSize>
__device__ __forceinline__ Vector<T, kSize> load_vector(const T* from) {
    return *reinterpret_cast<const Vector<T, kSize>*>(from);
}

template <typename T, int kSize>
__device__ __forceinline__ void store_vector(T* to, const Vector<T, kSize>& vector) {
    *reinterpret_cast<Vector<T, kSize>*>(to) = vector;
}

// Calls body(T{}) with the C++ type of a dtype; halves convert to and from floats, rounding to
// nearest, ties to even.
template <typename Body>
void with_dtype(Dtype dtype, Body&& body) {
    switch (dtype) {
        case Dtype::float32:
            return body(float{});
        case Dtype::float64:
            return body(double{});
        case Dtype::float16:
            return body(__half{});
        case Dtype::bfloat16:
            return body(__nv_bfloat16{});
    }
}

// Whether every address (null included) suits the widest vectors.
template <typename... Addresses>
bool aligned(Addresses... addresses) {
    return ((reinterpret_cast<std::uintptr_t>(addresses.value) % 16 == 0) && ...);
}

// Whether an activation's channels go four at a time: float32 in NHWC, whole packs.
template <typename... Addresses>
bool four_channels(const Layout& l, Dtype dtype, Addresses... addresses) {
    return l.channels_last && dtype == Dtype::float32 && l.channels % 4 == 0 &&
           aligned(addresses...);
}

}  // namespace zfcuda
