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
// would deliver half of them in time. Wide runs are cut to columns that fit the registers; short
// ones are taken several at a time.
#pragma once

#include "gemm.h"
#include "window_lists.h"

namespace zfcuda {

constexpr std::int64_t kPanelBytes = 48 * 1024;
constexpr int kPanelVectors = 6, kPanelRuns = 2;

// How the weight of one group is cut to panels.
template <typename T>
struct Panels {
    bool merged;                        // kernel positions of a row lie side by side in the image
    std::int64_t runs, width;           // of a kernel
    std::int64_t panel_runs;            // of a panel
    std::int64_t units;                 // columns of a panel's run in units of kUnit
    std::int64_t channels;              // of a panel
    std::int64_t across, down, blocks;  // panels along columns, runs and channels

    explicit Panels(const WindowShape& s) {
        merged = s.groups == 1 && s.dilation_w == 1;
        runs = merged ? s.kernel_h : s.taps();
        width = merged ? s.kernel_w * s.in_channels : s.in_per_group();
        const std::int64_t vector = gemm::kVector<T>, vectors = gemm::divide_up(width, vector);
        across = gemm::divide_up(vectors, kPanelVectors);
        units = across == 1 ? gemm::divide_up(width, kUnit<T>)
                            : gemm::divide_up(vectors, across) * (vector / kUnit<T>);
        panel_runs = merged && vectors <= 2 ? std::min<std::int64_t>(runs, kPanelRuns) : 1;
        down = gemm::divide_up(runs, panel_runs);
        const std::int64_t most = std::max<std::int64_t>(
            vector, kPanelBytes / (row_step() * sizeof(T)) / vector * vector);
        blocks = gemm::divide_up(s.out_per_group(), most);
        channels = gemm::round_up(gemm::divide_up(s.out_per_group(), blocks), vector);
        blocks = gemm::divide_up(s.out_per_group(), channels);
    }

    std::int64_t row_step() const { return panel_runs * units * kUnit<T>; }
    std::int64_t panel_size() const { return channels * row_step(); }
    std::int64_t panel(std::int64_t group, std::int64_t block, std::int64_t row,
                       std::int64_t column) const {
        return (((group * blocks + block) * down + row) * across + column) * panel_size();
    }
    std::int64_t packed_size(std::int64_t groups) const { return panel(groups, 0, 0, 0); }
};

template <typename T>
void pack_panels(const WindowShape& s, const T* weight, T* packed, const Exec& exec) {
    const Panels<T> p(s);
    const std::int64_t columns = p.units * kUnit<T>;
    const std::int64_t taps = s.taps(), channels = s.in_per_group();
    const std::int64_t side = p.merged ? s.kernel_w : 1;  // kernel positions of a run
    parallel_for(s.out_channels, exec, [&](std::int64_t o) {
        const T* filter = weight + o * channels * taps;
        const std::int64_t group = o / s.out_per_group(), own = o % s.out_per_group();
        for (std::int64_t run = 0; run < p.runs; ++run) {
            T* row = packed + p.panel(group, own / p.channels, run / p.panel_runs, 0) +
                     own % p.channels * p.row_step() + run % p.panel_runs * columns;
            std::int64_t j = 0;
            for (std::int64_t tap = run * side; tap < (run + 1) * side; ++tap)
                for (std::int64_t c = 0; c < channels;) {
                    const std::int64_t count = std::min(channels - c, columns - j);
                    for (std::int64_t i = 0; i < count; ++i)
                        row[j + i] = filter[(c + i) * taps + tap];
                    c += count;
                    j = (j + count) % columns;
                    if (j == 0) row += p.panel_size();
                }
        }
    });
}

// Where a visit adds: `runs` runs, run_step apart; lanes of the last vector from `last` on are not
// the run's.
template <typename T>
struct Target {
    T* image;
    std::int64_t run_step;
    std::int64_t last;
};

// All lists with one panel of `runs` runs of `full` vectors and `half` half vectors.
template <typename T, int runs, int full, int half>
void visit(const Lists<T>& lists, const T* panel, std::int64_t size, const Target<T>& target) {
    using Full = Wide<T, kVectorBytes>;
    using Half = Wide<T, half ? kVectorBytes / 2 : kVectorBytes>;
    constexpr int lanes = kVectorBytes / sizeof(T), columns = full * lanes + half * lanes / 2;
    constexpr int last = half ? lanes / 2 : lanes;
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
        typename Full::Value sum[runs][full > 0 ? full : 1] = {};
        typename Half::Value rest[runs] = {};
        for (std::int64_t i = 0; i < item.count; ++i) {
            const T* row = panel + rows[i];
#pragma GCC unroll 4
            for (int r = 0; r < runs; ++r) {
#pragma GCC unroll 8
                for (int v = 0; v < full; ++v)
                    sum[r][v] += values[i] * Full::at(row + r * columns + v * lanes);
                if constexpr (half)
                    rest[r] += values[i] * Half::at(row + r * columns + full * lanes);
            }
        }
        T* image = target.image + item.target;
#pragma GCC unroll 4
        for (int r = 0; r < runs; ++r, image += target.run_step) {
#pragma GCC unroll 8
            for (int v = 0; v < full - !half; ++v) Full::at(image + v * lanes) += sum[r][v];
            auto& end = Half::at(image + (full - !half) * lanes);
            if constexpr (half)
                end += used != 0 ? rest[r] : typename Half::Value{};
            else
                end += used != 0 ? sum[r][full - 1] : typename Full::Value{};
        }
    }
}

template <typename T>
void visit_panel(std::int64_t runs, std::int64_t units, const Lists<T>& lists, const T* panel,
                 std::int64_t size, const Target<T>& target) {
    using Visit = void (*)(const Lists<T>&, const T*, std::int64_t, const Target<T>&);
    if constexpr (kVectorBytes > 16) {
        static constexpr Visit one[] = {visit<T, 1, 0, 1>, visit<T, 1, 1, 0>, visit<T, 1, 1, 1>,
                                        visit<T, 1, 2, 0>, visit<T, 1, 2, 1>, visit<T, 1, 3, 0>,
                                        visit<T, 1, 3, 1>, visit<T, 1, 4, 0>, visit<T, 1, 4, 1>,
                                        visit<T, 1, 5, 0>, visit<T, 1, 5, 1>, visit<T, 1, 6, 0>};
        static constexpr Visit two[] = {visit<T, 2, 0, 1>, visit<T, 2, 1, 0>, visit<T, 2, 1, 1>,
                                        visit<T, 2, 2, 0>};
        (runs == 1 ? one : two)[units - 1](lists, panel, size, target);
    } else {
        static constexpr Visit one[] = {visit<T, 1, 1, 0>, visit<T, 1, 2, 0>, visit<T, 1, 3, 0>,
                                        visit<T, 1, 4, 0>, visit<T, 1, 5, 0>, visit<T, 1, 6, 0>};
        static constexpr Visit two[] = {visit<T, 2, 1, 0>, visit<T, 2, 2, 0>};
        (runs == 1 ? one : two)[units - 1](lists, panel, size, target);
    }
}

// All lists of channel block `block` of a group, with every panel of the block.
template <typename T>
void add_block(const WindowShape& s, const Panels<T>& p, const Lists<T>& lists, const T* packed,
               std::int64_t group, std::int64_t block, T* image) {
    const std::int64_t line = s.in_width * s.in_channels, columns = p.units * kUnit<T>;
    const std::int64_t vector = gemm::kVector<T>;
    for (std::int64_t row = 0; row < p.down; ++row)
        for (std::int64_t column = 0; column < p.across; ++column) {
            const std::int64_t run = row * p.panel_runs, first = column * columns;
            const std::int64_t runs = std::min(p.panel_runs, p.runs - run);
            const std::int64_t width = std::min(columns, p.width - first);
            const std::int64_t units = gemm::divide_up(width, kUnit<T>);
            const std::int64_t end = units * kUnit<T> % vector ? kUnit<T> : vector;
            const std::int64_t tap = p.merged ? run * s.dilation_h * line
                                              : run / s.kernel_w * s.dilation_h * line +
                                                    run % s.kernel_w * s.dilation_w * s.in_channels;
            T* corner = image + tap + group * s.in_per_group() + first;
            visit_panel(runs, units, lists, packed + p.panel(group, block, row, column),
                        p.panel_size(),
                        {corner, s.dilation_h * line, end - (units * kUnit<T> - width)});
        }
}

}  // namespace zfcuda
