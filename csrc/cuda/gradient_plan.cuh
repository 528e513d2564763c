// What both forms of the weight gradient share (conv2d_weight_gradient.cu has the equation): which
// results a block has, what a column of them reads, how many splits share the pixels.
#pragma once

#include <limits>

#include "tap_block.cuh"

namespace zfcuda {

constexpr std::int64_t kBlocks = 4;  // of each multiprocessor, to be reached with splits

inline std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

inline dim3 gradient_grid(std::int64_t blocks) {
    if (blocks > std::numeric_limits<int>::max())
        throw std::runtime_error("zfcuda: a CUDA weight gradient needs over 2^31 blocks");
    return dim3(static_cast<unsigned>(blocks));
}

struct GradientPlan {
    ConvShape s;
    TapSteps steps;              // of the signal
    std::int64_t rows, columns;  // of a group
    std::int64_t split_pixels;   // a multiple of every tile's depth
    int splits, row_tiles, column_tiles;
    bool rectify;

    dim3 grid() const { return gradient_grid(splits * s.groups * row_tiles * column_tiles); }
};

// The results of this block: one tile of one group, one split of its sums.
struct GradientBlock {
    std::int64_t first_row, first_column, split, group, chunks;

    // Tiles of kSide x kSide results, chunks of kDepth pixels. Columns vary fastest: blocks that
    // run together share their pixels.
    template <int kSide, int kDepth>
    __device__ static GradientBlock find(const GradientPlan& p) {
        GradientBlock b;
        unsigned block = blockIdx.x;
        b.first_column = std::int64_t(block % p.column_tiles) * kSide;
        block /= p.column_tiles;
        b.first_row = std::int64_t(block % p.row_tiles) * kSide;
        block /= p.row_tiles;
        b.split = block % p.splits;
        b.group = block / p.splits;
        const std::int64_t pixels = p.s.batch * p.s.out_height * p.s.out_width;
        const std::int64_t rest = pixels - b.split * p.split_pixels;
        b.chunks = ((rest < p.split_pixels ? rest : p.split_pixels) + kDepth - 1) / kDepth;
        return b;
    }

    // Where result (row, 0) of the tile goes among the partial gradients.
    __device__ std::int64_t target(const GradientPlan& p, std::int64_t row) const {
        return (split * p.s.out_channels + group * p.rows + row) * p.columns;
    }
};

// What a column (i, ky, kx) adds to a pixel's position in the image.
struct alignas(16) Column {
    std::int64_t offset;
    int y, x;

    Column() = default;
    // Column j of a group: (i, tap) in NCHW, (tap, i) in NHWC.
    __device__ Column(const GradientPlan& p, const Layout& from, std::int64_t group,
                      std::int64_t j) {
        const ConvShape& s = p.s;
        const std::int64_t i = from.channels_last ? j % s.in_per_group() : j / s.taps();
        const std::int64_t tap = from.channels_last ? j / s.in_per_group() : j % s.taps();
        const std::int64_t row = tap / s.kernel_w * s.dilation_h - s.padding_h;
        const std::int64_t column = tap % s.kernel_w * s.dilation_w - s.padding_w;
        offset = from.offset(0, group * s.in_per_group() + i, row, column);
        y = j < p.columns ? static_cast<int>(row) : kOutside;
        x = static_cast<int>(column);
    }
};

// How many splits, each of at least `least` units, bring `tiles` blocks up to kBlocks for each
// multiprocessor, which are whole waves of one, two or four, and beyond only where there would else
// be but one split; and their size.
struct Splits {
    std::int64_t count, units;

    Splits(std::int64_t tiles, std::int64_t total, std::int64_t least, const Exec& exec) {
        const std::int64_t blocks = kBlocks * processors(exec);
        const bool few = 2 * tiles <= blocks;
        const std::int64_t wanted = few ? blocks / tiles : divide_up(blocks, tiles);
        units = divide_up(divide_up(total, wanted), least) * least;
        count = divide_up(total, units);
    }
};

inline std::int64_t gradient_tiles(const ConvShape& s, std::int64_t side) {
    return s.groups * divide_up(s.out_per_group(), side) *
           divide_up(s.in_per_group() * s.taps(), side);
}

// Of tiles of side x side results.
inline Splits weight_splits(const ConvShape& s, std::int64_t side, const Exec& exec) {
    return Splits(gradient_tiles(s, side), s.batch * s.out_height * s.out_width, 128, exec);
}

inline std::int64_t weights(const ConvShape& s) {
    return s.out_channels * s.in_per_group() * s.taps();
}

// Whether the tensor cores can serve: NHWC with a signal of whole pieces of channels, and pixels
// that 32 bits count.
inline bool gradient_pieces(const ConvShape& s, Dtype dtype) {
    return s.channels_last && dtype != Dtype::float64 && whole_pieces<true>(s, dtype) &&
           s.batch * s.out_height * s.out_width < std::numeric_limits<int>::max() &&
           s.in_height + 2 * s.padding_h < 1 << 28 && s.in_width + 2 * s.padding_w < 1 << 28;
}

inline GradientPlan gradient_plan(const ConvShape& s, const TapSteps& steps, Gate gate,
                                  std::int64_t side, const Exec& exec) {
    const Splits splits = weight_splits(s, side, exec);
    const std::int64_t rows = s.out_per_group(), columns = s.in_per_group() * s.taps();
    return {s,
            steps,
            rows,
            columns,
            splits.units,
            static_cast<int>(splits.count),
            static_cast<int>(divide_up(rows, side)),
            static_cast<int>(divide_up(columns, side)),
            (static_cast<int>(gate) & kRectify) != 0};
}

}  // namespace zfcuda
