// Max-pooling that records switches.
//
//   output[n,c,oy,ox] = max over the window;  switches = i * kernel_w + j of the first maximum in
//   row-major order, or of the last NaN, as in torch. The window's first valid position is the
//   switch of a window of -inf.
//
// Neighbouring outputs are the lanes of a vector: channels of one pixel in channels_last, columns
// of one row in contiguous memory. For each tap, all lanes compare and keep value and tap.
//
//   channels_last  lanes c, c+1, …    read input + c                    (step 1)
//   contiguous     lanes ox, ox+1, …  read input + ox * stride_w + tap  (step stride_w; a constant
//                                     for 1 and 2, so that the compiler shuffles, not gathers)
//
// Floor: one read of the input, one write of 5 bytes an output (float32): a memory copy.
#include <cmath>
#include <limits>
#include <type_traits>

#include "parallel.h"

namespace zfcuda {
namespace {

constexpr std::int64_t kLanes = 64;

// The taps i of a window that starts at `start` for which start + i * dilation lies in [0, size).
struct Taps {
    std::int64_t first, last;

    Taps(std::int64_t start, std::int64_t kernel, std::int64_t dilation, std::int64_t size)
        : first(start < 0 ? (-start + dilation - 1) / dilation : 0), last(kernel) {
        while (last > first && start + (last - 1) * dilation >= size) --last;
    }
};

// The running maximum of each lane, and its tap as an integer as wide as the value.
template <typename T>
struct Best {
    using Tap = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;
    T value[kLanes];
    Tap tap[kLanes];

    // Lanes [from, to) meet source[lane * step] through `which`.
    template <typename Step>
    void meet(const T* source, Step step, Tap which, std::int64_t from, std::int64_t to) {
        for (std::int64_t lane = from; lane < to; ++lane) {
            const T candidate = source[lane * step];
            const bool take = (candidate > value[lane]) | (candidate != candidate);
            tap[lane] = take ? which : tap[lane];
            value[lane] = take ? candidate : value[lane];
        }
    }
    void store(T* output, std::uint8_t* switches, std::int64_t lanes) const {
        for (std::int64_t lane = 0; lane < lanes; ++lane) output[lane] = value[lane];
        for (std::int64_t lane = 0; lane < lanes; ++lane)
            switches[lane] = static_cast<std::uint8_t>(tap[lane]);
    }
};

template <typename T>
struct Pool {
    PoolShape s;
    const T* input;
    T* output;
    std::uint8_t* switches;

    Taps rows(std::int64_t oy) const {
        return Taps(oy * s.stride_h - s.padding_h, s.kernel_h, s.dilation_h, s.in_height);
    }
    Taps columns(std::int64_t ox) const {
        return Taps(ox * s.stride_w - s.padding_w, s.kernel_w, s.dilation_w, s.in_width);
    }

    // One row of outputs of channels_last tensors: a pixel at a time, lanes are channels.
    void row_of_pixels(std::int64_t n, std::int64_t oy) const {
        const Layout in = s.input(), out = s.output();
        const Taps rows = this->rows(oy);
        Best<T> best;
        for (std::int64_t ox = 0; ox < s.out_width; ++ox) {
            const Taps columns = this->columns(ox);
            const auto corner = static_cast<typename Best<T>::Tap>(rows.first * s.kernel_w +
                                                                   columns.first);
            for (std::int64_t c = 0; c < s.channels; c += kLanes) {
                const std::int64_t lanes = std::min(kLanes, s.channels - c);
                std::fill_n(best.value, lanes, -std::numeric_limits<T>::infinity());
                std::fill_n(best.tap, lanes, corner);
                for (std::int64_t i = rows.first; i < rows.last; ++i)
                    for (std::int64_t j = columns.first; j < columns.last; ++j) {
                        const std::int64_t y = oy * s.stride_h - s.padding_h + i * s.dilation_h;
                        const std::int64_t x = ox * s.stride_w - s.padding_w + j * s.dilation_w;
                        best.meet(input + in.offset(n, c, y, x),
                                  std::integral_constant<std::int64_t, 1>{}, i * s.kernel_w + j, 0,
                                  lanes);
                    }
                const std::int64_t at = out.offset(n, c, oy, ox);
                best.store(output + at, switches + at, lanes);
            }
        }
    }

    // One row of outputs of a contiguous plane; lanes are columns, `step` is stride_w.
    template <typename Step>
    void row_of_plane(std::int64_t plane, std::int64_t oy, Step step) const {
        const Taps rows = this->rows(oy);
        Best<T> best;
        for (std::int64_t ox = 0; ox < s.out_width; ox += kLanes) {
            const std::int64_t lanes = std::min(kLanes, s.out_width - ox);
            const std::int64_t left = ox * s.stride_w - s.padding_w;
            for (std::int64_t lane = 0; lane < lanes; ++lane) {
                best.value[lane] = -std::numeric_limits<T>::infinity();
                best.tap[lane] = rows.first * s.kernel_w + columns(ox + lane).first;
            }
            for (std::int64_t i = rows.first; i < rows.last; ++i)
                for (std::int64_t j = 0; j < s.kernel_w; ++j) {
                    // The lanes whose column left + j * dilation + lane * stride is inside.
                    const std::int64_t x = left + j * s.dilation_w, room = s.in_width - x;
                    const std::int64_t from = x < 0 ? (-x + s.stride_w - 1) / s.stride_w : 0;
                    const std::int64_t to =
                        room > 0 ? std::min(lanes, (room + s.stride_w - 1) / s.stride_w) : 0;
                    const std::int64_t y = oy * s.stride_h - s.padding_h + i * s.dilation_h;
                    best.meet(input + (plane * s.in_height + y) * s.in_width + x, step,
                              i * s.kernel_w + j, from, to);
                }
            const std::int64_t at = (plane * s.out_height + oy) * s.out_width + ox;
            best.store(output + at, switches + at, lanes);
        }
    }
};

}  // namespace

void max_pool2d(const PoolShape& s, Dtype dtype, Address input, Address output, Address switches,
                const Exec& exec) {
    with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        const Pool<T> pool{s, input.as<const T>(), output.as<T>(), switches.as<std::uint8_t>()};
        const std::int64_t images = s.channels_last ? s.batch : s.batch * s.channels;
        parallel_for(images * s.out_height, exec, [&](std::int64_t row) {
            const std::int64_t image = row / s.out_height, oy = row % s.out_height;
            if (s.channels_last)
                pool.row_of_pixels(image, oy);
            else if (s.stride_w == 1)
                pool.row_of_plane(image, oy, std::integral_constant<std::int64_t, 1>{});
            else if (s.stride_w == 2)
                pool.row_of_plane(image, oy, std::integral_constant<std::int64_t, 2>{});
            else
                pool.row_of_plane(image, oy, s.stride_w);
        });
    });
}

}  // namespace zfcuda
