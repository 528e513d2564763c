// Vectors of the instruction set that a file is compiled for, in GCC's vector extensions: the same
// lines give SSE, AVX2, AVX-512 and NEON.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "../ops.h"
#include "half.h"

namespace zfcuda {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// Half vectors, where these exist: the 21 values of a kernel row of conv1 are a vector and a half.
constexpr int kHalves = kVectorBytes > 16 ? 2 : 1;  // parts of a vector
template <typename T>
constexpr std::int64_t kUnit = kVectorBytes / kHalves / sizeof(Sum<T>);

// A vector of so many bytes anywhere in memory.
template <typename T, int bytes>
struct Wide {
    typedef T Value __attribute__((vector_size(bytes), aligned(sizeof(T)), may_alias));
    static Value& at(T* p) { return *reinterpret_cast<Value*>(p); }
    static const Value& at(const T* p) { return *reinterpret_cast<const Value*>(p); }
};

// For loops over vectors whose state must stay in registers.
#define ZF_INLINE __attribute__((always_inline)) inline

template <typename T>
struct Lanes {
    static constexpr int count = kVectorBytes / sizeof(T);
    using Int = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;
    typedef T Value __attribute__((vector_size(kVectorBytes)));
    typedef Int Integer __attribute__((vector_size(kVectorBytes)));  // of a comparison, too
    typedef std::uint8_t Byte __attribute__((vector_size(kVectorBytes / sizeof(T))));
    // Between bytes and integers in doublings: a longer step becomes scalar code in GCC 12.
    typedef std::int16_t Short __attribute__((vector_size(2 * kVectorBytes / sizeof(T))));
    typedef std::int32_t Word __attribute__((vector_size(4 * kVectorBytes / sizeof(T))));

    // The first `lanes` lanes from memory, the others zero.
    static Value load(const T* from, std::int64_t lanes) { return load_or(from, lanes, T(0)); }
    // The first `lanes` lanes from memory, the others `other`.
    static Value load_or(const T* from, std::int64_t lanes, T other) {
        Value value = Value{} + other;
#if defined(__AVX512F__)
        if constexpr (sizeof(T) == 4)
            if (lanes != count)
                return (Value)_mm512_mask_loadu_ps((__m512)value, __mmask16((1u << lanes) - 1),
                                                   from);
#endif
        copy(&value, from, lanes);
        return value;
    }
    // Lanes 0, 2, 4, … of two vectors that follow each other.
    static Value every_second(const Value& first, const Value& second) {
        Integer lane;
        for (int i = 0; i < count; ++i) lane[i] = 2 * i;
        return __builtin_shuffle(first, second, lane);
    }
    // Whether a lane of a comparison holds.
    static bool any(const Integer& comparison) {
        std::uint64_t words[kVectorBytes / 8], some = 0;
        std::memcpy(words, &comparison, kVectorBytes);
        for (const std::uint64_t word : words) some |= word;
        return some != 0;
    }
    static Integer load_bytes(const std::uint8_t* from, std::int64_t lanes) {
        Byte bytes{};
        copy(&bytes, from, lanes);
        return convert<Integer>(convert<Word>(convert<Short>(bytes)));
    }
    static void store(T* to, const Value& value, std::int64_t lanes) { copy(to, &value, lanes); }
    static void store_bytes(std::uint8_t* to, const Integer& value, std::int64_t lanes) {
        const Byte bytes = convert<Byte>(convert<Short>(convert<Word>(value)));
        copy(to, &bytes, lanes);
    }

    // sum, plus the values whose byte is `wanted` (in the first `lanes` lanes).
    static Value add_where(const Value& sum, const T* values, const std::uint8_t* bytes, Int wanted,
                           std::int64_t lanes) {
#if defined(__AVX512BW__)
        if constexpr (sizeof(T) == 4)
            if (lanes == count) {
                const __m128i from = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
                const __mmask16 hit = _mm_cmpeq_epi8_mask(from, _mm_set1_epi8(char(wanted)));
                return (Value)_mm512_mask_add_ps((__m512)sum, hit, (__m512)sum,
                                                 _mm512_loadu_ps(values));
            }
#endif
        return load_bytes(bytes, lanes) == wanted ? sum + load(values, lanes) : sum;
    }

    // Bit i: lane i is not zero, or with `positive` not <= 0 (so that NaN stays).
    template <bool positive>
    static unsigned kept(const Value& value) {
#if defined(__AVX512F__)
        if constexpr (sizeof(T) == 4)
            return _mm512_cmp_ps_mask((__m512)value, __m512{},
                                      positive ? _CMP_NLE_UQ : _CMP_NEQ_UQ);
#endif
        return bits(positive ? ~(value <= 0) : value != 0);
    }

    // Writes the lanes that `kept` keeps, in order, and the same lanes of `index`; returns how
    // many. A whole vector may be written.
    template <bool positive>
    static int compress(const Value& value, const Integer& index, T* values,
                        std::int32_t* indices) {
        unsigned left = kept<positive>(value);
#if defined(__AVX512F__)
        if constexpr (sizeof(T) == 4) {
            _mm512_storeu_ps(values, _mm512_maskz_compress_ps(left, (__m512)value));
            _mm512_storeu_si512(indices, _mm512_maskz_compress_epi32(left, (__m512i)index));
            return __builtin_popcount(left);
        }
#endif
        int found = 0;
        for (; left; left &= left - 1, ++found) {
            const int i = __builtin_ctz(left);
            values[found] = value[i];
            indices[found] = static_cast<std::int32_t>(index[i]);
        }
        return found;
    }

  private:
    // Bit i: lane i is set.
    static unsigned bits(const Integer& some) {
#if defined(__AVX512F__)
        if constexpr (sizeof(T) == 8) return _mm512_movepi64_mask((__m512i)some);
#elif defined(__AVX2__)
        if constexpr (sizeof(T) == 4) return _mm256_movemask_ps((__m256)some);
        if constexpr (sizeof(T) == 8) return _mm256_movemask_pd((__m256d)some);
#endif
        unsigned bits = 0;
        for (int i = 0; i < count; ++i) bits |= unsigned(some[i] & 1) << i;
        return bits;
    }
    template <typename To, typename From>
    static To convert(const From& from) {
        return __builtin_convertvector(from, To);
    }
    // The whole vector is the common case, and of constant size.
    template <typename To, typename From>
    static void copy(To* to, const From* from, std::int64_t lanes) {
        constexpr std::size_t size = (sizeof(To) > sizeof(From) ? sizeof(To) : sizeof(From));
        if (lanes == count)
            std::memcpy(to, from, size);
        else
            std::memcpy(to, from, size / count * lanes);
    }
};

// Halves in memory: lanes of floats.
template <typename Format>
struct Lanes<Half<Format>> : Lanes<float> {
    typedef std::uint32_t Word __attribute__((vector_size(kVectorBytes)));  // as wide as a float
    typedef std::uint16_t Bits __attribute__((vector_size(kVectorBytes / 2)));

    static Value load(const Half<Format>* from, std::int64_t lanes) {
        return widen(load_bits(from, lanes));
    }
    static Value load_or(const Half<Format>* from, std::int64_t lanes, float other) {
        const Value value = load(from, lanes);
        if (lanes == count) return value;
        Integer lane;
        for (int i = 0; i < count; ++i) lane[i] = i;
        return lane < static_cast<Int>(lanes) ? value : Value{} + other;
    }
    static void store(Half<Format>* to, const Value& value, std::int64_t lanes) {
        const Bits bits = narrow(value);
#if defined(__AVX512BW__)
        if (lanes != count)
            return _mm256_mask_storeu_epi16(to, __mmask16((1u << lanes) - 1), (__m256i)bits);
#endif
        std::memcpy(to, &bits, sizeof(to->bits) * lanes);
    }
    static Value add_where(const Value& sum, const Half<Format>* values, const std::uint8_t* bytes,
                           Int wanted, std::int64_t lanes) {
        return load_bytes(bytes, lanes) == wanted ? sum + load(values, lanes) : sum;
    }

  private:
    static Bits load_bits(const Half<Format>* from, std::int64_t lanes) {
        Bits bits{};
#if defined(__AVX512BW__)
        if (lanes != count)
            return (Bits)_mm256_maskz_loadu_epi16(__mmask16((1u << lanes) - 1), from);
#endif
        if (lanes == count)
            std::memcpy(&bits, from, sizeof bits);
        else
            std::memcpy(&bits, from, sizeof(from->bits) * lanes);
        return bits;
    }
    static Value widen(const Bits& bits) {
#if defined(__AVX512F__)
        if constexpr (std::is_same_v<Format, Float16Format>)
            return (Value)_mm512_maskz_cvtph_ps(0xffff, (__m256i)bits);
#elif defined(__F16C__)
        if constexpr (std::is_same_v<Format, Float16Format>)
            return (Value)_mm256_cvtph_ps((__m128i)bits);
#endif
        return Format::template widen<Value>(__builtin_convertvector(bits, Word));
    }
    static Bits narrow(const Value& value) {
#if defined(__AVX512F__)
        if constexpr (std::is_same_v<Format, Float16Format>)
            return (Bits)_mm512_maskz_cvtps_ph(0xffff, (__m512)value, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
        if constexpr (std::is_same_v<Format, Float16Format>)
            return (Bits)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT);
#endif
        return __builtin_convertvector(Format::template narrow<Value, Word>(value), Bits);
    }
};

// body(start, lanes) for vectors that cover [0, count); the last one meets some numbers again where
// it can.
template <typename T, typename Body>
inline void for_lanes(std::int64_t count, Body&& body) {
    constexpr std::int64_t lanes = Lanes<T>::count;
    if (count < lanes) return count ? body(0, count) : void();
    for (std::int64_t i = 0; i < count; i += lanes) body(std::min(i, count - lanes), lanes);
}

// `count` numbers from `from` on as what they are computed in: they themselves, or in `room`.
template <typename T>
const Sum<T>* widened(const T* from, std::int64_t count, Sum<T>* room) {
    if constexpr (std::is_same_v<T, Sum<T>>) return from;
    for_lanes<T>(count, [&](std::int64_t i, std::int64_t lanes) {
        Lanes<Sum<T>>::store(room + i, Lanes<T>::load(from + i, lanes), lanes);
    });
    return room;
}

// The other way: `count` numbers, rounded if `to` holds halves.
template <typename T>
void store_rounded(T* to, const Sum<T>* from, std::int64_t count) {
    for_lanes<T>(count, [&](std::int64_t i, std::int64_t lanes) {
        Lanes<T>::store(to + i, Lanes<Sum<T>>::load(from + i, lanes), lanes);
    });
}

}  // namespace zfcuda
