// Unpooling by switches, its transpose, and the check of switches.
//
//   unpooled[n,c,y,x] = sum over the windows of (n,c) whose switch points to (y,x) of pooled, or
//                       with `overwrite` the value of the last such window in row-major order.
//   pooled[w] = unpooled[switch of w], zero with `overwrite` where a later window has the position.
#include "parallel.h"

namespace zfcuda {
namespace {

// The windows along one dimension that contain position `at`, in increasing order: body(window,
// tap) for window * stride - padding + tap * dilation == at.
template <typename Body>
void for_windows(std::int64_t at, std::int64_t count, std::int64_t kernel, std::int64_t stride,
                 std::int64_t padding, std::int64_t dilation, Body&& body) {
    const std::int64_t reach = at + padding - (kernel - 1) * dilation;
    const std::int64_t first = reach > 0 ? (reach + stride - 1) / stride : 0;
    for (std::int64_t window = first; window < count; ++window) {
        const std::int64_t distance = at + padding - window * stride;
        if (distance < 0) return;
        if (distance % dilation == 0) body(window, distance / dilation);
    }
}

// body(index, switch) for each window of plane (n, c) that contains (y, x), in row-major order.
template <typename Body>
void for_windows2d(const PoolShape& s, std::int64_t n, std::int64_t c, std::int64_t y,
                   std::int64_t x, Body&& body) {
    for_windows(y, s.out_height, s.kernel_h, s.stride_h, s.padding_h, s.dilation_h,
                [&](std::int64_t oy, std::int64_t i) {
                    for_windows(x, s.out_width, s.kernel_w, s.stride_w, s.padding_w, s.dilation_w,
                                [&](std::int64_t ox, std::int64_t j) {
                                    body(s.output().offset(n, c, oy, ox), i * s.kernel_w + j);
                                });
                });
}

struct Position {
    std::int64_t y, x;
};

Position pointed(const PoolShape& s, std::int64_t oy, std::int64_t ox, std::int64_t tap) {
    return {oy * s.stride_h - s.padding_h + tap / s.kernel_w * s.dilation_h,
            ox * s.stride_w - s.padding_w + tap % s.kernel_w * s.dilation_w};
}

}  // namespace

void max_unpool2d(const PoolShape& s, Dtype dtype, bool overwrite, Address pooled,
                  Address switches, Address unpooled, const Exec& exec) {
    with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        const auto* from = pooled.as<const T>();
        const auto* taps = switches.as<const std::uint8_t>();
        parallel_for(s.batch * s.channels, exec, [&](std::int64_t plane) {
            const std::int64_t n = plane / s.channels, c = plane % s.channels;
            for (std::int64_t y = 0; y < s.in_height; ++y)
                for (std::int64_t x = 0; x < s.in_width; ++x) {
                    T sum = 0;
                    for_windows2d(s, n, c, y, x, [&](std::int64_t window, std::int64_t tap) {
                        if (taps[window] != tap) return;
                        sum = overwrite ? from[window] : sum + from[window];
                    });
                    unpooled.as<T>()[s.input().offset(n, c, y, x)] = sum;
                }
        });
    });
}

void switch_gather(const PoolShape& s, Dtype dtype, bool overwrite, Address unpooled,
                   Address switches, Address pooled, const Exec& exec) {
    with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        const auto* taps = switches.as<const std::uint8_t>();
        parallel_for(s.batch * s.channels, exec, [&](std::int64_t plane) {
            const std::int64_t n = plane / s.channels, c = plane % s.channels;
            for (std::int64_t oy = 0; oy < s.out_height; ++oy)
                for (std::int64_t ox = 0; ox < s.out_width; ++ox) {
                    const std::int64_t here = s.output().offset(n, c, oy, ox);
                    const Position at = pointed(s, oy, ox, taps[here]);
                    std::int64_t owner = here;
                    if (overwrite)
                        for_windows2d(s, n, c, at.y, at.x, [&](std::int64_t w, std::int64_t tap) {
                            if (taps[w] == tap) owner = w;
                        });
                    pooled.as<T>()[here] =
                        owner == here ? unpooled.as<const T>()[s.input().offset(n, c, at.y, at.x)]
                                      : T(0);
                }
        });
    });
}

void find_invalid_switch(const PoolShape& s, Address switches, Address first_invalid,
                         const Exec& exec) {
    const auto* taps = switches.as<const std::uint8_t>();
    const std::int64_t none = s.outputs();
    const std::int64_t first = parallel_min(s.batch * s.channels, none, exec, [&](std::int64_t p) {
        std::int64_t invalid = none;
        for (std::int64_t oy = 0; oy < s.out_height; ++oy)
            for (std::int64_t ox = 0; ox < s.out_width; ++ox) {
                const std::int64_t here =
                    s.output().offset(p / s.channels, p % s.channels, oy, ox);
                const Position at = pointed(s, oy, ox, taps[here]);
                const bool valid = taps[here] < s.kernel_h * s.kernel_w && at.y >= 0 &&
                                   at.y < s.in_height && at.x >= 0 && at.x < s.in_width;
                if (!valid) invalid = std::min(invalid, here);
            }
        return invalid;
    });
    *first_invalid.as<std::int64_t>() = first < none ? first : -1;
}

}  // namespace zfcuda
