// The plan of a convolution as tap_gemm.cuh computes it: which taps hit which pixels, and the sizes
// as 32-bit integers.
#pragma once

#include <limits>

#include "columns.cuh"
#include "gate.cuh"

namespace zfcuda {

// How the product runs: by FMA (tap_gemm.cuh), or on the tensor cores (tap_mma.cuh) from factors of
// this kind.
enum class Way { fma, tf32, tf32x3, halves };

// One dimension of the plan: `size` pixels of the result, in `phases` phases.
struct TapAxis {
    int size, kernel, stride, padding, dilation;
    int phases;       // 1 for a convolution
    int tap_step;     // distance between the taps of a phase
    int offset_step;  // distance between their positions in the source
    int pixel_step;   // distance in the source between neighbouring pixels of a phase
    int stacked;      // phases among the columns (columns.cuh), or 1
};

// The taps of one phase: kernel position first + t * tap_step, t < count, reads the source at
// q * pixel_step + offset + t * offset_step.
struct PhaseTaps {
    int count, first, offset, pixels;
};

template <bool kTransposed>
__device__ PhaseTaps phase_taps(const TapAxis& axis, int phase) {
    if (!kTransposed) return {axis.kernel, 0, -axis.padding, axis.size};
    int first = 0;
    while (first < axis.kernel && (phase + axis.padding - first * axis.dilation) % axis.stride)
        ++first;
    const int count = (axis.kernel - first + axis.tap_step - 1) / axis.tap_step;
    const int pixels = (axis.size - phase + axis.stride - 1) / axis.stride;
    return {count, first, (phase + axis.padding - first * axis.dilation) / axis.stride, pixels};
}

// Where an element of the source lies: image * n + channel * c + row * y + column * x.
struct TapSteps {
    std::int64_t image, channel, row, column;

    ZF_HD std::int64_t offset(std::int64_t n, std::int64_t c, std::int64_t y,
                              std::int64_t x) const {
        return image * n + channel * c + row * y + column * x;
    }
};

struct TapPlan {
    int height, width;  // of the source
    TapSteps steps;
    Layout result;
    TapAxis y, x;
    std::int64_t batch;
    int groups, channels, columns;  // of the source and of the result, in a group
    int padded_columns;
    int run, pixel;     // elements of a kernel row and of a pixel of the source, if rows_merge
    int strips, strip;  // the pixels of a row go by so many strips of this width, or whole: 0
    int block_pixels;   // of one block, or as many as its tile has rows: 0
    bool by_channels;   // splits of k are of channels, with all their taps (halo_mma.cuh)
    int row_tiles, column_tiles;
    std::int64_t split_size;  // results, where k is in splits (tap_split.cuh); else 0
    Way way;
    bool halo_fits;
    bool rectify;  // the source of the transposed convolution, the result of the other
    bool quads;    // four results that are neighbours in memory are stored at once
    bool thirds;   // its tiles have 96 columns

    ZF_HD bool stacked() const { return y.stacked * x.stacked > 1; }
};

inline std::int64_t greatest_divisor(std::int64_t a, std::int64_t b) {
    while (b != 0) {
        const std::int64_t rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

// What differs between the two convolutions on the host.
template <bool kTransposed>
TapAxis tap_axis(std::int64_t size, std::int64_t kernel, std::int64_t stride, std::int64_t padding,
                 std::int64_t dilation) {
    constexpr std::int64_t kLimit = 1 << 28;
    if (size > kLimit || kernel * dilation > kLimit || padding > kLimit || stride > kLimit)
        throw std::runtime_error("zfcuda: a side of a CUDA convolution is over 2^28 pixels");
    TapAxis axis = {int(size), int(kernel), int(stride),   int(padding), int(dilation),
                    1,         1,           int(dilation), int(stride),  1};
    if (kTransposed) {
        const std::int64_t divisor = greatest_divisor(stride, dilation);
        axis.phases = static_cast<int>(stride < size ? stride : size);
        axis.tap_step = static_cast<int>(stride / divisor);
        axis.offset_step = -static_cast<int>(dilation / divisor);
        axis.pixel_step = 1;
    }
    return axis;
}

// Whether source channels are whole pieces of 16 bytes, as the tensor cores take them.
template <bool kTransposed>
bool whole_pieces(const ConvShape& s, Dtype dtype) {
    const std::int64_t channels = kTransposed ? s.out_per_group() : s.in_per_group();
    return channels * element_bytes(dtype) % 16 == 0;
}

// Elements of a merged row: whole words, for a lane loads no less. The rows follow each other.
inline std::int64_t merged_row(const ConvShape& s, Dtype dtype) {
    const std::int64_t word = 4 / element_bytes(dtype);
    return (s.kernel_w * s.in_channels + word - 1) / word * word;
}

// Chunks of all rows, of 64 bytes, the last one filled up.
inline std::int64_t merged_chunks(const ConvShape& s, Dtype dtype) {
    return (s.kernel_h * merged_row(s, dtype) * element_bytes(dtype) + 63) / 64;
}

// Whether a product's columns go by three times 32, as the 96 maps of ZFNet's first layer do: where
// rows are merged; and on the tensor cores on the way down, where they would leave a part of 128
// empty.
template <bool kTransposed>
bool goes_by_thirds(std::int64_t columns, Way way, bool merged) {
    return columns % 96 == 0 && (merged || (kTransposed && way != Way::fma && columns % 128 != 0));
}

// The columns of its packed weights, as many as its tiles have.
template <bool kTransposed>
std::int64_t tile_columns(std::int64_t columns, Dtype dtype, Way way, bool merged) {
    return goes_by_thirds<kTransposed>(columns, way, merged) ? columns
                                                             : padded_columns(columns, dtype);
}

// Slots of a halo: two halos with the weights of a block leave room for two blocks on an SM with
// 164 KiB of shared memory, one on those with 100. 2 modulo 8: pieces lie this far apart, and eight
// lanes that write four pieces of two neighbours meet no bank twice.
constexpr int kHaloSlots = 386;

// Positions from a filter's first tap to its last, in one plane or phase of the stride.
inline std::int64_t halo_span(std::int64_t kernel, std::int64_t stride, std::int64_t dilation) {
    const std::int64_t divisor = greatest_divisor(stride, dilation), step = stride / divisor;
    return ((kernel + step - 1) / step - 1) * (dilation / divisor);
}

// Whether there are blocks whose halo has so few slots, whatever the sizes of the images.
inline bool halo_fits(const ConvShape& s) {
    const std::int64_t y = halo_span(s.kernel_h, s.stride_h, s.dilation_h);
    const std::int64_t x = halo_span(s.kernel_w, s.stride_w, s.dilation_w);
    return y < kHaloSlots && x < kHaloSlots && (y + 1) * (x + 8) <= kHaloSlots;
}

// Elements of a run by FMA, at most: patch_fma.cuh keeps the weights of two runs, at least.
constexpr std::int64_t kMostRun = 48;

// Bytes of the part of an image that a block keeps in shared memory where rows are merged, and of
// the table of where their words are in it (patch_mma.cuh).
constexpr std::int64_t patch_bytes(Way way) { return way == Way::fma ? 28 * 1024 : 40 * 1024; }

// Whether eight pixels and all their taps fit there, twice for halves, with a table of floats.
inline bool patch_fits(const ConvShape& s, Way way) {
    const std::int64_t most = patch_bytes(way);
    const std::int64_t rows = (s.kernel_h - 1) * s.dilation_h + 1;
    const std::int64_t columns = (7 * s.stride_w + s.kernel_w) * s.in_channels;
    const std::int64_t words = s.kernel_h * s.kernel_w * s.in_channels;
    return rows < most && columns < most && words < most &&
           rows * (columns + 12) * 4 + words * 8 + 256 <= most;
}

// Whether the rows of a filter can be merged. Where its columns stand side by side, a row of it
// meets a run of neighbours in an NHWC image: all its columns' channels. A convolution of the
// images' three colours has seven such runs of 21 values, which fill pieces better than channels.
// By FMA in float32 alone: halves, which it takes as floats, cannot be copied as they are.
template <bool kTransposed>
bool rows_merge(const ConvShape& s, Dtype dtype, Way way) {
    if (way == Way::fma && (dtype != Dtype::float32 || s.kernel_w * s.in_channels > kMostRun))
        return false;
    return !kTransposed && s.channels_last && dtype != Dtype::float64 &&
           !whole_pieces<kTransposed>(s, dtype) && s.groups == 1 && s.dilation_w == 1 &&
           !narrow(s.out_channels, dtype) &&
           (s.in_width + 2 * s.padding_w) * s.in_channels < 1 << 30 && patch_fits(s, way);
}

// Bytes of the packed weights.
template <bool kTransposed>
std::int64_t packed_weights(const ConvShape& given, Dtype dtype, Way way) {
    const ConvShape s = product_shape<kTransposed>(given, dtype);
    const std::int64_t channels = kTransposed ? s.out_per_group() : s.in_per_group();
    const std::int64_t columns = kTransposed ? s.in_per_group() : s.out_per_group();
    const bool merged = rows_merge<kTransposed>(s, dtype, way);
    const std::int64_t padded = tile_columns<kTransposed>(columns, dtype, way, merged);
    if (merged) return 64 * merged_chunks(s, dtype) * padded;
    return s.groups * s.taps() * channels * padded *
           (way == Way::fma ? sum_bytes(dtype) : element_bytes(dtype));
}

// The same whichever way the product will run: by FMA, or on the tensor cores with merged rows.
template <bool kTransposed>
std::int64_t packed_weights(const ConvShape& s, Dtype dtype) {
    const std::int64_t by_fma = packed_weights<kTransposed>(s, dtype, Way::fma);
    const std::int64_t others = packed_weights<kTransposed>(s, dtype, Way::tf32);
    return by_fma > others ? by_fma : others;
}

template <bool kTransposed>
TapPlan tap_plan(const ConvShape& given, Dtype dtype, Way way, Gate gate) {
    const ConvShape s = product_shape<kTransposed>(given, dtype);
    TapPlan p = {};
    p.way = way;
    const Layout source = kTransposed ? s.maps() : s.image();
    const Layout result = kTransposed ? s.image() : s.maps();
    p.steps = {source.step_image(), source.step_channel(), source.step_y(), source.step_x()};
    p.result = kTransposed ? given.image() : result;
    p.y = tap_axis<kTransposed>(result.height, s.kernel_h, s.stride_h, s.padding_h, s.dilation_h);
    p.x = tap_axis<kTransposed>(result.width, s.kernel_w, s.stride_w, s.padding_w, s.dilation_w);
    p.y.stacked = static_cast<int>(given.stride_h / s.stride_h);
    p.x.stacked = static_cast<int>(given.stride_w / s.stride_w);
    p.batch = s.batch;
    p.groups = static_cast<int>(s.groups);
    p.height = static_cast<int>(source.height);
    p.width = static_cast<int>(source.width);
    p.channels = static_cast<int>(source.channels / s.groups);
    p.columns = static_cast<int>(result.channels / s.groups);
    const bool merged = rows_merge<kTransposed>(s, dtype, way);
    p.padded_columns = static_cast<int>(tile_columns<kTransposed>(p.columns, dtype, way, merged));
    p.thirds = goes_by_thirds<kTransposed>(p.padded_columns, way, merged);
    p.halo_fits = halo_fits(s);
    p.rectify = static_cast<int>(gate) & kRectify;
    if (merged) {
        p.run = static_cast<int>(s.kernel_w * s.in_channels);
        p.pixel = p.channels;
        p.channels = static_cast<int>(merged_row(s, dtype));
        p.x.kernel = 1;
    }
    if (s.taps() * (source.channels / s.groups) > std::numeric_limits<int>::max() - 64)
        throw std::runtime_error("zfcuda: a filter of a CUDA convolution has over 2^31 weights");
    return p;
}

}  // namespace zfcuda
