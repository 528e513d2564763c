// Narrow filters: all image values that one map position adds to fit the registers.
//
//                     strip of channel c: the filter, run by run        position (y, x)
//                     +------------------------------------------+
//   channels whose -> | full vectors of every run | half vectors |     registers = sum over the set
//   bit is set        +------------------------------------------+     bits of value * strip;
//                                                                      then each run of the image
//                                                                      += its registers
//
// conv1 of ZFNet meets five to eight values at a position, for 147 weights each. Lists of them (see
// window_product.h) took longer to write, sort and read four times than the products; here a
// position's vectors go to a slot that stays in the L1 cache, with a bit for each value that is not
// zero, and the products follow the bits.
//
// Where the time goes on a Zen 5 core, cycles for a position of which seven in ten have a value
// (7.5 on average): 50 to gather, 75 to multiply (two loads of 64 bytes a cycle; strips of 68 KB
// come from the L2 cache in part), 30 to add to the image, whose runs cross cache lines. Tried and
// lost: lists in the same order (stores of whole compressed vectors cross cache lines); one loop
// over the bits of all words (its steps cost what the mispredicted branch did); gathering 8
// positions at a time (0.87 of the speed); positions whose runs do not overlap, one after the other
// (0.94: the hardware reads ahead no more); strips in two panels for the L1 cache (0.82).
#pragma once

#include <utility>

#include "gemm.h"
#include "window_maps.h"

namespace zfcuda {

constexpr int kStripRuns = 8;                                // runs that are added together
constexpr int kStripVectors = kVectorBytes == 64 ? 24 : 12;  // registers for their sums
constexpr std::int64_t kStripBytes = 128 * 1024;             // all strips stay in the L2 cache
constexpr int kSlots = 128;                                  // positions that are gathered together

// Where the vectors of a run begin. (In a function of constants, so are they.)
ZF_INLINE std::int64_t full_at(int i, int full, int half, std::int64_t lanes, std::int64_t width) {
    return i + 1 == full && half == 0 ? width - lanes : i * lanes;
}
ZF_INLINE std::int64_t half_at(int i, int half, std::int64_t unit, std::int64_t width) {
    return i + 1 == half ? width - unit : i * unit;
}

// The vectors that a run of `width` values is cut to, full ones first. The last one ends where the
// run ends: it overlaps the one before, with weights of zero there.
struct RunVectors {
    std::int64_t width;
    int full, half;

    template <typename T>
    static RunVectors of(std::int64_t width) {
        const std::int64_t lanes = gemm::kVector<T>, rest = width % lanes;
        const auto full = static_cast<int>(width / lanes);
        if (rest == 0) return {width, full, 0};
        if (kHalves == 2 && rest <= kUnit<T>) return {width, full, 1};
        if (kHalves == 2 && full == 0) return {width, 0, 2};
        return {width, full + 1, 0};
    }
    template <typename T>
    std::int64_t padded() const {
        return full * gemm::kVector<T> + half * kUnit<T>;
    }
    int count() const { return full + half; }

    // Where value j of run `own` is in a strip of so many runs.
    template <typename T>
    std::int64_t place(std::int64_t own, std::int64_t runs, std::int64_t j) const {
        const std::int64_t lanes = gemm::kVector<T>, unit = kUnit<T>;
        const auto vector = static_cast<int>(j / lanes);
        if (vector < full)
            return (own * full + vector) * lanes + j - full_at(vector, full, half, lanes, width);
        const auto part = static_cast<int>((j - full * lanes) / unit);
        return runs * full * lanes + (own * half + part) * unit + j -
               half_at(part, half, unit, width);
    }
};

template <typename T>
struct Strips {
    RunVectors vectors;             // of a kernel row
    std::int64_t runs;              // kernel rows
    std::int64_t panel_runs, down;  // rows that the registers hold, and how many times that
    std::int64_t channels;

    explicit Strips(const WindowShape& s)
        : vectors(RunVectors::of<T>(s.kernel_w * s.in_channels)),
          runs(s.kernel_h),
          channels(s.out_channels) {
        const std::int64_t most = std::min(kStripRuns, kStripVectors / vectors.count());
        down = gemm::divide_up(runs, std::max<std::int64_t>(most, 1));
        panel_runs = gemm::divide_up(runs, down);
    }

    // Whether the filters of a shape are narrow.
    static bool serve(const WindowShape& s) {
        const std::int64_t width = s.kernel_w * s.in_channels;
        return s.groups == 1 && s.dilation_w == 1 && width >= kUnit<T> &&
               width <= 3 * gemm::kVector<T> &&
               Strips(s).packed_size() * std::int64_t(sizeof(T)) <= kStripBytes;
    }

    // Whole cache lines, so that no vector crosses one.
    std::int64_t strip() const {
        return gemm::round_up(panel_runs * vectors.template padded<T>(), kLine / sizeof(T));
    }
    std::int64_t runs_of(std::int64_t panel) const {
        return std::min(panel_runs, runs - panel * panel_runs);
    }
    std::int64_t panel(std::int64_t index) const { return index * channels * strip(); }
    std::int64_t packed_size() const { return panel(down); }
};

template <typename T>
void pack_strips(const WindowShape& s, const T* weight, Sum<T>* packed, const Exec& exec) {
    const Strips<Sum<T>> p(s);
    std::fill_n(packed, p.packed_size(), Sum<T>(0));
    parallel_for(s.out_channels, exec, [&](std::int64_t o) {
        for (std::int64_t run = 0; run < p.runs; ++run) {
            const std::int64_t panel = run / p.panel_runs, own = run % p.panel_runs;
            Sum<T>* strip = packed + p.panel(panel) + o * p.strip();
            for (std::int64_t j = 0; j < p.vectors.width; ++j) {
                const std::int64_t value = o * s.in_channels + j % s.in_channels;
                const std::int64_t tap = run * s.kernel_w + j / s.in_channels;
                strip[p.vectors.template place<Sum<T>>(own, p.runs_of(panel), j)] =
                    weight[value * s.taps() + tap];
            }
        }
    });
}

// Gathered positions: their vectors, and a mask for each.
template <typename T>
struct Slots {
    using Mask = std::conditional_t<(Lanes<T>::count > 8), std::uint16_t, std::uint8_t>;
    static constexpr int kBits = 8 * sizeof(Mask), kMasks = 64 / kBits;  // of a mask; in a word

    T* values;            // kSlots times `stride`
    std::uint64_t* bits;  // kSlots times `words`, 0 beyond the masks
    std::int64_t stride, words;
    int used = 0;
    std::int64_t target[kSlots] = {};  // where the position's first tap adds to the image

    static std::int64_t stride_of(std::int64_t channels) {
        return gemm::round_up(channels, gemm::kVector<T>);
    }
    static std::int64_t words_of(std::int64_t channels) {
        return gemm::divide_up(stride_of(channels), kMasks * gemm::kVector<T>);
    }
    T* value(int slot) const { return values + slot * stride; }
    Mask* masks(int slot) const { return reinterpret_cast<Mask*>(bits + slot * words); }

    // The channel of a bit.
    static std::int64_t channel(std::int64_t word, int bit) {
        return (word * kMasks + bit / kBits) * gemm::kVector<T> + bit % kBits;
    }
};

// Writes one slot.
template <typename T, bool rectify>
struct SlotWriter {
    using V = Lanes<T>;
    T* values;
    typename Slots<T>::Mask* masks;
    unsigned any = 0;

    ZF_INLINE void add(std::int64_t c, const typename V::Value& value) {
        const unsigned kept = V::template kept<rectify>(value);
        V::store(values + c, value, V::count);
        masks[c / V::count] = static_cast<typename Slots<T>::Mask>(kept);
        any |= kept;
    }
};

// Adds all slots to `runs` runs of the image, `line` apart.
template <typename T, int runs, int full, int half>
void add_slots(const Slots<T>& slots, const T* strips, std::int64_t strip, std::int64_t width,
               std::int64_t line, T* image) {
    using Full = Wide<T, kVectorBytes>;
    using Half = Wide<T, kVectorBytes / kHalves>;
    constexpr int lanes = gemm::kVector<T>, unit = kUnit<T>;
    for (int n = 0; n < slots.used; ++n) {
        const T* values = slots.value(n);
        typename Full::Value sum[runs][full > 0 ? full : 1] = {};
        typename Half::Value rest[runs][half > 0 ? half : 1] = {};
        for (std::int64_t word = 0; word < slots.words; ++word)
            for (std::uint64_t bits = slots.bits[n * slots.words + word]; bits; bits &= bits - 1) {
                const std::int64_t c = Slots<T>::channel(word, __builtin_ctzll(bits));
                const T value = values[c];
                const T* row = strips + c * strip;
#pragma GCC unroll 24
                for (int i = 0; i < runs * full; ++i)
                    sum[i / full][i % full] += value * Full::at(row + i * lanes);
#pragma GCC unroll 24
                for (int i = 0; i < runs * half; ++i)
                    rest[i / half][i % half] +=
                        value * Half::at(row + runs * full * lanes + i * unit);
            }
        T* run = image + slots.target[n];
#pragma GCC unroll 8
        for (int r = 0; r < runs; ++r, run += line) {
            // All loads before the stores, of which the later ones overwrite the overlap.
#pragma GCC unroll 3
            for (int i = 0; i < full; ++i)
                sum[r][i] += Full::at(run + full_at(i, full, half, lanes, width));
#pragma GCC unroll 2
            for (int i = 0; i < half; ++i)
                rest[r][i] += Half::at(run + half_at(i, half, unit, width));
#pragma GCC unroll 2
            for (int i = half - 1; i >= 0; --i)
                Half::at(run + half_at(i, half, unit, width)) = rest[r][i];
#pragma GCC unroll 3
            for (int i = full - 1; i >= 0; --i)
                Full::at(run + full_at(i, full, half, lanes, width)) = sum[r][i];
        }
    }
}

template <typename T>
using AddSlots = void (*)(const Slots<T>&, const T*, std::int64_t, std::int64_t, std::int64_t, T*);

template <typename T, int full, int half, int... i>
AddSlots<T> add_slots_of(std::int64_t runs, std::integer_sequence<int, i...>) {
    static constexpr AddSlots<T> table[] = {add_slots<T, i + 1, full, half>...};
    return table[runs - 1];
}
template <typename T, int full, int half>
AddSlots<T> add_slots_of(std::int64_t runs) {
    constexpr int most = std::min(kStripRuns, kStripVectors / (full + half));
    return add_slots_of<T, full, half>(runs, std::make_integer_sequence<int, most>{});
}

template <typename T>
AddSlots<T> choose_add_slots(const RunVectors& vectors, std::int64_t runs) {
    if (vectors.half == 2) return add_slots_of<T, 0, 2>(runs);
    switch (2 * vectors.full + vectors.half) {
        case 1:
            return add_slots_of<T, 0, 1>(runs);
        case 2:
            return add_slots_of<T, 1, 0>(runs);
        case 3:
            return add_slots_of<T, 1, 1>(runs);
        case 4:
            return add_slots_of<T, 2, 0>(runs);
        case 5:
            return add_slots_of<T, 2, 1>(runs);
        default:
            return add_slots_of<T, 3, 0>(runs);
    }
}

// Adds one window's maps to its image.
template <typename T, typename Stored>
void add_strips(const WindowShape& s, const MapReader<Stored>& maps, std::int64_t window,
                const T* packed, Slots<T> slots, T* image) {
    const Strips<T> p(s);
    const Channels channels{0, s.out_channels};
    const std::int64_t line = s.in_width * s.in_channels, run_line = s.dilation_h * line;
    const auto flush = [&] {
        for (std::int64_t panel = 0; panel < p.down; ++panel) {
            const std::int64_t first = panel * p.panel_runs;
            const auto add = choose_add_slots<T>(p.vectors, p.runs_of(panel));
            add(slots, packed + p.panel(panel), p.strip(), p.vectors.width, run_line,
                image + first * run_line);
        }
        slots.used = 0;
    };
    maps.with_gate([&](auto rectify, auto mask) {
        const auto start = [&] {
            return SlotWriter<T, rectify()>{slots.value(slots.used), slots.masks(slots.used)};
        };
        for (std::int64_t y = 0; y < s.out_height; ++y)
            maps.template read_row<mask()>(
                window, y, channels, start, [&](std::int64_t x, const auto& slot) {
                    slots.target[slots.used] =
                        y * s.stride_h * line + x * s.stride_w * s.in_channels;
                    slots.used += slot.any != 0;  // no branch: nobody could predict it
                    if (slots.used == kSlots) flush();
                });
        flush();
    });
}

}  // namespace zfcuda
