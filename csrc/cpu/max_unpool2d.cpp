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
// Lost: bytes widened to integers in one step, which is scalar code in GCC 12 (2-3 times slower).
#include "parallel.h"
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
                unpool.rows(n, 0, s.channels, y, y + 1, to);
            });
        const Distances distances(s);
        parallel_for(s.batch * s.channels, exec, [&](std::int64_t plane) {
            scatter_plane(s, overwrite, distances, plane, values, taps, unpooled.as<T>());
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
                std::int64_t ox = 0;
                for_row(s, n, c, oy, [&](std::int64_t window, std::int64_t corner) {
                    for (std::int64_t i = 0; i < lanes; ++i)
                        to[window + i] = from[corner + distances.to[taps[window + i]] + i];
                    for (std::int64_t i = 0; overwrite && i < lanes; ++i)
                        if (overwritten(s, n, c + i, oy, ox, window + i, taps)) to[window + i] = 0;
                    ++ox;
                });
            });
        });
    });
}

void find_invalid_switch(const PoolShape& s, Address switches, Address first_invalid,
                         const Exec& exec) {
    const auto* taps = switches.as<const std::uint8_t>();
    const std::int64_t lanes = s.channels_last ? s.channels : 1;
    const std::int64_t none = s.outputs(), window_size = s.kernel_h * s.kernel_w;
    const auto inside = [&](std::int64_t oy, std::int64_t ox, std::int64_t tap) {
        const Position at = pointed(s, oy, ox, tap);
        return at.y >= 0 && at.y < s.in_height && at.x >= 0 && at.x < s.in_width;
    };
    const auto first_of_row = [&](std::int64_t n, std::int64_t c, std::int64_t oy) {
        const std::int64_t row = s.output().offset(n, c, oy, 0);
        for (std::int64_t ox = 0; ox < s.out_width; ++ox) {
            const std::uint8_t* window = taps + row + ox * lanes;
            std::uint8_t largest = 0;
            for (std::int64_t i = 0; i < lanes; ++i) largest = std::max(largest, window[i]);
            if (largest < window_size && inside(oy, ox, 0) && inside(oy, ox, window_size - 1))
                continue;
            for (std::int64_t i = 0; i < lanes; ++i)
                if (window[i] >= window_size || !inside(oy, ox, window[i]))
                    return row + ox * lanes + i;
        }
        return none;
    };
    const std::int64_t rows = row_images(s) * s.out_height;
    const std::int64_t first = parallel_min(
        rows, none, exec, [&](std::int64_t row) { return with_row(s, row, first_of_row); });
    *first_invalid.as<std::int64_t>() = first < none ? first : -1;
}

}  // namespace zfcuda
