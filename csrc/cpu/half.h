// Halves as the CPU stores them: float16 (5 bits of exponent, 10 of fraction) and bfloat16 (8, 7).
//
// They are only stored: a half widens to a float exactly, and a float is rounded to a half, to
// nearest, ties to even; NaN stays NaN. Without branches and without subnormal floats, so that
// loops over them become vectors on every instruction-set level and the processor's mode of
// flushing subnormal floats to zero changes nothing.
#pragma once

#include <cstdint>
#include <cstring>

namespace zfcuda {

inline std::uint32_t bits_of(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline float float_of(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

struct Bfloat16 {
    std::uint16_t bits;

    Bfloat16() = default;
    explicit Bfloat16(float value) {
        const std::uint32_t all = bits_of(value);
        const std::uint32_t rounded = (all + 0x7fff + (all >> 16 & 1)) >> 16;
        bits = static_cast<std::uint16_t>(value == value ? rounded : all >> 16 | 0x40);
    }
    operator float() const { return float_of(std::uint32_t(bits) << 16); }
};

struct Float16 {
    std::uint16_t bits;

    Float16() = default;
    explicit Float16(float value) {
        const std::uint32_t sign = bits_of(value) & 0x80000000u, size = bits_of(value) ^ sign;
        // From 2^-14 on the exponent moves by 112 and 13 bits of the fraction go.
        const std::uint32_t normal = (size - (112u << 23) + 0xfff + (size >> 13 & 1)) >> 13;
        // Below, adding 0.5 shifts the fraction to where a subnormal half has it, and rounds it.
        const std::uint32_t subnormal = bits_of(float_of(size) + 0.5f) - bits_of(0.5f);
        const std::uint32_t large = size > 0x7f800000u ? 0x7e00 : 0x7c00;  // NaN, infinity
        std::uint32_t half = size < 113u << 23 ? subnormal : normal;
        half = size < 143u << 23 ? half : large;
        bits = static_cast<std::uint16_t>(half | sign >> 16);
    }
    operator float() const {
        const std::uint32_t sign = std::uint32_t(bits & 0x8000) << 16, size = bits & 0x7fff;
        const std::uint32_t normal = (size << 13) + (112u << 23);
        const float subnormal = float_of((size << 13) + (113u << 23)) - float_of(113u << 23);
        std::uint32_t wide = size < 0x400 ? bits_of(subnormal) : normal;
        wide = size < 0x7c00 ? wide : size << 13 | 0x7f800000u;  // infinity, NaN
        return float_of(wide | sign);
    }
};

}  // namespace zfcuda
