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
//
// Measured (ZFNet, batch 8, float32, Zen 4, AVX-512, one thread, processor time, medians, calls of
// both in turn, buffers reused), torch 2.13 / ours, channels_last:
//   pool1 0.92   pool2 1.09   pool5 1.00    of a copy of the input: 1.2, 1.2, 3.0 times (pool1, 2,
//   5) contiguous: 5.4, 4.3, 1.9
// Lost: arrays of 64 lanes and plain loops, which GCC left scalar (ten times slower).
#include <limits>
#include <type_traits>

#include "lanes.h"
#include "parallel.h"

namespace zfcuda {
namespace {

// The taps i of a window that starts at `start` for which start + i * dilation lies in [0, size).
struct Taps {
    std::int64_t first, last;

    Taps(std::int64_t start, std::int64_t kernel, std::int64_t dilation, std::int64_t size)
        : first(start < 0 ? (-start + dilation - 1) / dilation : 0), last(kernel) {
        while (last > first && start + (last - 1) * dilation >= size) --last;
    }
};

// The running maximum of each lane, and its tap.
template <typename T>
struct Best {
    using V = Lanes<T>;
    typename V::Value value = typename V::Value{} - std::numeric_limits<T>::infinity();
    typename V::Integer tap;

    void meet(const typename V::Value& candidate, std::int64_t which) {
        const typename V::Integer take = (candidate > value) | (candidate != candidate);
        tap = take ? typename V::Integer{} + static_cast<typename V::Int>(which) : tap;
        value = take ? candidate : value;
    }
};

// Elements x, x + step, … of a row; those outside it lose against everything.
template <typename T, typename Step>
typename Lanes<T>::Value load_columns(const T* row, std::int64_t x, Step step, std::int64_t width) {
    using V = Lanes<T>;
    typename V::Value value;
    if (x >= 0 && x + V::count * step <= width) {
        if constexpr (std::is_same_v<Step, std::integral_constant<std::int64_t, 1>>)
            return V::load(row + x, V::count);
        for (int lane = 0; lane < V::count; ++lane) value[lane] = row[x + lane * step];
        return value;
    }
    for (int lane = 0; lane < V::count; ++lane) {
        const std::int64_t at = x + lane * step;
        value[lane] = at >= 0 && at < width ? row[at] : -std::numeric_limits<T>::infinity();
    }
    return value;
}

template <typename T>
struct Pool {
    using V = Lanes<T>;
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
        const std::int64_t row_step = s.dilation_h * in.step_y();
        const std::int64_t column_step = s.dilation_w * in.step_x();
        for (std::int64_t ox = 0; ox < s.out_width; ++ox) {
            const Taps columns = this->columns(ox);
            const T* corner = input + in.offset(n, 0, oy * s.stride_h - s.padding_h,
                                                ox * s.stride_w - s.padding_w);
            const std::int64_t at = out.offset(n, 0, oy, ox);
            for (std::int64_t c = 0; c < s.channels; c += V::count) {
                const std::int64_t lanes = std::min<std::int64_t>(V::count, s.channels - c);
                Best<T> best;
                best.tap = typename V::Integer{} +
                           static_cast<typename V::Int>(rows.first * s.kernel_w + columns.first);
                for (std::int64_t i = rows.first; i < rows.last; ++i)
                    for (std::int64_t j = columns.first; j < columns.last; ++j)
                        best.meet(V::load(corner + i * row_step + j * column_step + c, lanes),
                                  i * s.kernel_w + j);
                V::store(output + at + c, best.value, lanes);
                V::store_bytes(switches + at + c, best.tap, lanes);
            }
        }
    }

    // One row of outputs of a contiguous plane; lanes are columns, `step` is stride_w.
    template <typename Step>
    void row_of_plane(std::int64_t plane, std::int64_t oy, Step step) const {
        const Taps rows = this->rows(oy);
        for (std::int64_t ox = 0; ox < s.out_width; ox += V::count) {
            const std::int64_t lanes = std::min<std::int64_t>(V::count, s.out_width - ox);
            const std::int64_t left = ox * s.stride_w - s.padding_w;
            Best<T> best;
            for (int lane = 0; lane < V::count; ++lane)
                best.tap[lane] = static_cast<typename V::Int>(rows.first * s.kernel_w +
                                                              columns(ox + lane).first);
            for (std::int64_t i = rows.first; i < rows.last; ++i) {
                const std::int64_t y = oy * s.stride_h - s.padding_h + i * s.dilation_h;
                const T* row = input + (plane * s.in_height + y) * s.in_width;
                for (std::int64_t j = 0; j < s.kernel_w; ++j)
                    best.meet(load_columns(row, left + j * s.dilation_w, step, s.in_width),
                              i * s.kernel_w + j);
            }
            const std::int64_t at = (plane * s.out_height + oy) * s.out_width + ox;
            V::store(output + at, best.value, lanes);
            V::store_bytes(switches + at, best.tap, lanes);
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
