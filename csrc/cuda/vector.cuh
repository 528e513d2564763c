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

// The same numbers of another type: halves widen to floats, floats are rounded to halves, to
// nearest, ties to even.
template <typename To, typename From, int kSize>
__device__ __forceinline__ Vector<To, kSize> convert(const Vector<From, kSize>& from) {
    Vector<To, kSize> to;
#pragma unroll
    for (int i = 0; i < kSize; ++i) to.value[i] = static_cast<To>(from.value[i]);
    return to;
}

// Neighbours as what they are computed in (Sum), and back.
template <typename T, int kSize>
__device__ __forceinline__ Vector<Sum<T>, kSize> load_wide(const T* from) {
    return convert<Sum<T>>(load_vector<T, kSize>(from));
}
template <typename T, int kSize>
__device__ __forceinline__ void store_rounded(T* to, const Vector<Sum<T>, kSize>& vector) {
    store_vector(to, convert<T>(vector));
}

// Bytes of what a dtype is computed in.
inline std::int64_t sum_bytes(Dtype dtype) { return dtype == Dtype::float64 ? 8 : 4; }

// Calls body(T{}) with the C++ type of a dtype.
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

// Whether an activation's channels go four at a time: in NHWC, whole packs, but not of doubles.
template <typename... Addresses>
bool four_channels(const Layout& l, Dtype dtype, Addresses... addresses) {
    return l.channels_last && dtype != Dtype::float64 && l.channels % 4 == 0 &&
           aligned(addresses...);
}

// Calls body(T{}, size) with the C++ type of a dtype and the size of its vectors: four, or one.
template <typename Body>
void with_vector(Dtype dtype, bool four, Body&& body) {
    with_dtype(dtype, [&](auto zero) {
        if constexpr (sizeof(zero) <= 4)
            if (four) return body(zero, std::integral_constant<int, 4>{});
        body(zero, std::integral_constant<int, 1>{});
    });
}

// Calls body(word) with a word as large as a number of a dtype, for what only moves numbers.
template <typename Body>
void with_word(Dtype dtype, Body&& body) {
    switch (element_bytes(dtype)) {
        case 2:
            return body(std::uint16_t{});
        case 4:
            return body(std::uint32_t{});
        default:
            return body(std::uint64_t{});
    }
}

}  // namespace zfcuda
