// Unpooling by switches into rows of pixels whose channels are neighbours: all of a channels_last
// tensor (max_unpool2d.cpp), or a few rows in the cache (unpool_relu_deconv2d.cpp), behind a gate.
//
//   maps[y,x] = rectifier of the sum over the windows whose switch points to (y,x) of masked pooled
//
// Each value is masked before the sum, the sum rectified after it, as the gate has it. In
// channels_last a pixel gathers from the windows that contain it (1, 2 or 4 of a 3x3 window of
// stride 2), with channels as the lanes of a vector: compare the switches with the tap, add. From
// planes the windows of a channel are scattered, in row-major order. Both sum in that order.
#pragma once

#include <algorithm>

#include "../ops.h"
#include "lanes.h"

namespace zfcuda {

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

// The rows [first, last) of windows that reach the input rows [top, bottom).
struct WindowRows {
    std::int64_t first, last;

    WindowRows(const PoolShape& s, std::int64_t top, std::int64_t bottom) {
        const std::int64_t begin = top + s.padding_h - (s.kernel_h - 1) * s.dilation_h;
        first = begin > 0 ? (begin + s.stride_h - 1) / s.stride_h : 0;
        last = std::min(s.out_height, (bottom - 1 + s.padding_h) / s.stride_h + 1);
    }
};

template <typename T>
struct Unpool {
    using V = Lanes<T>;
    const PoolShape& s;
    Gate gate;
    bool overwrite;  // the last window in row-major order, in place of the sum
    const T* pooled;
    const std::uint8_t* switches;
    const T* forward;  // of the pooled size; null where the gate has no mask

    // Rows [top, bottom) of `count` channels of image n from `first` on, pixel after pixel.
    void rows(std::int64_t n, std::int64_t first, std::int64_t count, std::int64_t top,
              std::int64_t bottom, Sum<T>* maps) const {
        if (s.channels_last)
            gather(n, first, count, top, bottom, maps);
        else
            scatter(n, first, count, top, bottom, maps);
    }

    // The same of channels_last tensors, as T or as Sum<T>.
    template <typename To>
    void gather(std::int64_t n, std::int64_t first, std::int64_t count, std::int64_t top,
                std::int64_t bottom, To* maps) const {
        for (std::int64_t y = top; y < bottom; ++y)
            for (std::int64_t x = 0; x < s.in_width; ++x, maps += count)
                gather_pixel(n, first, count, y, x, maps);
    }

  private:
    bool rectifies() const { return gate == Gate::deconvnet || gate == Gate::guided; }

    template <typename To>
    void gather_pixel(std::int64_t n, std::int64_t first, std::int64_t count, std::int64_t y,
                      std::int64_t x, To* pixel) const {
        std::int64_t windows[256], taps[256], found = 0;
        for_windows2d(s, n, first, y, x, [&](std::int64_t window, std::int64_t tap) {
            windows[found] = window;
            taps[found++] = tap;
        });
        for (std::int64_t c = 0; c < count; c += V::count) {
            const std::int64_t lanes = std::min<std::int64_t>(V::count, count - c);
            typename V::Value sum{};
            for (std::int64_t i = 0; i < found; ++i) {
                typename V::Value value = V::load(pooled + windows[i] + c, lanes);
                if (forward) {
                    const typename V::Value mask = V::load(forward + windows[i] + c, lanes);
                    value = mask <= 0 ? typename V::Value{} : value;
                }
                const typename V::Integer hit = V::load_bytes(switches + windows[i] + c, lanes) ==
                                                static_cast<typename V::Int>(taps[i]);
                sum = hit ? (overwrite ? value : sum + value) : sum;
            }
            if (rectifies()) sum = sum <= 0 ? typename V::Value{} : sum;
            Lanes<To>::store(pixel + c, sum, lanes);
        }
    }

    void scatter(std::int64_t n, std::int64_t first, std::int64_t count, std::int64_t top,
                 std::int64_t bottom, Sum<T>* maps) const {
        const std::int64_t size = (bottom - top) * s.in_width * count;
        const WindowRows rows(s, top, bottom);
        std::fill_n(maps, size, Sum<T>(0));
        for (std::int64_t c = 0; c < count; ++c)
            for (std::int64_t oy = rows.first; oy < rows.last; ++oy) {
                const std::int64_t row = s.output().offset(n, first + c, oy, 0);
                for (std::int64_t ox = 0; ox < s.out_width; ++ox) {
                    const std::int64_t i = switches[row + ox] / s.kernel_w;
                    const std::int64_t j = switches[row + ox] - i * s.kernel_w;
                    const std::int64_t y = oy * s.stride_h - s.padding_h + i * s.dilation_h;
                    const std::int64_t x = ox * s.stride_w - s.padding_w + j * s.dilation_w;
                    if (y < top || y >= bottom) continue;
                    Sum<T>& target = maps[((y - top) * s.in_width + x) * count + c];
                    const bool blocked = forward && forward[row + ox] <= 0;
                    const Sum<T> value = blocked ? Sum<T>(0) : Sum<T>(pooled[row + ox]);
                    target = overwrite ? value : target + value;
                }
            }
        if (rectifies())
            for (std::int64_t i = 0; i < size; ++i) maps[i] = maps[i] <= 0 ? Sum<T>(0) : maps[i];
    }
};

}  // namespace zfcuda
