// Max-pooling that records switches, perhaps of a rectified input.
//
//   output[n,c,oy,ox] = max over the window;  switches = i * kernel_w + j of the first maximum in
//   row-major order, or of the last NaN, as in torch. The window's first valid position is the
//   switch of a window of -inf, and with `relu` of one without a positive value.
//
// Neighbouring outputs are the lanes of a vector: channels of one pixel in channels_last
// (pool_row.h), columns of one row in contiguous memory:
//
//   lanes ox, ox+1, …  read input + ox * stride_w + tap: a constant stride of 1 or 2 is one or two
//   loads and a permutation, any other a gather
//
// Floor: one read of the input, one write of 5 bytes an output (float32): a memory copy.
//
// Measured (ZFNet, batch 8, float32, Zen 4, AVX-512, one thread, processor time, medians, calls of
// both in turn, buffers reused), torch 2.13 / ours, each in that format:
//   channels_last  pool1 1.7  pool2 1.8  pool5 1.9    contiguous  10  8.1  4.1
// With the ReLU, torch's relu and pool / ours: channels_last 2.9  3.0  2.7, contiguous 14  8.4  4.2
// (pool1 7 to 11 where the system gives fresh memory for the rectified map).
// Lost: NaN compared with every tap (1.3 times slower), arrays of 64 lanes and plain loops, which
// GCC left scalar (ten times). Without fetching ahead pool1 takes 1.7 times as long: its two new
// rows a window are too short for the hardware to follow.
#include <type_traits>

#include "parallel.h"
#include "pool_row.h"

namespace zfcuda {
namespace {

// Elements x, x + step, … of a row; those outside it lose against everything.
template <typename T, typename Step>
typename Lanes<T>::Value load_columns(const T* row, std::int64_t x, Step step, std::int64_t width) {
    using V = Lanes<T>;
    constexpr Sum<T> outside = least<T>(false);
    const auto part = [&](std::int64_t from) {
        const std::int64_t there = std::clamp<std::int64_t>(width - from, 0, V::count);
        return V::load_or(row + from, there, outside);
    };
    if constexpr (std::is_same_v<Step, std::integral_constant<std::int64_t, 1>>)
        if (x >= 0) return part(x);
    if constexpr (std::is_same_v<Step, std::integral_constant<std::int64_t, 2>>)
        if (x >= 0) return V::every_second(part(x), part(x + V::count));
    typename V::Value value;
    for (int lane = 0; lane < V::count; ++lane) {
        const std::int64_t at = x + lane * step;
        value[lane] = at >= 0 && at < width ? Sum<T>(row[at]) : outside;
    }
    return value;
}

// Of contiguous planes; `step` is stride_w.
template <typename T, typename Step>
struct PlanePool {
    using V = Lanes<T>;
    const PoolShape& s;
    const T* input;
    Sum<T> start;
    Step step;

    // The windows ox, ox + 1, … of row oy.
    template <bool nans>
    Best<T> windows(std::int64_t plane, std::int64_t oy, std::int64_t ox) const {
        const Span rows = row_span(s, oy);
        const std::int64_t left = ox * s.stride_w - s.padding_w;
        Best<T> best;
        best.value = typename V::Value{} + start;
        best.tap = typename V::Integer{} + static_cast<typename V::Int>(rows.first * s.kernel_w);
        for (int lane = 0; left + lane * s.stride_w < 0 && lane < V::count; ++lane)
            best.tap[lane] += static_cast<typename V::Int>(column_span(s, ox + lane).first);
        for (std::int64_t i = rows.first; i < rows.last; ++i) {
            const std::int64_t y = oy * s.stride_h - s.padding_h + i * s.dilation_h;
            const T* row = input + (plane * s.in_height + y) * s.in_width;
            for (std::int64_t j = 0; j < s.kernel_w; ++j)
                best.template meet<nans>(
                    load_columns(row, left + j * s.dilation_w, step, s.in_width),
                    i * s.kernel_w + j);
        }
        return best;
    }

    void row(std::int64_t plane, std::int64_t oy, T* output, std::uint8_t* switches) const {
        const std::int64_t first = (plane * s.out_height + oy) * s.out_width;
        for (std::int64_t begin = 0; begin < s.out_width; begin += V::count) {
            // The last vector is whole too where it can be: it meets some windows again.
            const std::int64_t ox =
                std::max<std::int64_t>(0, std::min(begin, s.out_width - V::count));
            const std::int64_t lanes = std::min<std::int64_t>(V::count, s.out_width - ox);
            Best<T> best = windows<false>(plane, oy, ox);
            if (V::any(best.unordered)) best = windows<true>(plane, oy, ox);
            V::store(output + first + ox, best.value, lanes);
            V::store_bytes(switches + first + ox, best.tap, lanes);
        }
    }
};

}  // namespace

void max_pool2d(const PoolShape& s, Dtype dtype, bool relu, Address input, Address output,
                Address switches, const Exec& exec) {
    with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        const auto* const from = input.as<const T>();
        auto* const to = output.as<T>();
        auto* const where = switches.as<std::uint8_t>();
        if (s.channels_last) {
            const Layout in = s.input(), out = s.output();
            const bool ahead = s.inputs() * std::int64_t(sizeof(T)) > kCached;
            return parallel_for(s.batch * s.out_height, exec, [&](std::int64_t row) {
                const std::int64_t n = row / s.out_height, oy = row % s.out_height;
                const std::int64_t at = out.offset(n, 0, oy, 0);
                pool_row(
                    s, oy, from + n * in.step_image(),
                    [&](std::int64_t y) { return y * in.step_y(); }, s.channels, s.channels,
                    least<T>(relu), ahead, to + at, where + at, s.channels);
            });
        }
        const auto planes = [&](auto step) {
            const PlanePool<T, decltype(step)> pool{s, from, least<T>(relu), step};
            parallel_for(s.batch * s.channels * s.out_height, exec, [&](std::int64_t row) {
                pool.row(row / s.out_height, row % s.out_height, to, where);
            });
        };
        if (s.stride_w == 1)
            planes(std::integral_constant<std::int64_t, 1>{});
        else if (s.stride_w == 2)
            planes(std::integral_constant<std::int64_t, 2>{});
        else
            planes(s.stride_w);
    });
}

}  // namespace zfcuda
