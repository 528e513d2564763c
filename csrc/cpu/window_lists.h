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

// Channels [first, last) of the maps; channel first + i meets the panel's row at i * row_step.
struct Block {
    std::int64_t first, last, row_step;
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

    // Appends the lists of a block of a window whose image begins at `target`. `empty` has room for
    // a byte for each pooled position.
    void read(std::int64_t window, const Block& block, std::int64_t target, Lists<T>& lists,
              std::uint8_t* empty) const {
        find_empty(window, block, empty);
        if (masked)
            relu ? read_as<true, true>(window, block, target, lists, empty)
                 : read_as<false, true>(window, block, target, lists, empty);
        else
            relu ? read_as<true, false>(window, block, target, lists, empty)
                 : read_as<false, false>(window, block, target, lists, empty);
    }

  private:
    // Marks the pooled positions that lie outside the map, or are not used for another reason.
    void find_empty(std::int64_t window, const Block& block, std::uint8_t* empty) const {
        const std::int64_t positions = rows.windows * columns.windows;
        for (std::int64_t i = 0; switches && i < positions; ++i) {
            const std::uint8_t* at = switches + (window * positions + i) * s.out_channels;
            std::uint8_t all = 255;
            for (std::int64_t c = block.first; c < block.last; ++c) all &= at[c];
            empty[i] = all == 255;
        }
    }

    template <bool relu, bool masked>
    void read_as(std::int64_t window, const Block& block, std::int64_t target, Lists<T>& lists,
                 const std::uint8_t* empty) const {
        std::int64_t position = window * s.out_height * s.out_width;
        for (std::int64_t y = 0; y < s.out_height; ++y)
            for (std::int64_t x = 0; x < s.out_width; ++x, ++position) {
                Sources from;
                find_sources(window, y, x, empty, from);
                const std::int64_t start = lists.used;
                const auto append = [&](auto count) {
                    lists.used += compress<relu, masked>(from, count, position, block,
                                                         lists.values + start, lists.rows + start);
                };
                using std::integral_constant;
                if (!switches)
                    append(integral_constant<int, kNoPool>{});
                else if (from.count == 1)
                    append(integral_constant<int, 1>{});
                else if (from.count == 2)
                    append(integral_constant<int, 2>{});
                else if (from.count == 4)
                    append(integral_constant<int, 4>{});
                else if (from.count)
                    append(from.count);
                if (lists.used == start) continue;
                const std::int64_t pixel = y * s.stride_h * s.in_width + x * s.stride_w;
                lists.items[lists.count++] = {target + pixel * s.in_channels, start,
                                              lists.used - start};
            }
    }

    // The pooling windows that may belong at one position: where their values and switches of
    // channel 0 are, and which switch points here.
    struct Sources {
        const T* values[256];
        const std::uint8_t* switches[256];
        typename V::Int tap[256];
        int count = 0;
    };

    void find_sources(std::int64_t window, std::int64_t y, std::int64_t x,
                      const std::uint8_t* empty, Sources& from) const {
        const Covering down = rows_at[y], across = columns_at[x];
        for (std::int64_t i = 0; i < down.count; ++i)
            for (std::int64_t j = 0; j < across.count; ++j) {
                const std::int64_t at = (down.first + i * rows.step) * columns.windows +
                                        across.first + j * columns.step;
                if (switches && empty[at]) continue;
                const std::int64_t index =
                    (window * rows.windows * columns.windows + at) * s.out_channels;
                from.values[from.count] = signal + index;
                from.switches[from.count] = switches + index;
                from.tap[from.count++] = (down.tap - i * rows.tap_step) * columns.kernel +
                                         across.tap - j * columns.tap_step;
            }
    }

    // Writes the list of one position; returns its length.
    template <bool relu, bool masked, typename Count>
    std::int64_t compress(const Sources& from, Count count, std::int64_t position, Block block,
                          T* values, std::int32_t* places) const {
        const typename V::Value zero{};
        std::int64_t used = 0;
        typename V::Integer place;
        for (int i = 0; i < V::count; ++i) place[i] = i * block.row_step;
        const auto step = static_cast<typename V::Int>(V::count * block.row_step);
        const auto append = [&](std::int64_t c, std::int64_t lanes) {
            typename V::Value value{};
            if constexpr (std::is_same_v<Count, std::integral_constant<int, kNoPool>>)
                value = V::load(from.values[0] + c, lanes);
            else
                for (int i = 0; i < count; ++i)
                    value = V::add_where(value, from.values[i] + c, from.switches[i] + c,
                                         from.tap[i], lanes);
            if (relu) value = value <= 0 ? zero : value;
            if (masked) value = is_positive(position, c, lanes) ? value : zero;
            used += V::compress(value, place, values + used, places + used);
            place += step;
        };
        std::int64_t c = block.first;
        for (; c + V::count <= block.last; c += V::count) append(c, V::count);
        if (c < block.last) append(c, block.last - c);
        return used;
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

    static constexpr int kNoPool = -1;

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
