// Which windows of a pool cover a position, for whatever gathers by switches.
//
//                   windows that cover row y: those oy with
//   0 <= y + padding - oy * stride <= (kernel - 1) * dilation, a multiple of dilation
//
// They are about (extent / stride)² for a position.
#pragma once

#include "places.cuh"

namespace zfcuda {

// One dimension of the windows; `extent` is (kernel - 1) * dilation.
struct WindowAxis {
    int windows, kernel, padding, extent;
    Divisor stride, dilation;

    WindowAxis(std::int64_t count, std::int64_t kernel_size, std::int64_t stride_size,
               std::int64_t padding_size, std::int64_t dilation_size)
        : windows(static_cast<int>(count)),
          kernel(static_cast<int>(kernel_size)),
          padding(static_cast<int>(padding_size)),
          extent(static_cast<int>((kernel_size - 1) * dilation_size)),
          stride(stride_size),
          dilation(dilation_size) {}

    // The windows whose extent covers a position: first <= window <= last.
    ZF_HD int first(int position) const {
        const int start = position + padding - extent;
        return start > 0 ? stride.ceil_divide(start) : 0;
    }
    ZF_HD int last(int position) const {
        const int window = stride.divide(position + padding);
        return window < windows ? window : windows - 1;
    }
    // Which of a covering window's taps lies at the position, or -1 between taps.
    ZF_HD int tap(int position, int window) const {
        const int distance = position + padding - window * static_cast<int>(stride.divisor);
        const int index = dilation.divide(distance);
        return index * static_cast<int>(dilation.divisor) == distance ? index : -1;
    }
    ZF_HD int position(int window, int tap_index) const {
        return window * static_cast<int>(stride.divisor) - padding +
               tap_index * static_cast<int>(dilation.divisor);
    }
};

// How windows and positions of a tensor correspond.
struct Windows {
    WindowAxis y, x;
    Places pooled, unpooled;
    int height, width;  // of the unpooled tensor

    Windows(const PoolShape& s, int vector)
        : y(s.out_height, s.kernel_h, s.stride_h, s.padding_h, s.dilation_h),
          x(s.out_width, s.kernel_w, s.stride_w, s.padding_w, s.dilation_w),
          pooled(s.output(), s.batch, vector),
          unpooled(s.input(), s.batch, vector),
          height(static_cast<int>(s.in_height)),
          width(static_cast<int>(s.in_width)) {}
};

// body(window's offset in the pooled tensors, switch that points here) for the windows that cover
// a place of the unpooled tensor, in row-major order.
template <typename Body>
__device__ void for_each_window(const Windows& w, const Place& place, Body&& body) {
    const int last_y = w.y.last(place.y), last_x = w.x.last(place.x);
    for (int oy = w.y.first(place.y); oy <= last_y; ++oy) {
        const int i = w.y.tap(place.y, oy);
        if (i < 0) continue;
        for (int ox = w.x.first(place.x); ox <= last_x; ++ox) {
            const int j = w.x.tap(place.x, ox);
            if (j >= 0) body(w.pooled.offset(place.slab, oy, ox, place.inner), i * w.x.kernel + j);
        }
    }
}

}  // namespace zfcuda
