// What every block of a tap product does before and after its main loop: which results are its own,
// where they read and are written, and how a finished sum leaves. tap_gemm.cuh has the equation.
#pragma once

#include "odometer.cuh"
#include "tap_plan.cuh"

namespace zfcuda {

// Where a pixel of the result reads (before the taps): element 0 of the block's group, row, column.
// Or, of a target, where it is written.
struct alignas(16) TapPixel {
    std::int64_t offset;
    int y, x;
};

// Whether a tile's columns may be phases (columns.cuh).
template <bool kTransposed, typename Tile>
constexpr bool kStacks = kTransposed && Tile::kN <= kMostStacked;

// What a block keeps of a target: only phases need its row and column.
struct TapOffset {
    std::int64_t offset;

    __device__ void operator=(const TapPixel& target) { offset = target.offset; }
};
template <bool kTransposed, typename Tile>
using TapTarget = std::conditional_t<kStacks<kTransposed, Tile>, TapPixel, TapOffset>;

// Whether a source computes what it loads from much else.
template <typename Source>
constexpr bool kGathers = false;

// The source is a tensor. A source's Value is what it loads.
template <typename T>
struct TensorSource {
    using Value = T;
    const T* values;

    // kVector channels from element `offset` on, which lies at row y and column x.
    template <int kVector>
    __device__ Vector<T, kVector> load(std::int64_t offset, int, int) const {
        return load_vector<T, kVector>(values + offset);
    }
};

// The same, zero where `forward` is given and blocks it.
template <typename T>
struct MaskedSource {
    using Value = T;
    const T *values, *forward;

    template <int kVector>
    __device__ Vector<T, kVector> load(std::int64_t offset, int, int) const {
        return load_gated<T, kVector>(values, forward, offset);
    }
};

// A block's tile: rows are pixels of one phase of all images, or of all images' strips; columns are
// channels of one group.
template <bool kTransposed>
struct TapBlock {
    int first_column, group, phase_y, phase_x;
    int strips, strip, pixels;
    PhaseTaps rows, columns;
    std::int64_t first_pixel, pixel_count;

    // Where the first pixel lies: in which strip of all images', and there.
    struct Start {
        std::int64_t strip;
        int y, x;
    };
    struct Place {
        std::int64_t n;
        int y, x;
        bool inside;
    };

    __device__ Start start() const {
        const std::int64_t line = first_pixel / strip, number = line / rows.pixels;
        return {number, static_cast<int>(line - number * rows.pixels),
                static_cast<int>(first_pixel - line * strip)};
    }
    __device__ Place place(int row) const {
        const Start from = start();
        const int across = from.x + row, down = from.y + across / strip;
        const std::int64_t number = from.strip + down / rows.pixels, n = number / strips;
        const int x = static_cast<int>(number - n * strips) * strip + across % strip;
        return {n, down % rows.pixels, x,
                row < pixels && first_pixel + row < pixel_count && x < columns.pixels};
    }
    __device__ TapPixel pixel(const TapPlan& p, int row) const {
        const Place at = place(row);
        const int y = at.y * p.y.pixel_step + rows.offset;
        const int x = at.x * p.x.pixel_step + columns.offset;
        return {p.steps.offset(at.n, std::int64_t(group) * p.channels, y, x),
                at.inside ? y : kOutside, x};
    }
    // Where column 0 of a row goes, with its row and column of the result; or -1.
    __device__ TapPixel target(const TapPlan& p, int row) const {
        const Place at = place(row);
        const int y = kTransposed ? phase_y + at.y * p.y.stride * p.y.stacked : at.y;
        const int x = kTransposed ? phase_x + at.x * p.x.stride * p.x.stacked : at.x;
        return {at.inside ? p.result.offset(at.n, std::int64_t(group) * p.columns, y, x) : -1, y,
                x};
    }
};

// That of a number. Column tiles vary fastest: blocks that run together share their source.
template <bool kTransposed, int kN>
__device__ TapBlock<kTransposed> tap_block(const TapPlan& p, unsigned block) {
    TapBlock<kTransposed> b;
    b.first_column = static_cast<int>(block % p.column_tiles) * kN;
    block /= p.column_tiles;
    b.pixels = p.block_pixels;
    b.first_pixel = std::int64_t(block % p.row_tiles) * b.pixels;
    block /= p.row_tiles;
    b.group = static_cast<int>(block % p.groups);
    b.phase_x = static_cast<int>(block / p.groups % p.x.phases);
    b.phase_y = static_cast<int>(block / p.groups / p.x.phases);
    b.rows = phase_taps<kTransposed>(p.y, b.phase_y);
    b.columns = phase_taps<kTransposed>(p.x, b.phase_x);
    b.strips = p.strip > 0 ? p.strips : 1;
    b.strip = p.strip > 0 ? p.strip : b.columns.pixels;
    b.pixel_count = p.batch * b.strips * b.rows.pixels * b.strip;
    return b;
}

// Blocks of a grid, checked.
inline dim3 tap_grid(std::int64_t blocks) {
    if (blocks > std::numeric_limits<int>::max())
        throw std::runtime_error("zfcuda: a CUDA convolution needs over 2^31 blocks");
    return dim3(static_cast<unsigned>(blocks));
}

// The grid for tiles of this size, whose numbers it writes into the plan, in x, perhaps empty;
// the splits of k are y.
inline dim3 tap_grid(TapPlan& p, int rows, int columns, int splits = 1) {
    // The pixels of the first phase, the largest one.
    const std::int64_t height = (p.y.size + p.y.phases - 1) / p.y.phases;
    const std::int64_t width =
        p.strip > 0 ? std::int64_t(p.strips) * p.strip : (p.x.size + p.x.phases - 1) / p.x.phases;
    const std::int64_t row_tiles = (p.batch * height * width + rows - 1) / rows;
    p.block_pixels = rows;
    p.column_tiles = (p.padded_columns + columns - 1) / columns;
    dim3 grid = tap_grid(row_tiles * p.column_tiles * p.groups * p.y.phases * p.x.phases);
    grid.y = static_cast<unsigned>(splits);
    p.row_tiles = static_cast<int>(row_tiles);
    return grid;
}

// The bias of four columns of a group, zero beyond the last.
template <typename T>
__device__ void load_bias(const TapPlan& p, int group, const T* bias, int column,
                          Sum<T> (&shift)[4]) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
        shift[j] = bias != nullptr && column + j < p.columns
                       ? Sum<T>(bias[std::int64_t(group) * p.columns + column + j])
                       : Sum<T>(0);
}

// Where finished sums go, rounded, and what the convolution's gate does to them on the way.
template <typename T, bool kTransposed>
struct TapResult {
    T* values;
    const T* forward;
    bool rectified;
    Sum<T>* sums = nullptr;  // of halves: where these go instead, as they are

    __device__ T finish(Sum<T> value, std::int64_t offset) const {
        if (!kTransposed && forward != nullptr && Sum<T>(forward[offset]) <= Sum<T>(0)) value = 0;
        return static_cast<T>(!kTransposed && rectified ? rectify(value) : value);
    }
    __device__ void store(Sum<T> value, std::int64_t offset) const {
        if constexpr (sizeof(T) < sizeof(Sum<T>))
            if (sums != nullptr) {
                sums[offset] = value;
                return;
            }
        values[offset] = finish(value, offset);
    }
    // Four that are neighbours in memory, aligned.
    __device__ void store_quad(const Sum<T> (&quad)[4], std::int64_t offset) const {
        constexpr int kPack = Pack<T>::size < 4 ? Pack<T>::size : 4;
        if constexpr (sizeof(T) < sizeof(Sum<T>))
            if (sums != nullptr) {
                store_vector(sums + offset, Vector<Sum<T>, 4>{quad[0], quad[1], quad[2], quad[3]});
                return;
            }
#pragma unroll
        for (int e = 0; e < 4; e += kPack) {
            Vector<T, kPack> pack;
#pragma unroll
            for (int f = 0; f < kPack; ++f) pack.value[f] = finish(quad[e + f], offset + e + f);
            store_vector(values + offset + e, pack);
        }
    }
    // Four channels of an NHWC pixel, those there are.
    __device__ void store_channels(const TapPlan& p, const Sum<T> (&quad)[4], std::int64_t target,
                                   int column) const {
        if (target < 0 || column >= p.columns) return;
        if (p.quads) return store_quad(quad, target + column);
#pragma unroll
        for (int e = 0; e < 4; ++e)
            if (column + e < p.columns) store(quad[e], target + column + e);
    }
};

}  // namespace zfcuda
