// The largest value of a map and its first position, a vector of maps or of positions at a time:
// what map_maximum.cpp and conv2d_relu_max_pool2d.cpp share.
//
// Each lane keeps its own, without branches: dead maps are ties everywhere, and the smaller
// position wins whatever the order. A switch becomes a position by a multiplication in place of the
// division by the kernel's width, exact below 256.
#pragma once

#include <limits>
#include <stdexcept>

#include "lanes.h"

namespace zfcuda {

template <typename T>
struct Strongest {
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

// Offers of the first `lanes` neighbours in memory, whose positions in the map are `spread` apart.
template <typename T>
struct Offers {
    using V = Lanes<T>;
    using Int = typename V::Int;

    const PoolShape& s;
    typename V::Integer lane = counting();

    explicit Offers(const PoolShape& shape) : s(shape) {
        if (s.in_height * s.in_width > std::numeric_limits<std::int32_t>::max())
            throw std::runtime_error("zfcuda: the maximum of a map of over 2^31 positions");
    }

    // Pooled values with their switches; the first window begins at position `corner`.
    void pooled(Strongest<T>& best, const T* values, const std::uint8_t* switches,
                std::int64_t corner, std::int64_t spread, std::int64_t lanes) const {
        const auto width = static_cast<Int>(s.kernel_w), down = static_cast<Int>(s.in_width);
        const typename V::Integer tap = V::load_bytes(switches, lanes);
        const typename V::Integer row = tap * static_cast<Int>(65536 / s.kernel_w + 1) >> 16;
        best.offer(load(values, lanes), lane * static_cast<Int>(spread) + static_cast<Int>(corner) +
                                            tap + row * (down - width));
    }
    // Values of the map, the first at `position`; with `rectified` no less than zero.
    template <bool rectified = false>
    void map(Strongest<T>& best, const T* values, std::int64_t position, std::int64_t spread,
             std::int64_t lanes) const {
        const typename V::Value value = load(values, lanes);
        best.offer(!rectified   ? value
                   : value <= 0 ? typename V::Value{}
                                : value,
                   lane * static_cast<Int>(spread) + static_cast<Int>(position));
    }
    // The position of window (y, x), or where it would be in a wider map.
    std::int64_t corner(std::int64_t y, std::int64_t x) const {
        return (y * s.stride_h - s.padding_h) * s.in_width + x * s.stride_w - s.padding_w;
    }

  private:
    static typename V::Integer counting() {
        typename V::Integer lane;
        for (int i = 0; i < V::count; ++i) lane[i] = i;
        return lane;
    }
    // Absent lanes lose against everything.
    typename V::Value load(const T* from, std::int64_t lanes) const {
        const typename V::Value absent =
            typename V::Value{} + std::numeric_limits<Sum<T>>::quiet_NaN();
        const typename V::Value value = V::load(from, lanes);
        return lanes == V::count ? value : lane < static_cast<Int>(lanes) ? value : absent;
    }
};

}  // namespace zfcuda
