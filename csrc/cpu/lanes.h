// Vectors of the instruction set that a file is compiled for, in GCC's vector extensions: the same
// lines give SSE, AVX2, AVX-512 and NEON.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace zfcuda {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

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
    static Value load(const T* from, std::int64_t lanes) {
        Value value{};
        copy(&value, from, lanes);
        return value;
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

   private:
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

}  // namespace zfcuda
