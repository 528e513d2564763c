// Max-pooling that records switches.
//
//   output[n,c,oy,ox] = max over the window;  switches = i * kernel_w + j of the first maximum in
//   row-major order, or of the last NaN, as in torch. The window's first valid position is the
//   switch of a window of -inf.
#include <cmath>
#include <limits>

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

template <typename T>
void pool_window(const PoolShape& s, const T* input, T* output, std::uint8_t* switches,
                 std::int64_t n, std::int64_t c, std::int64_t oy, std::int64_t ox) {
    const std::int64_t top = oy * s.stride_h - s.padding_h, left = ox * s.stride_w - s.padding_w;
    const Taps rows(top, s.kernel_h, s.dilation_h, s.in_height);
    const Taps columns(left, s.kernel_w, s.dilation_w, s.in_width);
    T best = -std::numeric_limits<T>::infinity();
    std::int64_t where = rows.first * s.kernel_w + columns.first;
    for (std::int64_t i = rows.first; i < rows.last; ++i)
        for (std::int64_t j = columns.first; j < columns.last; ++j) {
            const T value = input[s.input().offset(n, c, top + i * s.dilation_h,
                                                   left + j * s.dilation_w)];
            if (value > best || std::isnan(value)) {
                best = value;
                where = i * s.kernel_w + j;
            }
        }
    const std::int64_t index = s.output().offset(n, c, oy, ox);
    output[index] = best;
    switches[index] = static_cast<std::uint8_t>(where);
}

}  // namespace

void max_pool2d(const PoolShape& s, Dtype dtype, Address input, Address output, Address switches,
                const Exec& exec) {
    with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        parallel_for(s.batch * s.channels, exec, [&](std::int64_t plane) {
            for (std::int64_t oy = 0; oy < s.out_height; ++oy)
                for (std::int64_t ox = 0; ox < s.out_width; ++ox)
                    pool_window(s, input.as<const T>(), output.as<T>(),
                                switches.as<std::uint8_t>(), plane / s.channels,
                                plane % s.channels, oy, ox);
        });
    });
}

}  // namespace zfcuda
