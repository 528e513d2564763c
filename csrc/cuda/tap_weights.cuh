// The weights of a product of taps: in the order of its columns, for the way in which it runs.
#pragma once

#include "tap_plan.cuh"

namespace zfcuda {

constexpr int kPackThreads = 256;

// Column 4q + 2h + e of 16 stands in slot 8h + 2q + e for the tensor cores: of each eight results a
// thread of theirs has numbers 2q and 2q + 1, so of 16 slots it has four neighbouring columns.
ZF_HD std::int64_t mma_slot(std::int64_t column) {
    return (column & ~std::int64_t(15)) | (column & 2) << 2 | (column & 12) >> 1 | (column & 1);
}

// Where the weight of a product k and a column stands: packed[k][column], but for the tensor cores
// packed[piece of k][slot of the column][k in the piece], with pieces of 16 bytes.
template <typename Packed>
__device__ std::int64_t packed_place(const TapPlan& p, std::int64_t k, std::int64_t column) {
    constexpr int kPiece = Pack<Packed>::size;
    if (p.way == Way::fma) return k * p.padded_columns + column;
    return (k / kPiece * p.padded_columns + mma_slot(column)) * kPiece + k % kPiece;
}

template <typename Packed>
__device__ void store_packed(const TapPlan& p, Packed* packed, std::int64_t k, std::int64_t column,
                             Packed value) {
    if constexpr (std::is_same_v<Packed, float>)
        if (p.way == Way::tf32) value = __uint_as_float(to_tf32(value));
    packed[packed_place<Packed>(p, k, column)] = value;
}

// k = (group, tap, channel), from weights out,in/groups,kernel_h,kernel_w. The source channels are
// the weight's second dimension in a convolution and its first in the transposed one. A 32 x 32
// tile goes through shared memory: lanes along the taps to read, along columns to write. FMA takes
// halves as floats, the tensor cores as they are.
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
        store_packed(p, packed, (group * taps + tap) * p.channels + channel, first_column + lane,
                     tile[lane * 33 + i]);
    }
}

// k = (row of taps, element of the run), where rows are merged; the last chunk is filled up.
template <typename T>
struct MergedWeights {
    const T* weight;

    __device__ T at(const TapPlan& p, std::int64_t k, std::int64_t column) const {
        const std::int64_t row = k / p.channels, element = k % p.channels;
        if (row >= p.y.kernel || element >= p.run) return {};
        return weight[((column * p.pixel + element % p.pixel) * p.y.kernel + row) *
                          (p.run / p.pixel) +
                      element / p.pixel];
    }
};

// k = (tap, channel), where columns are (phase, result channel). -0 where a phase lacks a tap, as
// which no other weight is packed.
template <typename T>
struct StackedWeights {
    const T* weight;
    int kernel_h, kernel_w, padding_h, padding_w;

    StackedWeights(const ConvShape& given, const T* weights)
        : weight(weights),
          kernel_h(static_cast<int>(given.kernel_h)),
          kernel_w(static_cast<int>(given.kernel_w)),
          padding_h(static_cast<int>(given.padding_h)),
          padding_w(static_cast<int>(given.padding_w)) {}

    __device__ T at(const TapPlan& p, std::int64_t k, std::int64_t column) const {
        const int channels = static_cast<int>(p.result.channels);
        const int phase = static_cast<int>(column) / channels;
        const int channel = static_cast<int>(column) % channels;
        const int tap = static_cast<int>(k / p.channels);
        const int y =
            phase / p.x.stacked + padding_h + p.y.stacked * (tap / p.x.kernel - p.y.padding);
        const int x =
            phase % p.x.stacked + padding_w + p.x.stacked * (tap % p.x.kernel - p.x.padding);
        if (static_cast<unsigned>(y) >= static_cast<unsigned>(kernel_h) ||
            static_cast<unsigned>(x) >= static_cast<unsigned>(kernel_w))
            return T(Sum<T>(-0.0));
        const T value =
            weight[((k % p.channels * channels + channel) * kernel_h + y) * kernel_w + x];
        return Sum<T>(value) == Sum<T>(0) ? T(Sum<T>(0)) : value;
    }
};

// The weights of few columns, which have an order of their own: a thread each, `products` of k.
template <typename Packed, typename Weights>
__global__ void __launch_bounds__(kPackThreads)
    pack_few_weights_kernel(TapPlan p, std::int64_t products, Weights weights, Packed* packed) {
    const std::int64_t index = std::int64_t(blockIdx.x) * kPackThreads + threadIdx.x;
    const std::int64_t k = index / p.padded_columns, column = index % p.padded_columns;
    if (k >= products) return;
    Packed value = {};
    if (column < p.columns) value = static_cast<Packed>(weights.at(p, k, column));
    store_packed(p, packed, k, column, value);
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

template <typename Packed, typename Weights>
void launch_pack_few_weights(const TapPlan& p, const Weights& weights, Address packed,
                             const Exec& exec) {
    constexpr int kChunk = 64 / sizeof(Packed);
    const std::int64_t all = std::int64_t(p.y.kernel) * p.x.kernel * p.channels;
    const std::int64_t products = p.run != 0 ? (all + kChunk - 1) / kChunk * kChunk : all;
    const std::int64_t values = products * p.padded_columns;
    if (values == 0) return;
    launch(pack_few_weights_kernel<Packed, Weights>,
           dim3(static_cast<unsigned>((values + kPackThreads - 1) / kPackThreads)),
           dim3(kPackThreads), 0, exec, p, products, weights, packed.as<Packed>());
}

template <typename T, typename Packed, bool kTransposed>
void pack_weights_as(const TapPlan& p, const ConvShape& s, Address weight, Address packed,
                     const Exec& exec) {
    const T* const given = weight.as<const T>();
    if constexpr (kTransposed) {
        if (p.stacked())
            return launch_pack_few_weights<Packed>(p, StackedWeights<T>(s, given), packed, exec);
    } else if constexpr (sizeof(T) <= 4 && std::is_same_v<T, Packed>) {
        if (p.run != 0)
            return launch_pack_few_weights<Packed>(p, MergedWeights<T>{given}, packed, exec);
    }
    launch_pack_weights<T, Packed, kTransposed>(p, weight, packed, exec);
}

template <bool kTransposed>
void pack_weights(const ConvShape& s, Dtype dtype, Way way, Address weight, Address packed,
                  const Exec& exec) {
    const TapPlan p = tap_plan<kTransposed>(s, dtype, way, Gate::none);
    with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        if (way == Way::fma)
            pack_weights_as<T, Sum<T>, kTransposed>(p, s, weight, packed, exec);
        else
            pack_weights_as<T, T, kTransposed>(p, s, weight, packed, exec);
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
    const bool pieces = whole_pieces<kTransposed>(s, dtype)
                            ? !kTransposed || halo_fits(product_shape<kTransposed>(s, dtype))
                            : rows_merge<kTransposed>(s, dtype, Way::tf32);
    if (!s.channels_last || !aligned(addresses...) || !pieces) return Way::fma;
    return mma_way(dtype, exec.precision,
                   architecture(&pack_weights_kernel<float, float, kTransposed>, exec));
}

}  // namespace zfcuda
