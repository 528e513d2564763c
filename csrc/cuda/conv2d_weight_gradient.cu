// The gradient of both convolutions with respect to weights and bias.
//
//   grad_weight[o,i,ky,kx] = sum over n,y,x of gate(signal)[n,o,y,x] *
//                            image[n,i, y*stride - padding + ky*dilation, ...]
//   grad_bias[o]           = sum over n,y,x of gate(signal)[n,o,y,x]
//
//                         columns j = (i, tap) in NCHW, (tap, i) in NHWC
//                        +-----------+
//   k = pixels (n,y,x)   | image     |
//   of one split         | under tap |
//   +--------------------+-----------+
//   | signal             | gradient  |   rows o; 64 x 64 results a block, 4 x 4 a thread
//   +--------------------+-----------+
//
// Work: 2 * batch * out pixels * weights operations. The sum is as long as the batch has pixels
// while the result is small, so blocks share the pixels too: each split writes its own
// partial gradient into the workspace, and a second pass adds the splits in order (deterministic).
// The number of splits depends on the shape alone. Lanes run along pixels in NCHW and along
// channels in NHWC (by four where they are a multiple of four): neighbours in memory either way.
// The gate acts while the signal is loaded. Where the signal is pooled, the maps are gathered in
// its place (unpooled_source.cuh), and never in memory. Static: at most 128 registers a thread in
// float32, 17 KiB of shared memory; FFMA are 33 % of the main loop in NCHW, 25 % in NHWC and 53 %
// by four channels (sm_90): addresses cost most here. Measured: not yet, for want of a GPU; `make
// bench` on one fills this line.
#include <limits>

#include "tap_product.cuh"
#include "unpooled_source.cuh"

namespace zfcuda {
namespace {

constexpr int kSide = 64;              // of the tile of results
constexpr std::int64_t kBlocks = 528;  // to be reached with splits: four for each SM of an H100

struct GradientPlan {
    ConvShape s;
    TapSteps steps;             // of the signal
    std::int64_t split_pixels;  // a multiple of the tile's depth
    int splits, row_tiles, column_tiles;
    bool rectify;
};

// What a column (i, ky, kx) adds to a pixel's position in the image.
struct alignas(16) Column {
    std::int64_t offset;
    int y, x;
};

template <bool kChannelsLast>
ZF_HD void split_column(const ConvShape& s, std::int64_t j, std::int64_t& i, std::int64_t& tap) {
    i = kChannelsLast ? j % s.in_per_group() : j / s.taps();
    tap = kChannelsLast ? j / s.in_per_group() : j % s.taps();
}

template <typename T, bool kChannelsLast, int kVector, typename Source>
__global__ void __launch_bounds__(kTileThreads, kResidentBlocks<Sum<T>>)
    weight_gradient_kernel(GradientPlan p, const T* image, Source source, Sum<T>* partial) {
    using V = Sum<T>;
    using Product = Tile<V, kSide, kSide>;
    constexpr int kDepth = Product::kDepth, kPack = Pack<V>::size;
    ZF_SHARED(Pack<V>, left_tiles, 2 * kDepth * kSide / kPack);
    ZF_SHARED(Pack<V>, right_tiles, 2 * kDepth * kSide / kPack);
    ZF_SHARED(Column, columns, kSide);
    V* const left = reinterpret_cast<V*>(left_tiles);
    V* const right = reinterpret_cast<V*>(right_tiles);
    const ConvShape& s = p.s;
    Layout from = s.image();
    TapSteps steps = p.steps;
    from.channels_last = kChannelsLast;  // known to the compiler
    if (kChannelsLast) steps.channel = 1;
    const int thread = threadIdx.x;
    const std::int64_t row_count = s.out_per_group(), column_count = s.in_per_group() * s.taps();

    unsigned block = blockIdx.x;
    const std::int64_t first_column = std::int64_t(block % p.column_tiles) * kSide;
    block /= p.column_tiles;
    const std::int64_t first_row = std::int64_t(block % p.row_tiles) * kSide;
    block /= p.row_tiles;
    const std::int64_t split = block % p.splits, group = block / p.splits;

    if (thread < kSide) {
        std::int64_t i, tap;
        split_column<kChannelsLast>(s, first_column + thread, i, tap);
        const std::int64_t y = tap / s.kernel_w * s.dilation_h - s.padding_h;
        const std::int64_t x = tap % s.kernel_w * s.dilation_w - s.padding_w;
        columns[thread] = {from.offset(0, group * s.in_per_group() + i, y, x),
                           first_column + thread < column_count ? int(y) : kOutside, int(x)};
    }
    __syncthreads();

    // A thread brings kLoads packs of each tile: NCHW at one pixel (lanes along pixels), NHWC at
    // one column (lanes along columns).
    constexpr int kLanes = kChannelsLast ? kSide / kVector : kDepth;
    constexpr int kStep = kTileThreads / kLanes;
    constexpr int kLoads = kSide * kDepth / (kTileThreads * kVector);
    const int load_k = kChannelsLast ? thread / kLanes : thread % kLanes;
    const int load_column = kChannelsLast ? thread % kLanes * kVector : thread / kLanes;
    const int width = static_cast<int>(s.out_width), height = static_cast<int>(s.out_height);
    const Odometer depth(kDepth, width, height), step(kStep, width, height);
    Odometer pixel(split * p.split_pixels + load_k, width, height);

    using Left = Vector<typename Source::Value, kVector>;
    Left staged_left[kLoads];
    Vector<T, kVector> staged_right[kLoads];
    auto fetch_left = [&](const Odometer& at, int column) -> Left {
        const std::int64_t row = first_row + column;
        if (at.high >= s.batch || row >= row_count) return {};
        return source.template load<kVector>(
            steps.offset(at.high, group * row_count + row, at.middle, at.low), at.middle, at.low);
    };
    auto fetch_right = [&](const Odometer& at, int column) -> Vector<T, kVector> {
        const Column tap = columns[column];
        const std::int64_t y = at.middle * s.stride_h, x = at.low * s.stride_w;
        const bool inside = at.high < s.batch && y + tap.y >= 0 && y + tap.y < from.height &&
                            x + tap.x >= 0 && x + tap.x < from.width;
        if (!inside) return {};
        return load_vector<T, kVector>(image + from.offset(at.high, 0, y, x) + tap.offset);
    };
    auto fetch = [&]() {
        Odometer at = pixel;
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            const int column = kChannelsLast ? load_column : load_column + i * kStep;
            staged_left[i] = fetch_left(at, column);
            staged_right[i] = fetch_right(at, column);
            if (kChannelsLast) at.advance(step, width, height);
        }
        pixel.advance(depth, width, height);
    };
    auto stash = [&](int buffer) {
#pragma unroll
        for (int i = 0; i < kLoads; ++i)
#pragma unroll
            for (int j = 0; j < kVector; ++j) {
                const int k = kChannelsLast ? load_k + i * kStep : load_k;
                const int column = kChannelsLast ? load_column + j : load_column + i * kStep;
                const int slot = buffer * kDepth * kSide + tile_slot<kSide>(k, column);
                const auto value = static_cast<V>(staged_left[i].value[j]);
                left[slot] = p.rectify ? rectify(value) : value;
                right[slot] = static_cast<V>(staged_right[i].value[j]);
            }
    };

    typename Product::Accumulator sum = {};
    const auto first = Product::first();
    const std::int64_t pixels = s.batch * s.out_height * s.out_width;
    const std::int64_t rest = pixels - split * p.split_pixels;
    const std::int64_t chunks =
        ((rest < p.split_pixels ? rest : p.split_pixels) + kDepth - 1) / kDepth;
    fetch();
    stash(0);
    __syncthreads();
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
        const bool more = chunk + 1 < chunks;
        const int buffer = chunk % 2 * kDepth * kSide;
        if (more) fetch();
        Product::multiply(first, left + buffer, right + buffer, sum);
        if (more) stash(1 - chunk % 2);
        __syncthreads();
    }

    V* const to = partial + split * (s.out_channels * column_count);
#pragma unroll
    for (int i = 0; i < Product::kRows; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const std::int64_t row = first_row + Product::row(i);
            const std::int64_t column = first_column + Product::column() + j;
            if (row >= row_count || column >= column_count) continue;
            std::int64_t channel, tap;
            split_column<kChannelsLast>(s, column, channel, tap);
            to[(group * row_count + row) * column_count + channel * s.taps() + tap] = sum[i][j];
        }
}

// partial[split][o]: a block sums one split of one channel over the images of NCHW, or of 32
// channels over the pixels of NHWC, and then its threads as a tree.
template <typename T, bool kChannelsLast>
__global__ void bias_gradient_kernel(ConvShape s, bool rectified, std::int64_t split_units,
                                     int splits, const T* signal, const T* forward,
                                     Sum<T>* partial) {
    using V = Sum<T>;
    constexpr int kChannels = kChannelsLast ? 32 : 1, kRanks = kTileThreads / kChannels;
    ZF_SHARED(V, sums, kTileThreads);
    const int thread = threadIdx.x;
    const std::int64_t split = blockIdx.x % splits;
    const std::int64_t channel = blockIdx.x / splits * kChannels + thread % kChannels;
    const std::int64_t plane = s.out_height * s.out_width;
    const std::int64_t units = kChannelsLast ? s.batch * plane : s.batch;
    const std::int64_t first = split * split_units;
    const std::int64_t last = first + split_units < units ? first + split_units : units;

    V sum = V(0);
    auto add = [&](std::int64_t offset) {
        const V value = load_gated<T, 1>(signal, forward, offset).value[0];
        sum += rectified ? rectify(value) : value;
    };
    if (channel < s.out_channels) {
        if (kChannelsLast) {
            for (std::int64_t pixel = first + thread / kChannels; pixel < last; pixel += kRanks)
                add(pixel * s.out_channels + channel);
        } else {
            for (std::int64_t n = first; n < last; ++n)
                for (std::int64_t pixel = thread; pixel < plane; pixel += kRanks)
                    add((n * s.out_channels + channel) * plane + pixel);
        }
    }
    sums[thread] = sum;
    for (int half = kTileThreads / 2; half >= kChannels; half /= 2) {
        __syncthreads();
        if (thread < half) sums[thread] += sums[thread + half];
    }
    if (thread < kChannels && channel < s.out_channels)
        partial[split * s.out_channels + channel] = sums[thread];
}

// The second pass: result[i] = sum of partial[split][i] in the order of the splits, rounded.
template <typename T>
__global__ void sum_splits_kernel(const Sum<T>* partial, std::int64_t count, int splits,
                                  T* result) {
    const std::int64_t i = std::int64_t(blockIdx.x) * kTileThreads + threadIdx.x;
    if (i >= count) return;
    Sum<T> sum = partial[i];
    for (int split = 1; split < splits; ++split) sum += partial[split * count + i];
    result[i] = static_cast<T>(sum);
}

std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

dim3 grid(std::int64_t blocks) {
    if (blocks > std::numeric_limits<int>::max())
        throw std::runtime_error("zfcuda: a CUDA weight gradient needs over 2^31 blocks");
    return dim3(static_cast<unsigned>(blocks));
}

// How many splits, each of at least `least` units, bring `tiles` blocks to kBlocks; and their size.
struct Splits {
    std::int64_t count, units;

    Splits(std::int64_t tiles, std::int64_t total, std::int64_t least) {
        const std::int64_t wanted = divide_up(kBlocks, tiles);
        units = divide_up(divide_up(total, wanted), least) * least;
        count = divide_up(total, units);
    }
};

Splits weight_splits(const ConvShape& s) {
    const std::int64_t tiles = s.groups * divide_up(s.out_per_group(), kSide) *
                               divide_up(s.in_per_group() * s.taps(), kSide);
    return Splits(tiles, s.batch * s.out_height * s.out_width, 128);
}

Splits bias_splits(const ConvShape& s) {
    if (s.channels_last)
        return Splits(divide_up(s.out_channels, 32), s.batch * s.out_height * s.out_width, 64);
    return Splits(s.out_channels, s.batch, 1);
}

std::int64_t weights(const ConvShape& s) { return s.out_channels * s.in_per_group() * s.taps(); }

// One split needs no second pass: it writes the result itself, where that is made of sums.
std::int64_t weight_partials(const ConvShape& s, Dtype dtype) {
    const std::int64_t splits = weight_splits(s).count;
    return splits > 1 || element_bytes(dtype) < sum_bytes(dtype) ? splits * weights(s) : 0;
}

template <typename T>
void sum_splits(const Sum<T>* partial, std::int64_t count, std::int64_t splits, T* result,
                const Exec& exec) {
    launch(sum_splits_kernel<T>, grid(divide_up(count, kTileThreads)), dim3(kTileThreads), 0, exec,
           partial, count, static_cast<int>(splits), result);
}

template <typename T, bool kChannelsLast, int kVector, typename Source>
void weight_gradient(const ConvShape& s, const TapSteps& steps, Gate gate, Address image,
                     const Source& source, Address grad_weight, Address workspace,
                     const Exec& exec) {
    const Splits splits = weight_splits(s);
    const bool rectified = (static_cast<int>(gate) & kRectify) != 0;
    GradientPlan p = {s, steps, splits.units, static_cast<int>(splits.count), 0, 0, rectified};
    p.row_tiles = static_cast<int>(divide_up(s.out_per_group(), kSide));
    p.column_tiles = static_cast<int>(divide_up(s.in_per_group() * s.taps(), kSide));
    const bool direct = splits.count == 1 && std::is_same_v<T, Sum<T>>;
    auto* const partial = (direct ? grad_weight : workspace).template as<Sum<T>>();
    launch(weight_gradient_kernel<T, kChannelsLast, kVector, Source>,
           grid(splits.count * s.groups * p.row_tiles * p.column_tiles), dim3(kTileThreads), 0,
           exec, p, image.as<const T>(), source, partial);
    if (!direct) sum_splits<T>(partial, weights(s), splits.count, grad_weight.as<T>(), exec);
}

template <typename T, bool kChannelsLast>
void bias_gradient(const ConvShape& s, bool rectified, Address signal, Address forward,
                   Address grad_bias, Sum<T>* partial, const Exec& exec) {
    const Splits splits = bias_splits(s);
    const std::int64_t tiles = kChannelsLast ? divide_up(s.out_channels, 32) : s.out_channels;
    launch(bias_gradient_kernel<T, kChannelsLast>, grid(splits.count * tiles), dim3(kTileThreads),
           0, exec, s, rectified, splits.units, static_cast<int>(splits.count),
           signal.as<const T>(), forward.as<const T>(), partial);
    sum_splits<T>(partial, s.out_channels, splits.count, grad_bias.as<T>(), exec);
}

// run(T{}, channels_last, vector) with the constants of the kernel that serves a shape; `packs`:
// whether the tensors are aligned to four channels.
template <typename Run>
void with_layout(const ConvShape& s, Dtype dtype, bool packs, Run&& run) {
    using std::bool_constant;
    const bool four = packs && s.in_per_group() % 4 == 0 && s.out_per_group() % 4 == 0;
    with_vector(dtype, s.channels_last && four, [&](auto zero, auto vector) {
        if (s.channels_last) return run(zero, bool_constant<true>{}, vector);
        if constexpr (vector() == 1) run(zero, bool_constant<false>{}, vector);
    });
}

}  // namespace

std::int64_t conv2d_weight_gradient_workspace(const ConvShape& s, Dtype dtype, const Exec&) {
    return (weight_partials(s, dtype) + bias_splits(s).count * s.out_channels) * sum_bytes(dtype);
}

void conv2d_weight_gradient(const ConvShape& s, Dtype dtype, Gate gate, Address image,
                            Address signal, Address forward, Address grad_weight, Address grad_bias,
                            Address workspace, const Exec& exec) {
    const Address mask = mask_of(gate, forward);
    const Layout maps = s.maps();
    const TapSteps steps = {maps.step_image(), maps.step_channel(), maps.step_y(), maps.step_x()};
    with_layout(s, dtype, aligned(image, signal, mask), [&](auto zero, auto last, auto vector) {
        using T = decltype(zero);
        const MaskedSource<T> source{signal.as<const T>(), mask.as<const T>()};
        weight_gradient<T, last(), vector()>(s, steps, gate, image, source, grad_weight, workspace,
                                             exec);
        if (grad_bias)
            bias_gradient<T, last()>(s, (static_cast<int>(gate) & kRectify) != 0, signal, mask,
                                     grad_bias, workspace.as<Sum<T>>() + weight_partials(s, dtype),
                                     exec);
    });
}

std::int64_t unpool_relu_weight_gradient_workspace(const ConvShape& s, const PoolShape&,
                                                   Dtype dtype, const Exec&) {
    return weight_partials(s, dtype) * sum_bytes(dtype);
}

void unpool_relu_weight_gradient(const ConvShape& s, const PoolShape& pool, Dtype dtype, Gate gate,
                                 bool overwrite, Address image, Address signal, Address switches,
                                 Address forward, Address grad_weight, Address workspace,
                                 const Exec& exec) {
    const bool packs = aligned(image, signal, switches, mask_of(gate, forward));
    with_layout(s, dtype, packs, [&](auto zero, auto last, auto vector) {
        using T = decltype(zero);
        const UnpooledSource<T> source(pool, gate, overwrite, signal, switches, forward);
        weight_gradient<T, last(), vector()>(s, UnpooledSource<T>::steps(pool), gate, image, source,
                                             grad_weight, workspace, exec);
    });
}

}  // namespace zfcuda
