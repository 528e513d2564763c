// The non-zeros of window maps: unpooled, gated and compressed to lists.
//
// After an unpool at most one position in four holds a value, and the gate takes half of those: of
// ZFNet's maps 5 to 8 % remain. So each position's values are gathered over channels as vectors
// (compare the switches of the pooling windows that contain the position with the tap, add), gated
// as a sum (relu(a + b) is not relu(a) + relu(b)) and compressed to (value, place of its row in the
// panel of weights). A position's list covers one block of channels.
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
    std::int64_t common = std::gcd(stride, dilation);

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
    std::int64_t step() const { return dilation / common; }
    std::int64_t tap_step() const { return stride / common; }
};

// One position's list.
struct Item {
    std::int64_t target;  // where its first tap adds to the image windows
    std::int64_t start, count;
};

// Where lists are written: `items` in any order, then sorted by their length.
template <typename T>
struct Lists {
    T* values;
    std::int32_t* rows;
    Item *items, *sorted;
    std::int64_t used, count;
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
    // Values that a window's lists of a block of channels can have.
    static std::int64_t capacity(const WindowShape& s, std::int64_t channels) {
        const std::int64_t maps = s.out_height * s.out_width;
        const std::int64_t pooled = s.pooled_height * s.pooled_width;
        return (s.pooled() ? std::min(maps, pooled) : maps) * channels;
    }

    // Appends the lists of channels [first, last) of a window, whose image begins at `target`; the
    // value of channel c is to meet the panel's row at (c - first) * row_step.
    void read(std::int64_t window, std::int64_t first, std::int64_t last, std::int64_t row_step,
              std::int64_t target, Lists<T>& lists) const {
        typename V::Integer lane;
        for (int i = 0; i < V::count; ++i) lane[i] = i * row_step;
        for (std::int64_t y = 0; y < s.out_height; ++y)
            for (std::int64_t x = 0; x < s.out_width; ++x) {
                Gathered at(*this, window, y, x);
                const std::int64_t start = lists.used;
                for (std::int64_t c = first; c < last; c += V::count) {
                    const std::int64_t lanes = std::min<std::int64_t>(V::count, last - c);
                    const auto value = gated(at, c, lanes);
                    lists.used += V::compress(
                        value, lane + static_cast<typename V::Int>((c - first) * row_step),
                        lists.values + lists.used, lists.rows + lists.used);
                }
                const std::int64_t pixel = y * s.stride_h * s.in_width + x * s.stride_w;
                if (lists.used > start)
                    lists.items[lists.count++] = {target + pixel * s.in_channels, start,
                                                  lists.used - start};
            }
    }

  private:
    // The pooled values that may belong at one position.
    struct Gathered {
        std::int64_t index[256], tap[256], count = 0, position;

        Gathered(const MapReader& r, std::int64_t window, std::int64_t y, std::int64_t x)
            : position((window * r.s.out_height + y) * r.s.out_width + x) {
            const Covering down = r.rows_at[y], across = r.columns_at[x];
            for (std::int64_t i = 0; i < down.count; ++i)
                for (std::int64_t j = 0; j < across.count; ++j, ++count) {
                    const std::int64_t row = down.first + i * r.rows.step();
                    const std::int64_t column = across.first + j * r.columns.step();
                    index[count] = ((window * r.rows.windows + row) * r.columns.windows + column) *
                                   r.s.out_channels;
                    tap[count] = (down.tap - i * r.rows.tap_step()) * r.columns.kernel +
                                 across.tap - j * r.columns.tap_step();
                }
        }
    };

    typename V::Value gated(const Gathered& at, std::int64_t c, std::int64_t lanes) const {
        typename V::Value value{};
        for (std::int64_t i = 0; i < at.count; ++i) {
            const typename V::Value pooled = V::load(signal + at.index[i] + c, lanes);
            if (!switches) {
                value = pooled;
                continue;
            }
            const typename V::Integer hit = V::load_bytes(switches + at.index[i] + c, lanes) ==
                                            static_cast<typename V::Int>(at.tap[i]);
            value = hit ? value + pooled : value;
        }
        if (relu) value = value <= 0 ? typename V::Value{} : value;
        if (masked) value = is_positive(at.position, c, lanes) ? value : typename V::Value{};
        return value;
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

// Sorts the lists by length (a counting sort, stable): the loop over a list then has the length of
// the one before, and its end is predicted. `sizes` has room for longest + 2 counts.
template <typename T>
void sort_by_length(Lists<T>& lists, std::int64_t longest, std::int32_t* sizes) {
    std::fill_n(sizes, longest + 2, 0);
    for (std::int64_t i = 0; i < lists.count; ++i) ++sizes[lists.items[i].count + 1];
    for (std::int64_t n = 0; n < longest; ++n) sizes[n + 1] += sizes[n];
    for (std::int64_t i = 0; i < lists.count; ++i)
        lists.sorted[sizes[lists.items[i].count]++] = lists.items[i];
}

}  // namespace zfcuda
