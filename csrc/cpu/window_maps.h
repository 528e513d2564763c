// The values of window maps, position by position: unpooled and gated, as vectors of channels.
//
// After an unpool at most one position in four holds a value, and the gate takes half of those: of
// ZFNet's maps 5 to 8 % remain. A position is gathered: compare the switches of the pooling windows
// that contain it with the tap that it is of them, add the values that match, gate the sum
// (relu(a + b) is not relu(a) + relu(b)).
#pragma once

#include <numeric>

#include "lanes.h"
#include "parallel.h"

namespace zfcuda {

// The pooling windows that contain one position, along one dimension: `first`, first + step, …,
// `count` of them, with taps `tap`, tap - tap_step, ….
struct Covering {
    std::int32_t first, tap, count;
};

// One dimension of the pool that a signal comes down through; a signal without one is a pool of
// windows of a single position.
struct PoolAxis {
    std::int64_t windows, kernel, stride, dilation;
    // Between windows that have a position, and between its taps in them.
    std::int64_t step = dilation / std::gcd(stride, dilation);
    std::int64_t tap_step = stride / std::gcd(stride, dilation);

    // Window w has position `at` as tap (at - w * stride) / dilation.
    Covering covering(std::int64_t at) const {
        Covering found{0, 0, 0};
        for (std::int64_t w = at / stride < windows ? at / stride : windows - 1; w >= 0; --w) {
            const std::int64_t distance = at - w * stride;
            if (distance > (kernel - 1) * dilation) break;
            if (distance % dilation) continue;
            found = {static_cast<std::int32_t>(w), static_cast<std::int32_t>(distance / dilation),
                     found.count + 1};
        }
        return found;
    }
};

// Channels of the maps.
struct Channels {
    std::int64_t first, last;
};

template <typename T>
class MapReader {
  public:
    using V = Lanes<T>;

    MapReader(const WindowShape& shape, Gate gate, const T* signal, const std::uint8_t* switches,
              const std::uint8_t* positive, Covering* table)
        : s(shape),
          relu(gate == Gate::deconvnet || gate == Gate::guided),
          masked(gate == Gate::backprop || gate == Gate::guided),
          signal(signal),
          switches(switches),
          positive(positive),
          rows_at(table),
          columns_at(table + shape.out_height) {
        for (std::int64_t y = 0; y < s.out_height; ++y) table[y] = rows.covering(y);
        for (std::int64_t x = 0; x < s.out_width; ++x)
            table[s.out_height + x] = columns.covering(x);
    }

    static std::int64_t table_size(const WindowShape& s) { return s.out_height + s.out_width; }
    // Values that the maps of a window can have in so many channels.
    static std::int64_t capacity(const WindowShape& s, std::int64_t channels) {
        const std::int64_t maps = s.out_height * s.out_width;
        const std::int64_t pooled = s.pooled_height * s.pooled_width;
        return (s.pooled() ? std::min(maps, pooled) : maps) * channels;
    }

    // body(rectify, mask): what the gate does, as two std::bool_constants.
    template <typename Body>
    void with_gate(Body&& body) const {
        using std::bool_constant;
        if (masked)
            relu ? body(bool_constant<true>{}, bool_constant<true>{})
                 : body(bool_constant<false>{}, bool_constant<true>{});
        else
            relu ? body(bool_constant<true>{}, bool_constant<false>{})
                 : body(bool_constant<false>{}, bool_constant<false>{});
    }

    // For each position x = 0, step, 2 step, …, 1, 1 + step, … of row y: take = make(), then
    // take.add(c, value) for each vector of channels in order, masked by `mask` but not yet
    // rectified (of a part of a vector the other lanes are 0), then done(x, take).
    template <bool mask, typename Make, typename Done>
    void read_row(std::int64_t window, std::int64_t y, std::int64_t step, Channels channels,
                  Make&& make, Done&& done) const {
        if (!switches) return read_row_as<mask, kNoPool>(window, y, step, channels, make, done);
        switch (rows_at[y].count) {
            case 1:
                return read_row_as<mask, 1>(window, y, step, channels, make, done);
            case 2:
                return read_row_as<mask, 2>(window, y, step, channels, make, done);
            default:
                return read_row_as<mask, kAny>(window, y, step, channels, make, done);
        }
    }

  private:
    // The pooling windows that may belong at one position, `down` times `across` of them: the
    // offset of the first one's channels, the distances to the next ones', and the same of taps.
    struct Sources {
        std::int64_t at, down_step, across_step;
        std::int64_t tap, down_tap, across_tap;
        std::int64_t down, across;

        std::int64_t offset(std::int64_t i, std::int64_t j) const {
            return at + i * down_step + j * across_step;
        }
        std::int64_t tap_of(std::int64_t i, std::int64_t j) const {
            return tap - i * down_tap - j * across_tap;
        }
    };

    template <bool mask, int down, typename Make, typename Done>
    ZF_INLINE void read_row_as(std::int64_t window, std::int64_t y, std::int64_t step,
                               Channels channels, Make&& make, Done&& done) const {
        const Covering above = rows_at[y];
        const std::int64_t depth = s.out_channels, pitch = columns.windows * depth;
        const std::int64_t row = (window * rows.windows + above.first) * pitch;
        const std::int64_t width = s.out_width;
        const std::int64_t position = (window * s.out_height + y) * width;
        Sources from{0,
                     rows.step * pitch,
                     columns.step * depth,
                     0,
                     rows.tap_step * columns.kernel,
                     columns.tap_step,
                     above.count,
                     0};
        const std::int64_t down_end = above.count - 1;
        const bool first_row = above.tap - down_end * rows.tap_step == 0;
        for (std::int64_t phase = 0; phase < step; ++phase)
            for (std::int64_t x = phase; x < width; x += step) {
                auto take = make();
                if constexpr (down == kNoPool) {
                    from.at = (position + x) * depth;
                    take = add_vectors<mask, kNoPool, 1>(from, position + x, channels, take);
                } else {
                    const Covering beside = columns_at[x];
                    from.at = row + beside.first * depth;
                    from.tap = above.tap * columns.kernel + beside.tap;
                    from.across = beside.count;
                    if (first_row && beside.tap == (beside.count - 1) * columns.tap_step)
                        prefetch(from.offset(down_end, beside.count - 1) + pitch, channels);
                    if (down > 0 && beside.count == 1)
                        take = add_vectors<mask, down, 1>(from, position + x, channels, take);
                    else if (down > 0 && beside.count == 2)
                        take = add_vectors<mask, down, 2>(from, position + x, channels, take);
                    else
                        take = add_vectors<mask, kAny, 1>(from, position + x, channels, take);
                }
                done(x, take);
            }
    }

    // A pooling window is met first at its tap 0. The row below it is still in a slower cache, to
    // which the step above wrote it, and the hardware does not follow so many streams.
    // (Inlined: GCC takes a function that only prefetches for one without effect.)
    ZF_INLINE void prefetch(std::int64_t at, Channels channels) const {
        for (std::int64_t c = channels.first; c < channels.last; c += kLine / sizeof(T))
            __builtin_prefetch(signal + at + c);
        for (std::int64_t c = channels.first; c < channels.last; c += kLine)
            __builtin_prefetch(switches + at + c);
    }

    // The loop over channels; `down` and `across` as constants keep the pointers in registers.
    template <bool mask, int down, int across, typename Take>
    ZF_INLINE Take add_vectors(const Sources& from, std::int64_t position, Channels channels,
                               Take take) const {
        constexpr int count = down > 0 ? down * across : 1;
        const T* values[count];
        const std::uint8_t* bytes[count];
        typename V::Int taps[count];
        for (int i = 0; i < down; ++i)
            for (int j = 0; j < across; ++j) {
                values[i * across + j] = signal + from.offset(i, j);
                bytes[i * across + j] = switches + from.offset(i, j);
                taps[i * across + j] = static_cast<typename V::Int>(from.tap_of(i, j));
            }
        if (down == kNoPool) values[0] = signal + from.at;
        std::int64_t c = channels.first;
        const auto add = [&](std::int64_t lanes) __attribute__((always_inline)) {
            typename V::Value value{};
            if constexpr (down == kNoPool)
                value = V::load(values[0] + c, lanes);
            else if constexpr (down == kAny)
                value = sum_of_any(from, c, lanes);
            else
                for (int i = 0; i < count; ++i)
                    value = V::add_where(value, values[i] + c, bytes[i] + c, taps[i], lanes);
            if (mask) value = is_positive(position, c, lanes) ? value : typename V::Value{};
            take.add(c, value);
        };
        for (; c + V::count <= channels.last; c += V::count) add(V::count);
        if (c < channels.last) add(channels.last - c);
        return take;
    }

    typename V::Value sum_of_any(const Sources& from, std::int64_t c, std::int64_t lanes) const {
        typename V::Value sum{};
        for (std::int64_t i = 0; i < from.down; ++i)
            for (std::int64_t j = 0; j < from.across; ++j)
                sum = V::add_where(sum, signal + from.offset(i, j) + c,
                                   switches + from.offset(i, j) + c,
                                   static_cast<typename V::Int>(from.tap_of(i, j)), lanes);
        return sum;
    }

    // Lanes whose bit in `positive` is set.
    typename V::Integer is_positive(std::int64_t position, std::int64_t c,
                                    std::int64_t lanes) const {
        const std::uint8_t* bytes = positive + position * s.bit_bytes();
        typename V::Integer bit;
        for (int i = 0; i < V::count; ++i)
            bit[i] = i < lanes ? bytes[(c + i) / 8] >> (c + i) % 8 & 1 : 0;
        return bit != 0;
    }

    static constexpr int kNoPool = -1, kAny = 0;  // besides a number of sources

    const WindowShape& s;
    bool relu, masked;
    const T* signal;
    const std::uint8_t *switches, *positive;
    PoolAxis rows =
        axis(s.out_height, s.pooled_height, s.pool_kernel_h, s.pool_stride_h, s.pool_dilation_h);
    PoolAxis columns =
        axis(s.out_width, s.pooled_width, s.pool_kernel_w, s.pool_stride_w, s.pool_dilation_w);
    const Covering *rows_at, *columns_at;

    PoolAxis axis(std::int64_t size, std::int64_t pooled, std::int64_t kernel, std::int64_t stride,
                  std::int64_t dilation) const {
        return s.pooled() ? PoolAxis{pooled, kernel, stride, dilation} : PoolAxis{size, 1, 1, 1};
    }
};

}  // namespace zfcuda
