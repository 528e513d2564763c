// Unpooling by switches, its transpose, and the check of switches.
//
//   unpooled[n,c,y,x] = sum over the windows of (n,c) whose switch points to (y,x) of pooled, or
//                       with `overwrite` the value of the last such window in row-major order.
//   pooled[w] = unpooled[switch of w], zero with `overwrite` where a later window has the position.
//
// In channels_last each pixel gathers from the windows that contain it (1, 2 or 4 of a 3x3 window
// of stride 2), with channels as the lanes of a vector: compare the switches with the tap, add. In
// contiguous memory neighbours along a row have different windows, so a thread clears a plane and
// adds its windows in row-major order; the plane stays in the cache. Both sum in that order.
//
// Floor: one read of 5 bytes a window (float32), one write of the unpooled: a memory copy.
//
// Measured (ZFNet, batch 8, float32, Zen 4, AVX-512, one thread, processor time, medians, calls of
// both in turn, buffers reused), torch 2.13 / ours, channels_last:
//   unpool1 4.3   unpool2 1.8   unpool5 0.8   (torch: the backward pass of its pool)
//   contiguous: 1.4, 1.5, 0.7
// switch_gather, beside torch's gather by int64 indices: channels_last 1.5, 1.0, 1.1, contiguous
// 0.85, 0.5, 0.25: small planes have short rows. It reads all taps of a small window as vectors; a
// value at a time channels_last takes 2.6 times as long. The check: a twentieth of either in
// channels_last. Lost: bytes widened to integers in one step, which is scalar code in GCC 12 (2-3
// times slower).
#include "parallel.h"
#include "pool_row.h"
#include "unpool_rows.h"

namespace zfcuda {
namespace {

struct Position {
    std::int64_t y, x;
};

Position pointed(const PoolShape& s, std::int64_t oy, std::int64_t ox, std::int64_t tap) {
    return {oy * s.stride_h - s.padding_h + tap / s.kernel_w * s.dilation_h,
            ox * s.stride_w - s.padding_w + tap % s.kernel_w * s.dilation_w};
}

// The distance in storage from tap 0 of a window to each tap.
struct Distances {
    std::int64_t to[256];

    explicit Distances(const PoolShape& s) : to{} {
        const Layout in = s.input();
        for (std::int64_t tap = 0; tap < s.kernel_h * s.kernel_w; ++tap)
            to[tap] = tap / s.kernel_w * s.dilation_h * in.step_y() +
                      tap % s.kernel_w * s.dilation_w * in.step_x();
    }
};

// body(window, corner) for a row of windows, both storage indices of channel c; `corner` is tap 0
// in the unpooled tensor (perhaps outside it).
template <typename Body>
void for_row(const PoolShape& s, std::int64_t n, std::int64_t c, std::int64_t oy, Body&& body) {
    const Layout in = s.input(), out = s.output();
    std::int64_t window = out.offset(n, c, oy, 0);
    std::int64_t corner = in.offset(n, c, oy * s.stride_h - s.padding_h, -s.padding_w);
    for (std::int64_t ox = 0; ox < s.out_width; ++ox) {
        body(window, corner);
        window += out.step_x();
        corner += s.stride_w * in.step_x();
    }
}

// One contiguous plane.
template <typename T>
void scatter_plane(const PoolShape& s, bool overwrite, const Distances& distances,
                   std::int64_t plane, const T* pooled, const std::uint8_t* switches, T* unpooled) {
    const std::int64_t n = plane / s.channels, c = plane % s.channels;
    std::fill_n(unpooled + s.input().offset(n, c, 0, 0), s.in_height * s.in_width, T(0));
    for (std::int64_t oy = 0; oy < s.out_height; ++oy)
        for_row(s, n, c, oy, [&](std::int64_t window, std::int64_t corner) {
            T& target = unpooled[corner + distances.to[switches[window]]];
            target = overwrite ? pooled[window] : target + pooled[window];
        });
}

// The same of halves, part after part as floats: a sum is rounded once.
template <typename T>
void scatter_parts(const PoolShape& s, bool overwrite, const Distances& distances,
                   std::int64_t plane, const T* pooled, const std::uint8_t* switches, T* unpooled) {
    constexpr std::int64_t kPart = 4096;
    const std::int64_t n = plane / s.channels, c = plane % s.channels;
    const std::int64_t start = s.input().offset(n, c, 0, 0), size = s.in_height * s.in_width;
    Sum<T> sums[kPart];
    for (std::int64_t begin = 0; begin < size; begin += kPart) {
        const std::int64_t count = std::min(kPart, size - begin);
        const WindowRows rows(s, begin / s.in_width, (begin + count - 1) / s.in_width + 1);
        std::fill_n(sums, count, Sum<T>(0));
        for (std::int64_t oy = rows.first; oy < rows.last; ++oy)
            for_row(s, n, c, oy, [&](std::int64_t window, std::int64_t corner) {
                const std::int64_t at = corner + distances.to[switches[window]] - start - begin;
                if (at < 0 || at >= count) return;
                sums[at] = overwrite ? Sum<T>(pooled[window]) : sums[at] + pooled[window];
            });
        for (std::int64_t i = 0; i < count; ++i) unpooled[start + begin + i] = T(sums[i]);
    }
}

// Whether a later window points to the position of the window `here`, (oy, ox).
bool overwritten(const PoolShape& s, std::int64_t n, std::int64_t c, std::int64_t oy,
                 std::int64_t ox, std::int64_t here, const std::uint8_t* switches) {
    const Position at = pointed(s, oy, ox, switches[here]);
    std::int64_t owner = here;
    for_windows2d(s, n, c, at.y, at.x, [&](std::int64_t window, std::int64_t tap) {
        if (switches[window] == tap) owner = window;
    });
    return owner != here;
}

// The rows that storage consists of: (n, oy) in channels_last, (n, c, oy) otherwise.
std::int64_t row_images(const PoolShape& s) {
    return s.channels_last ? s.batch : s.batch * s.channels;
}

// body(n, c, oy) for row `row`; channels_last rows begin at channel 0 and hold all of them.
template <typename Body>
auto with_row(const PoolShape& s, std::int64_t row, Body&& body) {
    const std::int64_t image = row / s.out_height, oy = row % s.out_height;
    return s.channels_last ? body(image, std::int64_t(0), oy)
                           : body(image / s.channels, image % s.channels, oy);
}

// Up to so many taps it is faster to read all of them than the one of each switch.
constexpr std::int64_t kSelected = 16;

// `vectors` vectors of channels of one window, or the first `lanes` lanes of one: all taps are
// read, and the lanes kept whose switch it is.
template <int vectors, typename T>
void select_channels(const T* corner, const TapList& taps, const std::uint8_t* switches,
                     std::int64_t lanes, T* pooled) {
    using V = Lanes<T>;
    typename V::Integer where[vectors];
    typename V::Value value[vectors] = {};
    for (int v = 0; v < vectors; ++v) where[v] = V::load_bytes(switches + v * V::count, lanes);
    for (std::int64_t t = 0; t < taps.count; ++t) {
        const auto tap = static_cast<typename V::Int>(taps.tap[t]);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
            const typename V::Value there = V::load(corner + taps.offset[t] + v * V::count, lanes);
            value[v] = where[v] == tap ? there : value[v];
        }
    }
    for (int v = 0; v < vectors; ++v) V::store(pooled + v * V::count, value[v], lanes);
}

// One row of windows of a channels_last tensor.
template <typename T>
void select_row(const PoolShape& s, std::int64_t n, std::int64_t oy, const T* unpooled,
                const std::uint8_t* switches, T* pooled) {
    constexpr std::int64_t count = Lanes<T>::count;
    const Layout in = s.input();
    const bool ahead = s.inputs() * std::int64_t(sizeof(T)) > kCached;
    const std::int64_t row = s.output().offset(n, 0, oy, 0);
    for_windows_of_row(
        s, oy, unpooled + n * in.step_image(), [&](std::int64_t y) { return y * in.step_y(); },
        s.channels, ahead,
        [&](std::int64_t ox, const T* corner, const TapList& taps) {
            const std::uint8_t* const where = switches + row + ox * s.channels;
            T* const to = pooled + row + ox * s.channels;
            std::int64_t c = 0;
            for (; c + 4 * count <= s.channels; c += 4 * count)
                select_channels<4>(corner + c, taps, where + c, count, to + c);
            for (; c < s.channels; c += count)
                select_channels<1>(corner + c, taps, where + c, std::min(count, s.channels - c),
                                   to + c);
        });
}

// One row of windows of a plane, or of all channels, a value at a time.
template <typename T>
void gather_row(const PoolShape& s, const Distances& distances, std::int64_t n, std::int64_t c,
                std::int64_t oy, const T* unpooled, const std::uint8_t* switches, T* pooled) {
    for_row(s, n, c, oy, [&](std::int64_t window, std::int64_t corner) {
        const T* const from = unpooled + corner;
        if (!s.channels_last)
            pooled[window] = from[distances.to[switches[window]]];
        else
            for (std::int64_t i = 0; i < s.channels; ++i)
                pooled[window + i] = from[distances.to[switches[window + i]] + i];
    });
}

// The windows of row oy that lie inside the input as a whole.
Span whole_windows(const PoolShape& s, std::int64_t oy) {
    const std::int64_t high = (s.kernel_h - 1) * s.dilation_h,
                       wide = (s.kernel_w - 1) * s.dilation_w;
    const std::int64_t top = oy * s.stride_h - s.padding_h;
    Span whole(-s.padding_w, s.out_width, s.stride_w, s.in_width - wide);
    if (top < 0 || top + high >= s.in_height || whole.first > whole.last) whole.last = whole.first;
    return whole;
}

}  // namespace

void max_unpool2d(const PoolShape& s, Dtype dtype, bool overwrite, Address pooled, Address switches,
                  Address unpooled, const Exec& exec) {
    with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        const auto* values = pooled.as<const T>();
        const auto* taps = switches.as<const std::uint8_t>();
        if (s.channels_last)
            return parallel_for(s.batch * s.in_height, exec, [&](std::int64_t row) {
                const std::int64_t n = row / s.in_height, y = row % s.in_height;
                T* const to = unpooled.as<T>() + s.input().offset(n, 0, y, 0);
                const Unpool<T> unpool{s, Gate::none, overwrite, values, taps, nullptr};
                unpool.gather(n, 0, s.channels, y, y + 1, to);
            });
        const Distances distances(s);
        parallel_for(s.batch * s.channels, exec, [&](std::int64_t plane) {
            T* const to = unpooled.as<T>();
            if constexpr (std::is_same_v<T, Sum<T>>)
                scatter_plane(s, overwrite, distances, plane, values, taps, to);
            else
                scatter_parts(s, overwrite, distances, plane, values, taps, to);
        });
    });
}

void switch_gather(const PoolShape& s, Dtype dtype, bool overwrite, Address unpooled,
                   Address switches, Address pooled, const Exec& exec) {
    const auto* taps = switches.as<const std::uint8_t>();
    const std::int64_t lanes = s.channels_last ? s.channels : 1;
    const Distances distances(s);
    with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        const auto* from = unpooled.as<const T>();
        auto* to = pooled.as<T>();
        parallel_for(row_images(s) * s.out_height, exec, [&](std::int64_t row) {
            with_row(s, row, [&](std::int64_t n, std::int64_t c, std::int64_t oy) {
                if (s.channels_last && s.kernel_h * s.kernel_w <= kSelected)
                    select_row(s, n, oy, from, taps, to);
                else
                    gather_row(s, distances, n, c, oy, from, taps, to);
                const std::int64_t first = s.output().offset(n, c, oy, 0);
                for (std::int64_t i = 0; overwrite && i < s.out_width * lanes; ++i)
                    if (overwritten(s, n, c + i % lanes, oy, i / lanes, first + i, taps))
                        to[first + i] = T(0);
            });
        });
    });
}

void find_invalid_switch(const PoolShape& s, Address switches, Address first_invalid,
                         const Exec& exec) {
    const auto* taps = switches.as<const std::uint8_t>();
    const std::int64_t lanes = s.channels_last ? s.channels : 1;
    const std::int64_t none = s.outputs(), window_size = s.kernel_h * s.kernel_w;
    std::int64_t down[256], right[256];  // from a window's first position to that of each tap
    for (std::int64_t tap = 0; tap < window_size; ++tap) {
        down[tap] = tap / s.kernel_w * s.dilation_h;
        right[tap] = tap % s.kernel_w * s.dilation_w;
    }
    const auto first_of_row = [&](std::int64_t n, std::int64_t c, std::int64_t oy) {
        const std::int64_t row = s.output().offset(n, c, oy, 0);
        // Switches of whole windows need only be less than the window's size.
        Span whole = whole_windows(s, oy);
        std::uint8_t largest = 0;
        for (std::int64_t i = whole.first * lanes; i < whole.last * lanes; ++i)
            largest = std::max(largest, taps[row + i]);
        if (largest >= window_size) whole.last = whole.first;
        for (std::int64_t ox = 0; ox < s.out_width; ++ox) {
            if (ox == whole.first && whole.last > ox) {
                ox = whole.last - 1;
                continue;
            }
            const std::int64_t top = oy * s.stride_h - s.padding_h;
            const std::int64_t left = ox * s.stride_w - s.padding_w;
            for (std::int64_t i = ox * lanes; i < (ox + 1) * lanes; ++i) {
                const std::uint8_t tap = taps[row + i];
                if (tap >= window_size) return row + i;
                const std::int64_t y = top + down[tap], x = left + right[tap];
                if (y < 0 || y >= s.in_height || x < 0 || x >= s.in_width) return row + i;
            }
        }
        return none;
    };
    const std::int64_t rows = row_images(s) * s.out_height;
    const std::int64_t first = parallel_min(
        rows, none, exec, [&](std::int64_t row) { return with_row(s, row, first_of_row); });
    *first_invalid.as<std::int64_t>() = first < none ? first : -1;
}

}  // namespace zfcuda
