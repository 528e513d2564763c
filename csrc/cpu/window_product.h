// Wide filters: lists of non-zeros times panels of packed weights, added to image windows.
//
//   a run: the image values that one map position adds to that lie side by side, i.e. a kernel row
//   of (kx, channel) pairs; one tap's channels where groups or dilation part them
//
//            panel: one row a map channel       visit: one list (value, row) of a map position
//            +---------------------------+
//   channels | runs x columns of a run   |      registers = sum over the list of value * row
//            +---------------------------+      image at the position's runs += registers
//
// A panel has at most kPanelBytes, so that it stays in the L1 cache while all lists of a unit of
// windows visit it: every multiply-add takes a vector of weights from memory, and the L2 cache
// would deliver half of them in time. Wide runs are cut to columns that fit the registers.
//
// Where the time goes, conv2 of ZFNet on a Zen 5 core that can start two multiply-adds a cycle, in
// cycles for each (2868 values a window, 13 at a position): 0.8 to load weights, values and rows,
// 0.35 to add the registers to an image that lies in the L2 cache (two cycles a vector, for half a
// list of 13), 0.2 to read panels from the L3 cache before they were visited in the order of
// for_panels, now 0.05. Tried and lost: wider or narrower columns (each costs in additions or in
// loads what it saves in the other), panels of 98 KB in the L2 cache (1.0 to load), two lists at
// once and two sums for each list (loads bound it, not the latency of sums), lists sorted by length
// (0.95 of the speed: they jump about the image), row and value interleaved.
#pragma once

#include "gemm.h"
#include "window_lists.h"

namespace zfcuda {

constexpr std::int64_t kPanelBytes = 48 * 1024;
constexpr int kPanelVectors = 6;

// How the weight of one group is cut to panels.
template <typename T>
struct Panels {
    bool merged;                          // kernel positions of a row lie side by side in the image
    std::int64_t runs, width;             // of a kernel
    std::int64_t units;                   // columns of a panel in units of kUnit
    std::int64_t channels;                // of a panel
    std::int64_t across, blocks;          // panels along columns and channels
    std::int64_t down_step, across_step;  // between panels that add to the same image values

    explicit Panels(const WindowShape& s) {
        merged = s.groups == 1 && s.dilation_w == 1;
        runs = merged ? s.kernel_h : s.taps();
        width = merged ? s.kernel_w * s.in_channels : s.in_per_group();
        const std::int64_t vector = gemm::kVector<T>, vectors = gemm::divide_up(width, vector);
        across = gemm::divide_up(vectors, kPanelVectors);
        units = across == 1 ? gemm::divide_up(width, kUnit<T>)
                            : gemm::divide_up(vectors, across) * (vector / kUnit<T>);
        const std::int64_t most =
            std::max<std::int64_t>(vector, kPanelBytes / (columns() * sizeof(T)) / vector * vector);
        blocks = gemm::divide_up(s.out_per_group(), most);
        channels = gemm::round_up(gemm::divide_up(s.out_per_group(), blocks), vector);
        blocks = gemm::divide_up(s.out_per_group(), channels);
        const std::int64_t step = s.stride_w * s.in_channels;  // of a position in the image
        down_step = merged ? s.stride_h / std::gcd(s.stride_h, s.dilation_h) : 1;
        across_step = merged && step % columns() == 0 ? step / columns() : 1;
    }

    std::int64_t columns() const { return units * kUnit<T>; }
    std::int64_t size() const { return channels * columns(); }
    std::int64_t panel(std::int64_t group, std::int64_t block, std::int64_t index) const {
        return ((group * blocks + block) * runs * across + index) * size();
    }
    std::int64_t packed_size(std::int64_t groups) const { return panel(groups, 0, 0); }

    // Parts of an image window that the panels of a block add to one after the other.
    std::int64_t parts() const { return std::min(down_step, runs) * std::min(across_step, across); }
    // body(index, run, column) for the panels of a block in the order in which they lie and are
    // visited: those that add to the same part of the image follow one another. With stride 2, even
    // and odd rows and columns of the image are four such parts.
    template <typename Body>
    void for_panels(Body&& body) const {
        std::int64_t index = 0;
        for (std::int64_t y = 0; y < down_step; ++y)
            for (std::int64_t x = 0; x < across_step; ++x)
                for (std::int64_t run = y; run < runs; run += down_step)
                    for (std::int64_t column = x; column < across; column += across_step)
                        body(index++, run, column);
    }
};

template <typename T>
void pack_panels(const WindowShape& s, const T* weight, Sum<T>* packed, const Exec& exec) {
    const Panels<Sum<T>> p(s);
    const std::int64_t taps = s.taps(), channels = s.in_per_group();
    const std::int64_t side = p.merged ? s.kernel_w : 1;  // kernel positions of a run
    parallel_for(s.out_channels, exec, [&](std::int64_t o) {
        const T* filter = weight + o * channels * taps;
        const std::int64_t group = o / s.out_per_group(), own = o % s.out_per_group();
        p.for_panels([&](std::int64_t index, std::int64_t run, std::int64_t column) {
            Sum<T>* row =
                packed + p.panel(group, own / p.channels, index) + own % p.channels * p.columns();
            const std::int64_t first = column * p.columns();
            const std::int64_t count = std::min(p.columns(), p.width - first);
            std::int64_t tap = run * side + first / channels, c = first % channels;
            for (std::int64_t i = 0; i < count; ++i) {
                row[i] = filter[c * taps + tap];
                if (++c == channels) c = 0, ++tap;
            }
        });
    });
}

// Where a visit adds; lanes of the last vector from `last` on are not the run's.
template <typename T>
struct Target {
    T* image;
    std::int64_t last;
};

// All lists with one panel of `full` vectors and `half` half vectors.
template <typename T, int full, int half>
void visit(const Lists<T>& lists, const T* panel, std::int64_t size, const Target<T>& target) {
    using Full = Wide<T, kVectorBytes>;
    using Half = Wide<T, half ? kVectorBytes / 2 : kVectorBytes>;
    constexpr int lanes = kVectorBytes / sizeof(T), last = half ? lanes / 2 : lanes;
    const std::int64_t lines = gemm::divide_up(size * sizeof(T), kLine);
    const std::int64_t ahead = gemm::divide_up(lines, std::max<std::int64_t>(lists.count, 1));
    const char* next = reinterpret_cast<const char*>(panel + size);
    typename Half::Value used;
    for (int i = 0; i < last; ++i) used[i] = i < target.last;
    for (std::int64_t n = 0; n < lists.count; ++n) {
        const Item& item = lists.items[n];
        for (std::int64_t i = 0; i < ahead; ++i, next += kLine) __builtin_prefetch(next, 0, 2);
        const T* values = lists.values + item.start;
        const std::int32_t* rows = lists.rows + item.start;
        typename Full::Value sum[full > 0 ? full : 1] = {};
        typename Half::Value rest = {};
        for (std::int64_t i = 0; i < item.count; ++i) {
            const T* row = panel + rows[i];
#pragma GCC unroll 8
            for (int v = 0; v < full; ++v) sum[v] += values[i] * Full::at(row + v * lanes);
            if constexpr (half) rest += values[i] * Half::at(row + full * lanes);
        }
        T* image = target.image + item.target;
#pragma GCC unroll 8
        for (int v = 0; v < full - !half; ++v) Full::at(image + v * lanes) += sum[v];
        auto& end = Half::at(image + (full - !half) * lanes);
        if constexpr (half)
            end += used != 0 ? rest : typename Half::Value{};
        else
            end += used != 0 ? sum[full - 1] : typename Full::Value{};
    }
}

template <typename T>
void visit_panel(std::int64_t units, const Lists<T>& lists, const T* panel, std::int64_t size,
                 const Target<T>& target) {
    using Visit = void (*)(const Lists<T>&, const T*, std::int64_t, const Target<T>&);
    if constexpr (kHalves == 2) {
        static constexpr Visit of_units[] = {visit<T, 0, 1>, visit<T, 1, 0>, visit<T, 1, 1>,
                                             visit<T, 2, 0>, visit<T, 2, 1>, visit<T, 3, 0>,
                                             visit<T, 3, 1>, visit<T, 4, 0>, visit<T, 4, 1>,
                                             visit<T, 5, 0>, visit<T, 5, 1>, visit<T, 6, 0>};
        of_units[units - 1](lists, panel, size, target);
    } else {
        static constexpr Visit of_units[] = {visit<T, 1, 0>, visit<T, 2, 0>, visit<T, 3, 0>,
                                             visit<T, 4, 0>, visit<T, 5, 0>, visit<T, 6, 0>};
        of_units[units - 1](lists, panel, size, target);
    }
}

// All lists of channel block `block` of a group, with every panel of the block.
template <typename T>
void add_block(const WindowShape& s, const Panels<T>& p, const Lists<T>& lists, const T* packed,
               std::int64_t group, std::int64_t block, T* image) {
    const std::int64_t line = s.in_width * s.in_channels, vector = gemm::kVector<T>;
    p.for_panels([&](std::int64_t index, std::int64_t run, std::int64_t column) {
        const std::int64_t first = column * p.columns();
        const std::int64_t width = std::min(p.columns(), p.width - first);
        const std::int64_t units = gemm::divide_up(width, kUnit<T>);
        const std::int64_t end = units * kUnit<T> % vector ? kUnit<T> : vector;
        const std::int64_t tap = p.merged ? run * s.dilation_h * line
                                          : run / s.kernel_w * s.dilation_h * line +
                                                run % s.kernel_w * s.dilation_w * s.in_channels;
        visit_panel(
            units, lists, packed + p.panel(group, block, index), p.size(),
            {image + tap + group * s.in_per_group() + first, end - (units * kUnit<T> - width)});
    });
}

}  // namespace zfcuda
