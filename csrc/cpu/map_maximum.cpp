// The maximum of each map and its first position. The plain form.
#include <limits>

#include "parallel.h"

namespace zfcuda {
namespace {

template <typename T>
struct Best {
    T value = -std::numeric_limits<T>::infinity();
    std::int64_t position = 0;

    void offer(T other, std::int64_t at) {
        if (other > value || (other == value && at < position)) {
            value = other;
            position = at;
        }
    }
};

}  // namespace

void map_maximum(const PoolShape& s, Dtype dtype, Address input, Address pooled, Address switches,
                 Address values, Address positions, const Exec& exec) {
    with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        parallel_for(s.batch * s.channels, exec, [&](std::int64_t map) {
            const std::int64_t n = map / s.channels, c = map % s.channels;
            std::int64_t covered_h = 0, covered_w = 0;
            Best<T> best;
            for (std::int64_t y = 0; pooled && y < s.out_height; ++y)
                for (std::int64_t x = 0; x < s.out_width; ++x) {
                    const std::int64_t at = s.output().offset(n, c, y, x);
                    const std::int64_t tap = switches.as<const std::uint8_t>()[at];
                    const std::int64_t row = y * s.stride_h - s.padding_h + tap / s.kernel_w;
                    const std::int64_t column = x * s.stride_w - s.padding_w + tap % s.kernel_w;
                    best.offer(pooled.as<const T>()[at], row * s.in_width + column);
                }
            if (pooled) {
                covered_h = (s.out_height - 1) * s.stride_h - s.padding_h + s.kernel_h;
                covered_w = (s.out_width - 1) * s.stride_w - s.padding_w + s.kernel_w;
            }
            for (std::int64_t y = 0; y < s.in_height; ++y)
                for (std::int64_t x = y < covered_h ? covered_w : 0; x < s.in_width; ++x)
                    best.offer(input.as<const T>()[s.input().offset(n, c, y, x)],
                               y * s.in_width + x);
            values.as<T>()[map] = best.value;
            positions.as<std::int64_t>()[map] = best.position;
        });
    });
}

}  // namespace zfcuda
