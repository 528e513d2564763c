// The maxima of windows and their switches, a vector of outputs at a time: what max_pool2d.cpp and
// conv2d_relu_max_pool2d.cpp share; and the walk over windows, which switch_gather shares too.
//
//   channels_last   lanes are the channels of one window; four vectors together, so that a tap's
//                   address is computed once for them
//   contiguous      lanes are neighbouring windows of a row (max_pool2d.cpp)
//
// A fused ReLU costs nothing: the maximum starts from 0 in place of -infinity, and what is not
// positive never wins. The window's first valid position then stays its switch, as in a window
// that the ReLU has cleared. NaN is only looked for: a comparison passes over it, and a window
// that held one is gone through again by the rule for NaN.
#pragma once

#include <algorithm>
#include <limits>

#include "../ops.h"
#include "lanes.h"

namespace zfcuda {

// The taps i of a window that starts at `start` for which start + i * dilation lies in [0, size).
struct Span {
    std::int64_t first, last;

    Span(std::int64_t start, std::int64_t kernel, std::int64_t dilation, std::int64_t size)
        : first(start < 0 ? (-start + dilation - 1) / dilation : 0), last(kernel) {
        while (last > first && start + (last - 1) * dilation >= size) --last;
    }
    bool operator==(const Span& other) const { return first == other.first && last == other.last; }
};

inline Span row_span(const PoolShape& s, std::int64_t oy) {
    return Span(oy * s.stride_h - s.padding_h, s.kernel_h, s.dilation_h, s.in_height);
}
inline Span column_span(const PoolShape& s, std::int64_t ox) {
    return Span(ox * s.stride_w - s.padding_w, s.kernel_w, s.dilation_w, s.in_width);
}

// A tensor of more bytes than this comes from memory, and is fetched ahead of its windows.
constexpr std::int64_t kCached = 1 << 20;

// What a maximum starts from.
template <typename T>
constexpr Sum<T> least(bool relu) {
    return relu ? Sum<T>(0) : -std::numeric_limits<Sum<T>>::infinity();
}

// The running maximum of each lane, and its tap.
template <typename T>
struct Best {
    using V = Lanes<T>;
    typename V::Value value;
    typename V::Integer tap, unordered{};  // unordered: whether a NaN was met

    // Taps come in order, so that the first of equals stays; `nans`: the last NaN wins over all.
    template <bool nans>
    void meet(const typename V::Value& candidate, std::int64_t which) {
        const typename V::Integer nan = candidate != candidate;
        const typename V::Integer more = candidate > value;
        const typename V::Integer take = nans ? more | nan : more;
        tap = take ? typename V::Integer{} + static_cast<typename V::Int>(which) : tap;
        value = take ? candidate : value;
        unordered |= nan;
    }
};

// The taps of a window that lie inside, in row-major order: where they are, and their switches.
struct TapList {
    std::int64_t count = 0;
    std::int64_t offset[256], tap[256];
};

// `vectors` vectors of channels of one window, or the first `lanes` lanes of one.
template <int vectors, bool nans, typename T>
void pool_channels(const T* corner, const TapList& taps, Sum<T> start, std::int64_t lanes,
                   T* output, std::uint8_t* switches) {
    using V = Lanes<T>;
    Best<T> best[vectors];
    for (int v = 0; v < vectors; ++v) {
        best[v].value = typename V::Value{} + start;
        best[v].tap = typename V::Integer{} + static_cast<typename V::Int>(taps.tap[0]);
    }
    for (std::int64_t t = 0; t < taps.count; ++t)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v)
            best[v].template meet<nans>(V::load(corner + taps.offset[t] + v * V::count, lanes),
                                        taps.tap[t]);
    typename V::Integer unordered{};
    for (int v = 0; v < vectors; ++v) {
        V::store(output + v * V::count, best[v].value, lanes);
        V::store_bytes(switches + v * V::count, best[v].tap, lanes);
        unordered |= best[v].unordered;
    }
    if (!nans && V::any(unordered))
        pool_channels<vectors, true>(corner, taps, start, lanes, output, switches);
}

// body(ox, corner, taps) for the windows of row oy; row y of the input begins at input + row(y),
// its pixels are `step` elements apart. `ahead` fetches what the windows to come will read, for an
// input that comes from memory.
template <typename T, typename Row, typename Body>
void for_windows_of_row(const PoolShape& s, std::int64_t oy, const T* input, Row&& row,
                        std::int64_t step, bool ahead, Body&& body) {
    constexpr std::int64_t line = 64 / sizeof(T), distance = 8;
    const Span rows = row_span(s, oy);
    const std::int64_t top = oy * s.stride_h - s.padding_h, stride = s.stride_w * step;
    const std::int64_t fresh = std::max(rows.first, s.kernel_h - s.stride_h);
    TapList taps;
    Span columns(0, 0, 1, 1);
    for (std::int64_t ox = 0; ox < s.out_width; ++ox) {
        if (const Span now = column_span(s, ox); ox == 0 || !(now == columns)) {
            columns = now;
            taps.count = 0;
            for (std::int64_t i = rows.first; i < rows.last; ++i)
                for (std::int64_t j = columns.first; j < columns.last; ++j) {
                    taps.offset[taps.count] = row(top + i * s.dilation_h) + j * s.dilation_w * step;
                    taps.tap[taps.count++] = i * s.kernel_w + j;
                }
        }
        const T* const corner = input + ox * stride - s.padding_w * step;
        for (std::int64_t i = fresh; ahead && i < rows.last; ++i)
            for (std::int64_t k = 0; k < stride; k += line)
                __builtin_prefetch(corner + row(top + i * s.dilation_h) + distance * stride + k);
        body(ox, corner, taps);
    }
}

// One row of windows, oy: maxima and switches of `channels` channels, `out_step` elements from
// window to window.
template <typename T, typename Row>
void pool_row(const PoolShape& s, std::int64_t oy, const T* input, Row&& row, std::int64_t in_step,
              std::int64_t channels, Sum<T> start, bool ahead, T* output, std::uint8_t* switches,
              std::int64_t out_step) {
    constexpr std::int64_t count = Lanes<T>::count;
    for_windows_of_row(
        s, oy, input, row, in_step, ahead,
        [&](std::int64_t ox, const T* corner, const TapList& taps) {
            T* const to = output + ox * out_step;
            std::uint8_t* const where = switches + ox * out_step;
            std::int64_t c = 0;
            for (; c + 4 * count <= channels; c += 4 * count)
                pool_channels<4, false>(corner + c, taps, start, count, to + c, where + c);
            for (; c < channels; c += count)
                pool_channels<1, false>(corner + c, taps, start, std::min(count, channels - c),
                                        to + c, where + c);
        });
}

}  // namespace zfcuda
