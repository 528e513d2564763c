// Halves as the CPU stores them: float16 (5 bits of exponent, 10 of fraction) and bfloat16 (8, 7).
//
// They are only stored: a half widens to a float exactly, and a float is rounded to a half, to
// nearest, ties to even; NaN stays NaN. Without branches, so that the same lines serve single
// numbers, loops that become vectors, and GCC's vector types; and without subnormal floats, so that
// the processor's mode of flushing those to zero changes nothing.
//
// Measured (ZFNet, batch 8, Zen 5, AVX-512 with bfloat16 products, one thread, processor time,
// medians, calls of all in turn on a busy machine), our float32 / ours, and torch's of the same
// dtype / ours, channels_last; bfloat16, then float16:
//   conv1 1.3 1.3   conv2 1.0 1.0   conv3 1.0 1.0   (torch 0.3 9, 0.5 7, 0.4 7)
//   pool1 0.9 1.2   pool2 0.9 1.3                   (torch 1.8 2.3, 1.5 2.0; contiguous 8 to 12)
//   unpool2, switch_gather1 1.0 to 1.5   norm1 2.1 2.3   norm2 (in the cache) 0.7 0.8
// torch multiplies bfloat16 by instructions of twice the speed, which are not used here. Lost:
// float16 by these lines where there are instructions (lanes.h): the normalisation took 2.7 times
// as long.
#pragma once

#include <cstdint>
#include <cstring>

namespace zfcuda {

template <typename To, typename From>
inline To bits_as(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// The arithmetic of each format, on the bits of floats (`Word`) and on halves in as wide integers:
// std::uint32_t, or vectors of it.
struct Bfloat16Format {
    template <typename Real, typename Word>
    static Real widen(const Word& half) {
        return bits_as<Real>(Word(half << 16));
    }
    template <typename Real, typename Word>
    static Word narrow(const Real& value) {
        const Word all = bits_as<Word>(value), size = all & 0x7fffffffu;
        const Word rounded = (all + 0x7fffu + (all >> 16 & 1u)) >> 16;
        return size <= 0x7f800000u ? rounded : (all >> 16 | 0x40u);
    }
};

struct Float16Format {
    template <typename Real, typename Word>
    static Real widen(const Word& half) {
        const Word sign = (half & 0x8000u) << 16, size = half & 0x7fffu;
        const Word normal = (size << 13) + (112u << 23);
        // A subnormal half is the fraction of a float above 2^-14.
        const Real one = bits_as<Real>(Word(Word{} + (113u << 23)));
        const Real subnormal = bits_as<Real>(Word((size << 13) + (113u << 23))) - one;
        const Word finite = size < 0x400u ? bits_as<Word>(subnormal) : normal;
        const Word wide = size < 0x7c00u ? finite : (size << 13 | 0x7f800000u);  // infinity, NaN
        return bits_as<Real>(Word(wide | sign));
    }
    template <typename Real, typename Word>
    static Word narrow(const Real& value) {
        const Word sign = bits_as<Word>(value) & 0x80000000u, size = bits_as<Word>(value) ^ sign;
        // From 2^-14 on the exponent moves by 112 and 13 bits of the fraction go.
        const Word normal = (size - (112u << 23) + 0xfffu + (size >> 13 & 1u)) >> 13;
        // Below, adding 0.5 shifts the fraction to where a subnormal half has it, and rounds it.
        const Word half = Word{} + (126u << 23);
        const Word subnormal =
            bits_as<Word>(Real(bits_as<Real>(size) + bits_as<Real>(half))) - half;
        const Word finite = size < (113u << 23) ? subnormal : normal;
        const Word nan = size > 0x7f800000u ? Word{} + 0x7e00u : Word{} + 0x7c00u;  // or infinity
        const Word all = size < (143u << 23) ? finite : nan;
        return all | sign >> 16;
    }
};

// A half in memory: converts to a float, and from one if asked.
template <typename Kind>
struct Half {
    using Format = Kind;
    std::uint16_t bits;

    Half() = default;
    explicit Half(float value)
        : bits(static_cast<std::uint16_t>(Format::template narrow<float, std::uint32_t>(value))) {}
    operator float() const { return Format::template widen<float>(std::uint32_t(bits)); }
};
using Float16 = Half<Float16Format>;
using Bfloat16 = Half<Bfloat16Format>;

}  // namespace zfcuda
