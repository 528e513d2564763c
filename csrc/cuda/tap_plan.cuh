// The plan of a convolution as tap_gemm.cuh computes it: which taps hit which pixels, the sizes as
// 32-bit integers, and the weights in the order of its columns.
#pragma once

#include <limits>

#include "gate.cuh"

namespace zfcuda {

constexpr int kPackThreads = 256;

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
                    1,         1,           int(dilation), int(stride)};
    if (kTransposed) {
        const std::int64_t divisor = greatest_divisor(stride, dilation);
        axis.phases = static_cast<int>(stride < size ? stride : size);
        axis.tap_step = static_cast<int>(stride / divisor);
        axis.offset_step = -static_cast<int>(dilation / divisor);
        axis.pixel_step = 1;
    }
    return axis;
}

// A group with few result channels has a tile of its own.
inline bool narrow(std::int64_t columns, Dtype dtype) {
    return dtype != Dtype::float64 && columns <= 16;
}

inline std::int64_t padded_columns(std::int64_t columns, Dtype dtype) {
    return narrow(columns, dtype) ? 16 : (columns + 63) / 64 * 64;
}

// Whether source channels are whole pieces of 16 bytes, as the tensor cores take them.
template <bool kTransposed>
bool whole_pieces(const ConvShape& s, Dtype dtype) {
    const std::int64_t channels = kTransposed ? s.out_per_group() : s.in_per_group();
    return channels * element_bytes(dtype) % 16 == 0;
}

// Elements of a merged row with what its last piece is filled up with.
inline std::int64_t merged_row(const ConvShape& s, Dtype dtype) {
    const std::int64_t piece = 16 / element_bytes(dtype);
    return (s.kernel_w * s.in_channels + piece - 1) / piece * piece;
}

// Three times 32 maps have a tile of their own where rows are merged.
inline std::int64_t merged_columns(std::int64_t columns) {
    return columns % 96 == 0 ? columns : (columns + 63) / 64 * 64;
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

// Bytes of the part of an image that a block keeps in shared memory where rows are merged
// (patch_mma.cuh).
constexpr std::int64_t kPatchBytes = 40 * 1024;

// Whether eight pixels and all their taps fit there, twice for halves.
inline bool patch_fits(const ConvShape& s) {
    const std::int64_t rows = (s.kernel_h - 1) * s.dilation_h + 1;
    const std::int64_t columns = (7 * s.stride_w + s.kernel_w) * s.in_channels;
    return rows < kPatchBytes && columns < kPatchBytes &&
           rows * (columns + 12) * 4 + 128 <= kPatchBytes;
}

// Whether the rows of a filter can be merged. Where its columns stand side by side, a row of it
// meets a run of neighbours in an NHWC image: all its columns' channels. A convolution of the
// images' three colours has seven such runs of 21 values, which fill pieces better than channels.
template <bool kTransposed>
bool rows_merge(const ConvShape& s, Dtype dtype) {
    return !kTransposed && s.channels_last && !whole_pieces<kTransposed>(s, dtype) &&
           s.groups == 1 && s.dilation_w == 1 && !narrow(s.out_channels, dtype) &&
           (s.in_width + 2 * s.padding_w) * s.in_channels < 1 << 30 && patch_fits(s);
}

// Bytes of the packed weights.
template <bool kTransposed>
std::int64_t packed_weights(const ConvShape& s, Dtype dtype, Way way) {
    const std::int64_t channels = kTransposed ? s.out_per_group() : s.in_per_group();
    const std::int64_t columns = kTransposed ? s.in_per_group() : s.out_per_group();
    if (way != Way::fma && rows_merge<kTransposed>(s, dtype))
        return s.kernel_h * merged_row(s, dtype) * merged_columns(columns) * element_bytes(dtype);
    return s.groups * s.taps() * channels * padded_columns(columns, dtype) *
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
TapPlan tap_plan(const ConvShape& s, Dtype dtype, Way way, Gate gate) {
    TapPlan p = {};
    p.way = way;
    const Layout source = kTransposed ? s.maps() : s.image();
    p.steps = {source.step_image(), source.step_channel(), source.step_y(), source.step_x()};
    p.result = kTransposed ? s.image() : s.maps();
    p.y = tap_axis<kTransposed>(p.result.height, s.kernel_h, s.stride_h, s.padding_h, s.dilation_h);
    p.x = tap_axis<kTransposed>(p.result.width, s.kernel_w, s.stride_w, s.padding_w, s.dilation_w);
    p.batch = s.batch;
    p.groups = static_cast<int>(s.groups);
    p.height = static_cast<int>(source.height);
    p.width = static_cast<int>(source.width);
    p.channels = static_cast<int>(source.channels / s.groups);
    p.columns = static_cast<int>(p.result.channels / s.groups);
    p.padded_columns = static_cast<int>(padded_columns(p.columns, dtype));
    p.halo_fits = halo_fits(s);
    p.rectify = static_cast<int>(gate) & kRectify;
    if (way != Way::fma && rows_merge<kTransposed>(s, dtype)) {
        p.run = static_cast<int>(s.kernel_w * s.in_channels);
        p.pixel = p.channels;
        p.channels = static_cast<int>(merged_row(s, dtype));
        p.x.kernel = 1;
        p.padded_columns = static_cast<int>(merged_columns(s.out_channels));
    }
    if (s.taps() * (source.channels / s.groups) > std::numeric_limits<int>::max() - 64)
        throw std::runtime_error("zfcuda: a filter of a CUDA convolution has over 2^31 weights");
    return p;
}

// Column 4q + 2h + e of 16 stands in slot 8h + 2q + e for the tensor cores: of each eight results a
// thread of theirs has numbers 2q and 2q + 1, so of 16 slots it has four neighbouring columns.
ZF_HD std::int64_t mma_slot(std::int64_t column) {
    return (column & ~std::int64_t(15)) | (column & 2) << 2 | (column & 12) >> 1 | (column & 1);
}

// packed[group][tap][channel][column] from weights out,in/groups,kernel_h,kernel_w; for the tensor
// cores packed[group][tap][piece][slot of the column][channel of the piece], with pieces of 16
// bytes. The source channels are the weight's second dimension in a convolution and its first in
// the transposed one. A 32 x 32 tile goes through shared memory: lanes along the taps to read,
// along columns to write. FMA takes halves as floats, the tensor cores as they are.
template <typename T, typename Packed, bool kTransposed>
__global__ void pack_weights_kernel(TapPlan p, const T* weight, Packed* packed) {
    ZF_SHARED(Packed, tile, 32 * 33);
    const std::int64_t taps = std::int64_t(p.y.kernel) * p.x.kernel;
    // Rows of the tile: result columns. Its columns: what is contiguous in the weight.
    const std::int64_t batches = kTransposed ? p.channels : 1;
    const std::int64_t length = kTransposed ? taps : taps * p.channels;
    const std::int64_t row_stride = length, batch_stride = p.columns * length;
    const std::int64_t length_tiles = (length + 31) / 32,
                       column_tiles = (p.padded_columns + 31) / 32;
    std::int64_t block = blockIdx.x;
    const std::int64_t first = block % length_tiles * 32;
    block /= length_tiles;
    const std::int64_t first_column = block % column_tiles * 32;
    block /= column_tiles;
    const std::int64_t batch = block % batches, group = block / batches;
    const T* const from = weight + (group * batches + batch) * batch_stride;

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int i = warp; i < 32; i += kPackThreads / 32) {
        const bool inside = first_column + i < p.columns && first + lane < length;
        T value = {};
        if (inside) value = from[(first_column + i) * row_stride + first + lane];
        tile[i * 33 + lane] = static_cast<Packed>(value);
    }
    __syncthreads();
    for (int i = warp; i < 32; i += kPackThreads / 32) {
        if (first + i >= length || first_column + lane >= p.padded_columns) continue;
        const std::int64_t index = batch * length + first + i;
        const std::int64_t channel = index / taps, tap = index % taps;
        const std::int64_t row = (group * taps + tap) * p.channels + channel;
        const std::int64_t column = first_column + lane;
        Packed value = tile[lane * 33 + i];
        std::int64_t to = row * p.padded_columns + column;
        if (p.way != Way::fma) {
            constexpr int kPiece = Pack<Packed>::size;
            to = (row / kPiece * p.padded_columns + mma_slot(column)) * kPiece + row % kPiece;
            if constexpr (std::is_same_v<Packed, float>)
                if (p.way == Way::tf32) value = __uint_as_float(to_tf32(value));
        }
        packed[to] = value;
    }
}

// The same of merged rows: packed[row of taps][piece][slot of the column][element of the piece].
template <typename T>
__global__ void __launch_bounds__(kPackThreads)
    pack_merged_weights_kernel(TapPlan p, const T* weight, T* packed) {
    constexpr int kPiece = Pack<T>::size;
    const std::int64_t index = std::int64_t(blockIdx.x) * kPackThreads + threadIdx.x;
    const std::int64_t line = index / p.padded_columns, column = index % p.padded_columns;
    const std::int64_t row = line / p.channels, at = line % p.channels;
    if (row >= p.y.kernel) return;
    T value = {};
    if (at < p.run && column < p.columns)
        value = weight[((column * p.pixel + at % p.pixel) * p.y.kernel + row) * (p.run / p.pixel) +
                       at / p.pixel];
    if constexpr (std::is_same_v<T, float>)
        if (p.way == Way::tf32) value = __uint_as_float(to_tf32(value));
    packed[(line / kPiece * p.padded_columns + mma_slot(column)) * kPiece + line % kPiece] = value;
}

template <typename T, typename Packed, bool kTransposed>
void launch_pack_weights(const TapPlan& p, Address weight, Address packed, const Exec& exec) {
    const std::int64_t taps = std::int64_t(p.y.kernel) * p.x.kernel;
    const std::int64_t tiles =
        kTransposed ? (taps + 31) / 32 * p.channels : (taps * p.channels + 31) / 32;
    const std::int64_t blocks = tiles * ((p.padded_columns + 31) / 32) * p.groups;
    if (blocks == 0) return;
    launch(pack_weights_kernel<T, Packed, kTransposed>, dim3(static_cast<unsigned>(blocks)),
           dim3(kPackThreads), 0, exec, p, weight.as<const T>(), packed.as<Packed>());
}

template <typename T>
void launch_pack_merged_weights(const TapPlan& p, Address weight, Address packed,
                                const Exec& exec) {
    const std::int64_t values = std::int64_t(p.y.kernel) * p.channels * p.padded_columns;
    launch(pack_merged_weights_kernel<T>,
           dim3(static_cast<unsigned>((values + kPackThreads - 1) / kPackThreads)),
           dim3(kPackThreads), 0, exec, p, weight.as<const T>(), packed.as<T>());
}

template <bool kTransposed>
void pack_weights(const ConvShape& s, Dtype dtype, Way way, Address weight, Address packed,
                  const Exec& exec) {
    const TapPlan p = tap_plan<kTransposed>(s, dtype, way, Gate::none);
    with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        if (way == Way::fma)
            return launch_pack_weights<T, Sum<T>, kTransposed>(p, weight, packed, exec);
        if constexpr (!kTransposed && sizeof(T) <= 4)
            if (p.run != 0) return launch_pack_merged_weights<T>(p, weight, packed, exec);
        if constexpr (sizeof(T) <= 4)
            launch_pack_weights<T, T, kTransposed>(p, weight, packed, exec);
    });
}

// How the tensor cores of an architecture multiply a dtype; by FMA where they do not.
inline Way mma_way(Dtype dtype, Precision precision, int architecture) {
    if (dtype == Dtype::float64 || architecture < (dtype == Dtype::float16 ? 75 : 80))
        return Way::fma;
    if (dtype != Dtype::float32) return Way::halves;
    switch (precision) {
        case Precision::tf32:
            return Way::tf32;
        case Precision::tf32x3:
            return Way::tf32x3;
        default:
            return Way::fma;
    }
}

// Whether the tensor cores serve a product, and how: NHWC with whole pieces of channels or merged
// rows, on an architecture that has them for the dtype. The transposed one runs by halos alone.
// `addresses` are those of the source and its mask.
template <bool kTransposed, typename... Addresses>
Way tap_way(const ConvShape& s, Dtype dtype, const Exec& exec, Addresses... addresses) {
    const bool pieces = whole_pieces<kTransposed>(s, dtype) ? !kTransposed || halo_fits(s)
                                                            : rows_merge<kTransposed>(s, dtype);
    if (!s.channels_last || !aligned(addresses...) || !pieces) return Way::fma;
    return mma_way(dtype, exec.precision,
                   architecture(&pack_weights_kernel<float, float, kTransposed>, exec));
}

}  // namespace zfcuda
