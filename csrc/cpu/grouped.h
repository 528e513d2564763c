// Convolutions of narrow groups in channels_last: a vector of channels is one group or several.
//
//   input channels  | g0: a b c d | g1: e f g h | …        a vector of the source at one tap
//   for i = 0 … 3   | a a a a     | e e e e     | …        its lanes, i-th of their group
//                   | weight[o][i] of each output channel  a vector, packed
//
// maps[position][o] = sum over taps and i of shuffle_i(source[position + tap]) * weight[tap][i][o]:
// a load and as many shuffles and multiply-adds a tap as a group has channels; none of the vector
// is empty, where the general product (convolution.h) would have a group's few channels as its
// columns. A depthwise convolution is the case of one channel, without shuffles. The sums are those
// of the general product, term by term, while they fit one block of depth.
//
// Measured as in planes.h, torch 2.13 / ours (before), forward and by input: groups of 4 at 56 x 56
// 1.7 (.26), 1.3 (.10); depthwise 3 x 3 at 56 x 56 .86 (.03), .96 (.02), at 14 x 14 .68, .69;
// stride 2 at 112 x 112 .44, .42, not explained yet. What made it: all channels of a position
// before the next position (memory in order) 2.3 times, gating a row once instead of for every tap
// 2 times.
#pragma once

#include "convolution.h"

namespace zfcuda {

// The widest group: a shuffle a multiply-add is half the speed of multiply-adds alone.
constexpr std::int64_t kNarrow = 16;

// Whether groups have as many channels on one side as on the other, and fill vectors.
template <typename T>
bool narrow_groups(bool channels_last, std::int64_t groups, std::int64_t in, std::int64_t out,
                   std::int64_t taps) {
    return channels_last && groups > 1 && in == out && in <= kNarrow && Lanes<T>::count % in == 0 &&
           taps > 0 && taps * in <= gemm::kDepth;
}

template <typename T>
bool by_groups(const Pass<T>& pass) {
    return kWhole<T> &&
           narrow_groups<T>(pass.taps.layout.channels_last, pass.groups, pass.taps.channels,
                            pass.columns, pass.taps.rows.taps * pass.taps.columns.taps);
}

template <typename T>
std::int64_t grouped_weight(const Pass<T>& pass) {
    return gemm::round_up(pass.groups * pass.columns, Lanes<T>::count) * pass.depth();
}

template <Gate gate, typename T>
ZF_INLINE typename Lanes<T>::Value load_gated(const Source<gate, T>& source, std::int64_t i,
                                              std::int64_t lanes) {
    using L = Lanes<T>;
    typename L::Value value = L::load(source.signal + i, lanes);
    if constexpr (gate == Gate::deconvnet || gate == Gate::guided)
        value = value <= 0 ? typename L::Value{} : value;
    if constexpr (gate == Gate::backprop || gate == Gate::guided)
        value = L::load(source.forward + i, lanes) <= 0 ? typename L::Value{} : value;
    return value;
}

// Lane c: the first lane of the group of c.
template <typename T>
typename Lanes<T>::Integer first_of_group(std::int64_t width) {
    typename Lanes<T>::Integer first;
    for (int c = 0; c < Lanes<T>::count; ++c) first[c] = c / width * width;
    return first;
}

// One row of positions of one image, all channels.
template <typename T>
struct GroupRow {
    using L = Lanes<T>;
    using Value = typename L::Value;
    static constexpr int kPositions = 6;

    const Pass<T>& pass;
    const Epilogue<T>& epilogue;
    const T* source;  // the row of tap ty begins at element first + ty * row_step
    std::int64_t first, row_step;
    const T* weight;
    std::int64_t n, y;

    template <bool single>
    void run() const {
        const Axis& columns = pass.taps.columns;
        std::int64_t x = 0;
        while (x < columns.count) {
            if (fits(x, kPositions)) {
                positions<single, kPositions>(x, 0, columns.taps);
                x += kPositions;
            } else if (fits(x, 2)) {
                positions<single, 2>(x, 0, columns.taps);
                x += 2;
            } else {
                const std::int64_t left = columns.source(x), first = columns.first_inside(left);
                positions<single, 1>(x, first, std::max(first, columns.last_inside(left)));
                ++x;
            }
        }
    }

  private:
    // Whether so many positions are left, all of whose taps lie inside.
    bool fits(std::int64_t x, std::int64_t count) const {
        const Axis& columns = pass.taps.columns;
        const std::int64_t right = columns.source(x + count - 1);
        return x + count <= columns.count && columns.source(x) >= 0 &&
               right + (columns.taps - 1) * columns.tap_step < columns.source_size;
    }

    // Side by side, so that memory is read in order: all channels of some positions.
    template <bool single, int count>
    void positions(std::int64_t x, std::int64_t first_tap, std::int64_t last_tap) const {
        const std::int64_t channels = pass.groups * pass.columns;
        for (std::int64_t c = 0; c < channels; c += L::count)
            vectors<single, count>(x, c, std::min<std::int64_t>(L::count, channels - c), first_tap,
                                   last_tap);
    }

    template <bool single, int count>
    ZF_INLINE void vectors(std::int64_t x, std::int64_t channel, std::int64_t lanes,
                           std::int64_t first_tap, std::int64_t last_tap) const {
        const Taps<T>& taps = pass.taps;
        const Axis &rows = taps.rows, &columns = taps.columns;
        const std::int64_t step = taps.layout.step_x(), width = pass.columns;
        const typename L::Integer group = first_of_group<T>(width);
        Value sum[count] = {};
        for (std::int64_t ty = 0; ty < rows.taps; ++ty) {
            const std::int64_t row = rows.source(y) + ty * rows.tap_step;
            if (row < 0 || row >= rows.source_size) continue;
            const std::int64_t base = first + ty * row_step + columns.source(x) * step + channel;
            for (std::int64_t tx = first_tap; tx < last_tap; ++tx) {
                const T* filter =
                    weight + channel * pass.depth() + (ty * columns.taps + tx) * width * L::count;
                const std::int64_t at = base + tx * columns.tap_step * step;
                Value value[count];
#pragma GCC unroll 6
                for (int p = 0; p < count; ++p)
                    value[p] = L::load(source + at + p * columns.step * step, lanes);
                if constexpr (single) {
                    const Value w = L::load(filter, L::count);
#pragma GCC unroll 6
                    for (int p = 0; p < count; ++p) sum[p] += value[p] * w;
                } else {
                    for (std::int64_t i = 0; i < width; ++i) {
                        const Value w = L::load(filter + i * L::count, L::count);
                        const typename L::Integer lane = group + typename L::Int(i);
#pragma GCC unroll 6
                        for (int p = 0; p < count; ++p)
                            sum[p] += __builtin_shuffle(value[p], lane) * w;
                    }
                }
            }
        }
#pragma GCC unroll 6
        for (int p = 0; p < count; ++p) store(x + p, channel, lanes, sum[p]);
    }

    void store(std::int64_t x, std::int64_t channel, std::int64_t lanes, Value value) const {
        const std::int64_t offset =
            pass.dest.offset(n, channel, pass.taps.rows.dest(y), pass.taps.columns.dest(x));
        if (epilogue.bias) value += L::load(epilogue.bias + channel, lanes);
        if (epilogue.gate == Gate::deconvnet) value = value <= 0 ? Value{} : value;
        if (epilogue.gate == Gate::backprop)
            value = L::load(epilogue.forward + offset, lanes) <= 0 ? Value{} : value;
        L::store(epilogue.dest + offset, value, lanes);
    }
};

// The weight of each vector of channels: taps, channels of a group, lanes.
template <typename T>
void pack_grouped_weight(const Pass<T>& pass, T* packed, const Exec& exec) {
    constexpr std::int64_t count = Lanes<T>::count;
    const Axis &rows = pass.taps.rows, &columns = pass.taps.columns;
    const std::int64_t channels = pass.groups * pass.columns, depth = pass.depth();
    parallel_for(gemm::divide_up(channels, count), exec, [&](std::int64_t block) {
        T* to = packed + block * depth * count;
        for (std::int64_t ty = 0; ty < rows.taps; ++ty)
            for (std::int64_t tx = 0; tx < columns.taps; ++tx)
                for (std::int64_t i = 0; i < pass.taps.channels; ++i)
                    for (std::int64_t c = block * count; c < (block + 1) * count; ++c) {
                        const T* from = pass.weight + c / pass.columns * pass.weight_group +
                                        c % pass.columns * pass.weight_column +
                                        i * pass.weight_channel + rows.kernel(ty) * pass.kernel_w +
                                        columns.kernel(tx);
                        *to++ = c < channels ? *from : T(0);
                    }
    });
}

// Elements of the scratch of one thread: the rows that a row of positions reads, behind their gate.
template <typename T>
std::int64_t group_rows(const Pass<T>& pass) {
    return pass.taps.rows.taps * pass.taps.layout.step_y();
}

// As run_pass, for by_groups(); `packed` has room for grouped_weight(), `scratch` for group_rows()
// a thread where there is a gate: each element would otherwise pass it once for every tap.
template <Gate gate, typename T>
void run_groups(const Pass<T>& pass, const Source<gate, T>& source, const Epilogue<T>& epilogue,
                T* packed, T* scratch, const Exec& exec) {
    pack_grouped_weight(pass, packed, exec);
    const Axis& rows = pass.taps.rows;
    const std::int64_t line = pass.taps.layout.step_y();
    parallel_for_thread(pass.batch * rows.count, exec, [&](std::int64_t unit, int thread) {
        const std::int64_t n = unit / rows.count, y = unit % rows.count;
        const std::int64_t top = pass.taps.layout.offset(n, 0, rows.source(y), 0);
        GroupRow<T> row{pass, epilogue, source.signal, top, rows.tap_step * line, packed, n, y};
        if (gate != Gate::none) {
            T* const own = scratch + thread * group_rows(pass);
            for (std::int64_t ty = 0; ty < rows.taps; ++ty) {
                const std::int64_t from = rows.source(y) + ty * rows.tap_step;
                if (from < 0 || from >= rows.source_size) continue;
                for (std::int64_t i = 0; i < line; ++i)
                    own[ty * line + i] = source(top + ty * row.row_step + i);
            }
            row.source = own;
            row.first = 0;
            row.row_step = line;
        }
        if (pass.columns == 1)
            row.template run<true>();
        else
            row.template run<false>();
    });
}

}  // namespace zfcuda
