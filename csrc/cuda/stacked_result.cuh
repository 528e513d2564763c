// How finished sums leave where columns are the phases of a stride (columns.cuh).
//
// Where a phase lacks a tap, the product has a zero weight, which makes NaN of what is not finite
// there. So a thread that has such a sum computes its results once more, one after the other, as
// their phases are: from the source, without the taps whose weights are -0. It costs nothing where
// all sums are finite but to look.
#pragma once

#include "tap_split.cuh"
#include "tap_weights.cuh"

namespace zfcuda {

// A column: what it adds to where column 0 of a pixel goes, and its bias.
template <typename T>
struct StackedColumn {
    int y, x;
    std::int64_t offset;
    Sum<T> shift;

    __device__ StackedColumn(const TapPlan& p, const T* bias, int column) {
        const int channels = static_cast<int>(p.result.channels), phase = column / channels;
        const int channel = column - phase * channels;
        y = phase / p.x.stacked;
        x = phase - y * p.x.stacked;
        offset = y * p.result.step_y() + x * p.result.step_x() + channel * p.result.step_channel();
        shift = bias != nullptr ? Sum<T>(bias[channel]) : Sum<T>(0);
    }
    // A pixel's sum, if it lies in the image.
    template <bool kTransposed>
    __device__ void store(const TapPlan& p, const TapResult<T, kTransposed>& to, Sum<T> sum,
                          const TapPixel& target) const {
        if (target.offset >= 0 && target.y + y < p.result.height && target.x + x < p.result.width)
            to.store(sum + shift, target.offset + offset);
    }
};

// What the pixel of a target reads under the first tap.
__device__ inline TapPixel stacked_pixel(const TapPlan& p, const TapPixel& target) {
    const std::int64_t n = target.offset / p.result.step_image();
    const int y = target.y / p.y.stacked + p.y.padding;
    const int x = target.x / p.x.stacked + p.x.padding;
    return {p.steps.offset(n, 0, y, x), y, x};
}

// The sum of a pixel in a column, over the block's chunks of kChunk products, without the taps that
// the phase lacks.
template <typename T, int kChunk, typename Source, typename Packed>
__device__ Sum<T> phase_sum(const TapPlan& p, const Source& source, const Packed* packed,
                            const TapPixel& pixel, int column) {
    const int taps = p.y.kernel * p.x.kernel;
    const int products = p.by_channels ? p.channels : taps * p.channels;
    const ChunkRange range = chunk_range((products + kChunk - 1) / kChunk);
    Sum<T> sum = 0;
#pragma unroll 1
    for (int tap = 0; tap < taps; ++tap) {
        const int row = tap / p.x.kernel * p.y.offset_step;
        const int across = tap % p.x.kernel * p.x.offset_step;
        const int y = pixel.y + row, x = pixel.x + across;
        if (y < 0 || y >= p.height || x < 0 || x >= p.width) continue;
        std::int64_t from = pixel.offset + row * p.steps.row + across * p.steps.column;
#pragma unroll 1
        for (int channel = 0; channel < p.channels; ++channel, from += p.steps.channel) {
            const int k = tap * p.channels + channel;
            const int chunk = (p.by_channels ? channel : k) / kChunk - range.first;
            if (chunk < 0 || chunk >= range.count) continue;
            const auto weight = Sum<T>(packed[packed_place<Packed>(p, k, column)]);
            if (weight == Sum<T>(0) && Sum<T>(1) / weight < Sum<T>(0)) continue;  // -0
            const auto value = Sum<T>(source.template load<1>(from, y, x).value[0]);
            sum += weight * (p.rectify ? rectify(value) : value);
        }
    }
    return sum;
}

// Stores four columns, those there are: sum_of(i, e) is the sum of the pixel in row_of(i) of the
// tile in column first + e.
template <int kRows, int kChunk, bool kTransposed, typename T, typename Source, typename Packed,
          typename RowOf, typename SumOf>
__device__ __forceinline__ void store_phases(const TapPlan& p, const TapResult<T, kTransposed>& to,
                                             const T* bias, const Source& source,
                                             const Packed* packed, int first,
                                             const TapPixel* targets, RowOf&& row_of,
                                             SumOf&& sum_of) {
    bool finite = true;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        if (first + e >= p.columns) continue;
        const StackedColumn<T> column(p, bias, first + e);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            const Sum<T> sum = sum_of(i, e);
            finite = finite && sum - sum == Sum<T>(0);
            column.store(p, to, sum, targets[row_of(i)]);
        }
    }
    if (finite) return;
#pragma unroll 1
    for (int e = 0; e < 4 && first + e < p.columns; ++e) {
        const StackedColumn<T> column(p, bias, first + e);
#pragma unroll 1
        for (int i = 0; i < kRows; ++i) {
            const TapPixel target = targets[row_of(i)];
            if (target.offset < 0) continue;
            const TapPixel pixel = stacked_pixel(p, target);
            column.store(p, to, phase_sum<T, kChunk>(p, source, packed, pixel, first + e), target);
        }
    }
}

}  // namespace zfcuda
