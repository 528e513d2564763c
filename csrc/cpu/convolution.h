// The driver of the forward and the transposed convolution: a matrix product of output positions
// (rows) with output channels (columns), whose left operand is packed from the source on the fly,
// a block at a time (implicit GEMM; nothing of the size of an im2col matrix exists).
#pragma once

#include "gemm.h"
#include "parallel.h"
#include "taps.h"

namespace zfcuda {

// One pass: dest = taps of source x weight. T is what the tensors hold; everything that is packed,
// and the tiles, are Sum<T>.
template <typename T>
struct Pass {
    Taps<Sum<T>> taps;  // of group 0
    Layout dest;
    std::int64_t batch, groups;
    std::int64_t columns;  // output channels of a group
    // Element of the weight for group 0, output channel j, source channel c, kernel position 0.
    const T* weight;
    std::int64_t weight_group, weight_column, weight_channel, kernel_w;

    std::int64_t depth() const { return taps.size(); }
    std::int64_t packed_weight() const {
        return groups * depth() * gemm::padded_columns<T>(columns);
    }
};

// The pass of the forward convolution.
template <typename T>
Pass<T> forward_pass(const ConvShape& s, const T* weight) {
    const Axis rows =
        forward_axis(s.in_height, s.out_height, s.kernel_h, s.stride_h, s.padding_h, s.dilation_h);
    const Axis columns =
        forward_axis(s.in_width, s.out_width, s.kernel_w, s.stride_w, s.padding_w, s.dilation_w);
    const std::int64_t filter = s.in_per_group() * s.taps();
    return {{s.image(), rows, columns, 0, s.in_per_group()},
            s.maps(),
            s.batch,
            s.groups,
            s.out_per_group(),
            weight,
            s.out_per_group() * filter,
            filter,
            s.taps(),
            s.kernel_w};
}

// The pass of one phase of the transposed convolution: image positions phase, phase + stride, ….
template <typename T>
Pass<T> phase_pass(const ConvShape& s, const T* weight, std::int64_t phase_y,
                   std::int64_t phase_x) {
    const Axis rows = transposed_axis(s.in_height, s.out_height, s.kernel_h, s.stride_h,
                                      s.padding_h, s.dilation_h, phase_y);
    const Axis columns = transposed_axis(s.in_width, s.out_width, s.kernel_w, s.stride_w,
                                         s.padding_w, s.dilation_w, phase_x);
    const std::int64_t filter = s.in_per_group() * s.taps();
    return {{s.maps(), rows, columns, 0, s.out_per_group()},
            s.image(),
            s.batch,
            s.groups,
            s.in_per_group(),
            weight,
            s.out_per_group() * filter,
            s.taps(),
            filter,
            s.kernel_w};
}

// body(pass) for each phase that has positions.
template <typename T, typename Body>
void for_phases(const ConvShape& s, const T* weight, Body&& body) {
    for (std::int64_t y = 0; y < std::min(s.stride_h, s.in_height); ++y)
        for (std::int64_t x = 0; x < std::min(s.stride_w, s.in_width); ++x)
            body(phase_pass(s, weight, y, x));
}

// What happens to a sum before it is stored.
template <typename T>
struct Epilogue {
    Gate gate;
    const T* bias;
    const T* forward;
    T* dest;

    void operator()(std::int64_t offset, std::int64_t channel, Sum<T> value) const {
        if (bias) value += bias[channel];
        if (gate == Gate::deconvnet) value = value <= 0 ? Sum<T>(0) : value;
        if (gate == Gate::backprop) value = forward[offset] <= 0 ? Sum<T>(0) : value;
        dest[offset] = T(value);
    }

    // Channels of a position as halves, `step` apart, a vector at a time.
    void halves(std::int64_t offset, std::int64_t step, std::int64_t channel, const Sum<T>* values,
                std::int64_t count) const {
        constexpr std::int64_t columns = gemm::kColumns<T>;
        Sum<T> row[columns], other[columns];
        T stored[columns];
        std::copy_n(values, count, row);
        if (bias) {
            const Sum<T>* shift = widened(bias + channel, count, other);
            for (std::int64_t i = 0; i < count; ++i) row[i] += shift[i];
        }
        if (gate == Gate::deconvnet)
            for (std::int64_t i = 0; i < count; ++i) row[i] = row[i] <= 0 ? 0 : row[i];
        if (gate == Gate::backprop) {
            for (std::int64_t i = 0; i < count; ++i) stored[i] = forward[offset + i * step];
            const Sum<T>* mask = widened(stored, count, other);
            for (std::int64_t i = 0; i < count; ++i) row[i] = mask[i] <= 0 ? 0 : row[i];
        }
        store_rounded(stored, row, count);
        for (std::int64_t i = 0; i < count; ++i) dest[offset + i * step] = stored[i];
    }
};

constexpr std::int64_t kPassRows = 8 * gemm::kRows;
template <typename T>
constexpr std::int64_t kPassColumns = 12 * gemm::kColumns<T>;

// Scratch of one thread: a block of packed rows and the tiles of the block of the result.
template <typename T>
constexpr std::int64_t pass_scratch(std::int64_t columns) {
    return kPassRows *
           (gemm::kRowStride + gemm::padded_columns<T>(std::min(columns, kPassColumns<T>)));
}

// The packed weight: for each group, for each block of depth, the panels of columns, k-major, cut
// to a multiple of `step`.
template <typename T>
void pack_weight(const Pass<T>& pass, Sum<T>* packed, const Exec& exec,
                 std::int64_t panel = gemm::kColumns<T>, std::int64_t step = gemm::kVector<T>) {
    const std::int64_t depth = pass.depth(), padded = gemm::round_up(pass.columns, step);
    const std::int64_t panels = gemm::divide_up(padded, panel);
    const Axis &rows = pass.taps.rows, &columns = pass.taps.columns;
    parallel_for(pass.groups * panels, exec, [&](std::int64_t unit) {
        const std::int64_t group = unit / panels, first = unit % panels * panel;
        const std::int64_t width = std::min(panel, padded - first);
        const std::int64_t used = std::min(width, pass.columns - first);
        const T* weight = pass.weight + group * pass.weight_group + first * pass.weight_column;
        std::int64_t k = 0;
        for (std::int64_t ty = 0; ty < rows.taps; ++ty)
            for (std::int64_t tx = 0; tx < columns.taps; ++tx)
                for (std::int64_t c = 0; c < pass.taps.channels; ++c, ++k) {
                    const std::int64_t block = k / gemm::kDepth * gemm::kDepth;
                    const std::int64_t length = std::min(gemm::kDepth, depth - block);
                    Sum<T>* dest = packed + (group * depth + block) * padded + first * length +
                                   (k - block) * width;
                    const T* from = weight + c * pass.weight_channel +
                                    rows.kernel(ty) * pass.kernel_w + columns.kernel(tx);
                    for (std::int64_t j = 0; j < used; ++j) dest[j] = from[j * pass.weight_column];
                    for (std::int64_t j = used; j < width; ++j) dest[j] = 0;
                }
    });
}

template <typename T>
void store_tiles(const Pass<T>& pass, const Epilogue<T>& epilogue, const Sum<T>* tiles,
                 std::int64_t position, std::int64_t rows, std::int64_t channel,
                 std::int64_t columns) {
    gemm::for_column_panels<T>(columns, [&](std::int64_t j, std::int64_t width) {
        Cursor at(pass.taps.rows, pass.taps.columns, position);
        const std::int64_t used = std::min(width, columns - j);
        gemm::for_row_panels(rows, [&](std::int64_t i, std::int64_t height) {
            const Sum<T>* tile = tiles + gemm::tile_offset<T>(rows, i, j, width);
            for (std::int64_t r = 0; r < std::min(height, rows - i); ++r, at.next()) {
                const std::int64_t offset = pass.dest.offset(
                    at.n, channel + j, pass.taps.rows.dest(at.y), pass.taps.columns.dest(at.x));
                const std::int64_t step = pass.dest.step_channel();
                if constexpr (std::is_same_v<T, Sum<T>>)
                    for (std::int64_t c = 0; c < used; ++c)
                        epilogue(offset + c * step, channel + j + c, tile[r * width + c]);
                else
                    epilogue.halves(offset, step, channel + j, tile + r * width, used);
            }
        });
    });
}

// tiles = rows of taps from `position` on x columns [first, first + columns) of one group's packed
// weight, with room for the packed rows at `a`.
template <typename T, typename Read>
void multiply_block(const Taps<T>& taps, const Read& source, std::int64_t position,
                    std::int64_t rows, const T* packed, std::int64_t padded, std::int64_t columns,
                    T* a, T* tiles, std::int64_t first = 0) {
    const std::int64_t depth = taps.size();
    std::int64_t k = 0;
    do {
        const std::int64_t length = std::min(gemm::kDepth, depth - k);
        Cursor at(taps.rows, taps.columns, position);
        for (std::int64_t r = 0; r < rows; ++r, at.next())
            taps.read_row(source, at, k, k + length, a + r * gemm::kRowStride);
        const T* b = packed + k * padded + first * length;
        gemm::multiply<T, gemm::Rows::row_major>(a, b, rows, columns, length, tiles, k > 0);
        k += length;
    } while (k < depth);
}

// One block of a pass: positions from `position` on, columns from `column` on of one group, whose
// taps and weight these are; `a` is the thread's scratch.
template <typename T, typename Read>
void run_block(const Pass<T>& pass, const Taps<Sum<T>>& taps, const Read& source,
               const Epilogue<T>& epilogue, const Sum<T>* packed, std::int64_t group,
               std::int64_t position, std::int64_t end, std::int64_t column, Sum<T>* a) {
    const std::int64_t rows = std::min(kPassRows, end - position);
    const std::int64_t columns = std::min(kPassColumns<T>, pass.columns - column);
    Sum<T>* const tiles = a + kPassRows * gemm::kRowStride;
    multiply_block(taps, source, position, rows, packed, gemm::padded_columns<T>(pass.columns),
                   columns, a, tiles, column);
    store_tiles(pass, epilogue, tiles, position, rows, group * pass.columns + column, columns);
}

// Runs a pass; `packed` has room for pass.packed_weight(), `scratch` for pass_scratch() a thread.
template <typename T, typename Read>
void run_pass(const Pass<T>& pass, const Read& source, const Epilogue<T>& epilogue, Sum<T>* packed,
              Sum<T>* scratch, const Exec& exec) {
    pack_weight(pass, packed, exec);
    const std::int64_t positions = pass.taps.positions(pass.batch), depth = pass.depth();
    const std::int64_t row_blocks = gemm::divide_up(positions, kPassRows);
    const std::int64_t column_blocks = gemm::divide_up(pass.columns, kPassColumns<T>);
    const std::int64_t padded = gemm::padded_columns<T>(pass.columns);
    parallel_for_thread(
        row_blocks * pass.groups * column_blocks, exec, [&](std::int64_t unit, int thread) {
            const std::int64_t column = unit % column_blocks * kPassColumns<T>;
            const std::int64_t group = unit / column_blocks % pass.groups;
            const std::int64_t position = unit / column_blocks / pass.groups * kPassRows;
            Taps<Sum<T>> taps = pass.taps;
            taps.first_channel += group * taps.channels;
            run_block(pass, taps, source, epilogue, packed + group * depth * padded, group,
                      position, positions, column,
                      scratch + thread * pass_scratch<T>(pass.columns));
        });
}

}  // namespace zfcuda
