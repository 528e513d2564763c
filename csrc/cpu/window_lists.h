// The non-zeros of window maps as lists, for filters so wide that each list is met many times: a
// position's (value, place of its row in the panel of weights) over one block of channels.
#pragma once

#include "window_maps.h"

namespace zfcuda {

// One position's list.
struct Item {
    std::int64_t target;  // where its first tap adds to the image windows
    std::int64_t start, count;
};

// Where lists are written.
template <typename T>
struct Lists {
    T* values;
    std::int32_t* rows;
    Item* items;
    std::int64_t used, count;
};

// Writes one list.
template <typename T, bool rectify>
struct ListWriter {
    using V = Lanes<T>;
    T* values;
    std::int32_t* rows;
    typename V::Integer place, step;  // rows of the next vector of channels; between two
    std::int64_t count = 0;

    // Row i * row_step of the panel is channel i of the block.
    ListWriter(T* values, std::int32_t* rows, std::int64_t row_step) : values(values), rows(rows) {
        for (int i = 0; i < V::count; ++i) place[i] = i * row_step;
        step = typename V::Integer{} + static_cast<typename V::Int>(V::count * row_step);
    }

    ZF_INLINE void add(std::int64_t, const typename V::Value& value) {
        count += V::template compress<rectify>(value, place, values + count, rows + count);
        place += step;
    }
};

// Appends the lists of a window whose image begins at `target`.
template <typename T, typename Stored>
void append_lists(const WindowShape& s, const MapReader<Stored>& maps, std::int64_t window,
                  Channels channels, std::int64_t row_step, std::int64_t target, Lists<T>& lists) {
    maps.with_gate([&](auto rectify, auto mask) {
        const auto start = [&] {
            return ListWriter<T, rectify()>(lists.values + lists.used, lists.rows + lists.used,
                                            row_step);
        };
        for (std::int64_t y = 0; y < s.out_height; ++y)
            maps.template read_row<mask()>(
                window, y, channels, start, [&](std::int64_t x, const auto& written) {
                    if (written.count == 0) return;
                    const std::int64_t pixel = y * s.stride_h * s.in_width + x * s.stride_w;
                    lists.items[lists.count++] = {target + pixel * s.in_channels, lists.used,
                                                  written.count};
                    lists.used += written.count;
                });
    });
}

}  // namespace zfcuda
