// The maximum of each map and its first position, from its pool where there is one.
//
//   values[n, c] = max of input[n, c]; positions[n, c] = the first y * width + x where it is
//
//   +--------------------+--+   A window's first maximum is the map's where the map's lies in it,
//   so | covered by windows |  |   pooled values and switches say what the map would in a quarter
//   of
//   +--------------------+  |   the bytes; what no window covers is read from the map.
//   | rows below            |
//   +-----------------------+   In channels_last the lanes of a vector are channels, otherwise
//                               neighbours along a row, which meet at the end.
//
// Each lane keeps its best value and position, without branches: dead maps are ties everywhere, and
// the smaller position wins whatever the order. A switch becomes a position by a multiplication in
// place of the division by the kernel's width, exact below 256.
// Floor: one read of the pooled values and switches, or of the map.
#include <limits>
#include <stdexcept>

#include "lanes.h"
#include "parallel.h"

namespace zfcuda {
namespace {

template <typename T>
struct Best {
    using V = Lanes<T>;
    typename V::Value value = typename V::Value{} - std::numeric_limits<Sum<T>>::infinity();
    typename V::Integer position{};

    // NaN is never taken.
    void offer(const typename V::Value& other, const typename V::Integer& at) {
        const typename V::Integer taken = other > value || (other == value && at < position);
        value = taken ? other : value;
        position = taken ? at : position;
    }
};

template <typename T>
struct Maximum {
    using V = Lanes<T>;
    using Int = typename V::Int;

    const PoolShape& s;
    const T *input, *pooled;
    const std::uint8_t* switches;
    typename V::Integer lane = counting();

    static typename V::Integer counting() {
        typename V::Integer lane;
        for (int i = 0; i < V::count; ++i) lane[i] = i;
        return lane;
    }

    // Offers `lanes` neighbours in memory from pooled value `at` on; their windows begin at
    // position `corner`, `spread` apart.
    void offer_pooled(Best<T>& best, std::int64_t at, std::int64_t corner, std::int64_t spread,
                      std::int64_t lanes) const {
        const auto width = static_cast<Int>(s.kernel_w), down = static_cast<Int>(s.in_width);
        const typename V::Integer tap = V::load_bytes(switches + at, lanes);
        const typename V::Integer row = tap * static_cast<Int>(65536 / s.kernel_w + 1) >> 16;
        best.offer(load(pooled + at, lanes), lane * static_cast<Int>(spread) +
                                                 static_cast<Int>(corner) + tap +
                                                 row * (down - width));
    }
    void offer_input(Best<T>& best, std::int64_t at, std::int64_t position, std::int64_t spread,
                     std::int64_t lanes) const {
        best.offer(load(input + at, lanes),
                   lane * static_cast<Int>(spread) + static_cast<Int>(position));
    }

    // Absent lanes lose against everything.
    typename V::Value load(const T* from, std::int64_t lanes) const {
        const typename V::Value absent =
            typename V::Value{} + std::numeric_limits<Sum<T>>::quiet_NaN();
        const typename V::Value value = V::load(from, lanes);
        return lanes == V::count ? value : lane < static_cast<Int>(lanes) ? value : absent;
    }

    // body(from, y, x): all pooled values, then the positions that no window covers; x goes in
    // steps of `step`.
    template <typename Pooled, typename Input>
    void for_all(std::int64_t step, Pooled&& from_pool, Input&& from_input) const {
        std::int64_t rows = 0, columns = 0;  // covered
        if (pooled) {
            for (std::int64_t y = 0; y < s.out_height; ++y)
                for (std::int64_t x = 0; x < s.out_width; x += step)
                    from_pool(
                        y, x,
                        (y * s.stride_h - s.padding_h) * s.in_width + x * s.stride_w - s.padding_w);
            rows = (s.out_height - 1) * s.stride_h - s.padding_h + s.kernel_h;
            columns = (s.out_width - 1) * s.stride_w - s.padding_w + s.kernel_w;
        }
        for (std::int64_t y = 0; y < s.in_height; ++y)
            for (std::int64_t x = y < rows ? columns : 0; x < s.in_width; x += step)
                from_input(y, x, y * s.in_width + x);
    }

    // `vectors` vectors of channels of image n, or what is left of them, from channel c on.
    template <int vectors>
    void channels(std::int64_t n, std::int64_t c, T* values, std::int64_t* positions) const {
        Best<T> best[vectors];
        const auto lanes = [&](int v) {
            return std::min<std::int64_t>(V::count, s.channels - c - v * V::count);
        };
        for_all(
            1,
            [&](std::int64_t y, std::int64_t x, std::int64_t corner) {
                const std::int64_t at = s.output().offset(n, c, y, x);
                for (int v = 0; v < vectors; ++v)
                    offer_pooled(best[v], at + v * V::count, corner, 0, lanes(v));
            },
            [&](std::int64_t y, std::int64_t x, std::int64_t position) {
                const std::int64_t at = s.input().offset(n, c, y, x);
                for (int v = 0; v < vectors; ++v)
                    offer_input(best[v], at + v * V::count, position, 0, lanes(v));
            });
        for (int v = 0; v < vectors; ++v)
            for (std::int64_t i = 0; i < lanes(v); ++i) {
                values[n * s.channels + c + v * V::count + i] = T(best[v].value[i]);
                positions[n * s.channels + c + v * V::count + i] = best[v].position[i];
            }
    }

    // One contiguous map.
    void plane(std::int64_t n, std::int64_t c, T* value, std::int64_t* position) const {
        Best<T> best;
        for_all(
            V::count,
            [&](std::int64_t y, std::int64_t x, std::int64_t corner) {
                offer_pooled(best, s.output().offset(n, c, y, x), corner, s.stride_w,
                             std::min<std::int64_t>(V::count, s.out_width - x));
            },
            [&](std::int64_t y, std::int64_t x, std::int64_t at) {
                offer_input(best, s.input().offset(n, c, y, x), at, 1,
                            std::min<std::int64_t>(V::count, s.in_width - x));
            });
        int first = 0;
        for (int i = 1; i < V::count; ++i)
            if (best.value[i] > best.value[first] ||
                (best.value[i] == best.value[first] && best.position[i] < best.position[first]))
                first = i;
        *value = T(best.value[first]);
        *position = best.position[first];
    }
};

}  // namespace

void map_maximum(const PoolShape& s, Dtype dtype, Address input, Address pooled, Address switches,
                 Address values, Address positions, const Exec& exec) {
    if (s.in_height * s.in_width > std::numeric_limits<std::int32_t>::max())
        throw std::runtime_error("zfcuda: map_maximum of maps of over 2^31 positions");
    with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        const Maximum<T> maximum{s, input.as<const T>(), pooled.as<const T>(),
                                 switches.as<const std::uint8_t>()};
        auto* best = values.as<T>();
        auto* at = positions.as<std::int64_t>();
        if (!s.channels_last)
            return parallel_for(s.batch * s.channels, exec, [&](std::int64_t map) {
                maximum.plane(map / s.channels, map % s.channels, best + map, at + map);
            });
        constexpr std::int64_t count = Lanes<T>::count;
        const std::int64_t vectors = (s.channels + count - 1) / count, blocks = (vectors + 3) / 4;
        parallel_for(s.batch * blocks, exec, [&](std::int64_t unit) {
            const std::int64_t n = unit / blocks, first = unit % blocks * 4;
            switch (std::min<std::int64_t>(vectors - first, 4)) {
                case 4:
                    return maximum.template channels<4>(n, first * count, best, at);
                case 3:
                    return maximum.template channels<3>(n, first * count, best, at);
                case 2:
                    return maximum.template channels<2>(n, first * count, best, at);
                default:
                    return maximum.template channels<1>(n, first * count, best, at);
            }
        });
    });
}

}  // namespace zfcuda
