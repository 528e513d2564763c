// The maximum of each map and its first position, from its pool where there is one.
//
//   values[n, c] = max of input[n, c]; positions[n, c] = the first y * width + x where it is
//
//   +--------------------+--+   A window's first maximum is the map's where the map's lies in it,
//   | covered by windows |  |   so pooled values and switches say what the map would, in a quarter
//   +--------------------+  |   of the bytes; what no window covers is read from the map, and all
//   | rows below            |   of it where windows leave gaps.
//   +-----------------------+   In channels_last the lanes of a vector are channels, otherwise
//                               neighbours along a row, which meet at the end.
//
// Floor: one read of the pooled values and switches, or of the map.
#include "parallel.h"
#include "strongest.h"

namespace zfcuda {
namespace {

template <typename T>
struct Maximum {
    using V = Lanes<T>;

    const PoolShape& s;
    Offers<T> offers;
    const T *input, *pooled;
    const std::uint8_t* switches;

    void offer_pooled(Strongest<T>& best, std::int64_t at, std::int64_t corner, std::int64_t spread,
                      std::int64_t lanes) const {
        offers.pooled(best, pooled + at, switches + at, corner, spread, lanes);
    }
    void offer_input(Strongest<T>& best, std::int64_t at, std::int64_t position,
                     std::int64_t spread, std::int64_t lanes) const {
        offers.map(best, input + at, position, spread, lanes);
    }

    // body(from, y, x): all pooled values, then the positions that no window covers; x goes in
    // steps of `step`.
    template <typename Pooled, typename Input>
    void for_all(std::int64_t step, Pooled&& from_pool, Input&& from_input) const {
        std::int64_t rows = 0, columns = 0;  // covered
        if (pooled) {
            for (std::int64_t y = 0; y < s.out_height; ++y)
                for (std::int64_t x = 0; x < s.out_width; x += step)
                    from_pool(y, x, offers.corner(y, x));
            rows = s.covered_height();
            columns = s.covered_width();
        }
        for (std::int64_t y = 0; y < s.in_height; ++y)
            for (std::int64_t x = y < rows ? columns : 0; x < s.in_width; x += step)
                from_input(y, x, y * s.in_width + x);
    }

    // `vectors` vectors of channels of image n, or what is left of them, from channel c on.
    template <int vectors>
    void channels(std::int64_t n, std::int64_t c, T* values, std::int64_t* positions) const {
        Strongest<T> best[vectors];
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
        Strongest<T> best;
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
    with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        const Maximum<T> maximum{s, Offers<T>(s), input.as<const T>(),
                                 s.gaps() ? nullptr : pooled.as<const T>(),
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
