// The gradient with respect to the weight and the bias of both convolutions.
//
//   grad_weight[o,i,ky,kx] = sum over n,y,x of gate(signal)[n,o,y,x] *
//                                              image[n, i, y*stride - padding + ky*dilation, …]
//   grad_bias[o]           = sum over n,y,x of gate(signal)[n,o,y,x]
//
// A matrix product over the pixels: rows are map channels, columns are (ky, kx, i) and one more
// column of ones that yields grad_bias. Each tile of the result is the work of one thread, which
// walks all pixels in order: the sum does not depend on the number of threads.
//
// Measured (ZFNet, batch 8, float32, Zen 4, AVX-512, one thread, processor time, medians, calls of
// both in turn, buffers reused), torch 2.13 / ours, channels_last:
//   conv1 0.81   conv2 0.71   conv3 0.71   conv4 0.73   conv5 0.72   (57-68 GFLOP/s)
// Packing the signal 12 channels a call of constant length, and an image row once for all panels,
// gained a quarter; what is left below the forward product's speed is not explained yet.
//
// Where the signal is pooled, as many images as have kMapsBytes of maps are unpooled into the
// workspace and multiplied from there, then the next ones, added to the gradient itself. Against
// unpooling the whole batch first (Zen 5, batch 8, one thread, the whole backward pass of a fused
// layer with its pool): conv1 1.8 and 1.6 times as fast (channels_last, contiguous), whose maps
// are 37 MB, conv2 1.0 and 1.15, conv5 1.0.
// Narrow groups and contiguous images of few channels go ways of their own: grouped_gradient.h,
// plane_gradient.h.
#include "grouped_gradient.h"
#include "plane_gradient.h"
#include "unpool_rows.h"

namespace zfcuda {
namespace {

constexpr std::int64_t kMapsBytes = 4 * 1024 * 1024;
constexpr std::int64_t kGradRows = 32 * gemm::kRows;
template <typename T>
constexpr std::int64_t kGradColumns = 3 * gemm::kColumns<T>;

// Scratch of one thread: packed signal, packed image, tiles.
template <typename T>
constexpr std::int64_t kGradScratch =
    gemm::kDepth * (kGradRows + kGradColumns<T>)+kGradRows * kGradColumns<T>;

template <typename T>
Taps<Sum<T>> image_taps(const ConvShape& s, std::int64_t group) {
    const Axis rows =
        forward_axis(s.in_height, s.out_height, s.kernel_h, s.stride_h, s.padding_h, s.dilation_h);
    const Axis columns =
        forward_axis(s.in_width, s.out_width, s.kernel_w, s.stride_w, s.padding_w, s.dilation_w);
    return {s.image(), rows, columns, group * s.in_per_group(), s.in_per_group()};
}

// Panels of `rows` channels of the signal from `channel`, for `length` pixels from `at`. `step`,
// between channels, and the height of full panels are constants where they can be.
template <typename T, typename Read, typename Step>
void pack_signal(const Layout& maps, const Read& source, Cursor at, std::int64_t channel,
                 std::int64_t rows, std::int64_t length, Step step, T* dest) {
    const std::int64_t full = rows / gemm::kRows * gemm::kRows;
    const std::int64_t height = gemm::padded_rows(rows - full);
    for (std::int64_t k = 0; k < length; ++k, at.next()) {
        const std::int64_t pixel = maps.offset(at.n, channel, at.y, at.x);
        for (std::int64_t i = 0; i < full; i += gemm::kRows)
            for (std::int64_t r = 0; r < gemm::kRows; ++r)
                dest[i * length + k * gemm::kRows + r] = source(pixel + (i + r) * step);
        T* panel = dest + full * length + k * height;
        for (std::int64_t r = 0; r < height; ++r)
            panel[r] = full + r < rows ? source(pixel + (full + r) * step) : T(0);
    }
}

// Panels of the columns [column, column + columns) of the image's taps, for `length` pixels. The
// column after the last tap is one, those after it zero.
template <typename T, typename Read>
void pack_image(const Taps<T>& taps, const Read& source, Cursor at, std::int64_t column,
                std::int64_t columns, std::int64_t length, T* dest) {
    T row[kGradColumns<T>];
    const std::int64_t used = std::min(columns, taps.size() - column);
    const std::int64_t padded = gemm::padded_columns<T>(columns);
    for (std::int64_t c = used; c < padded; ++c) row[c] = column + c == taps.size();
    for (std::int64_t k = 0; k < length; ++k, at.next()) {
        taps.read_row(source, at, column, column + used, row);
        gemm::for_column_panels<T>(columns, [&](std::int64_t j, std::int64_t width) {
            std::copy_n(row + j, width, dest + j * length + k * width);
        });
    }
}

// `add`: to what grad_weight and grad_bias hold.
template <typename T, typename To>
void store_gradient(const ConvShape& s, const Sum<T>* tiles, std::int64_t channel,
                    std::int64_t rows, std::int64_t column, std::int64_t columns, bool add,
                    To* grad_weight, To* grad_bias) {
    const std::int64_t channels = s.in_per_group(), size = channels * s.taps();
    gemm::for_column_panels<T>(columns, [&](std::int64_t j, std::int64_t width) {
        gemm::for_row_panels(rows, [&](std::int64_t i, std::int64_t height) {
            const Sum<T>* tile = tiles + gemm::tile_offset<T>(rows, i, j, width);
            for (std::int64_t r = 0; r < std::min(height, rows - i); ++r)
                for (std::int64_t c = 0; c < std::min(width, columns - j); ++c) {
                    const std::int64_t k = column + j + c, o = channel + i + r;
                    To& to =
                        k == size
                            ? grad_bias[o]
                            : grad_weight[(o * channels + k % channels) * s.taps() + k / channels];
                    to = To(tile[r * width + c] + (add ? Sum<T>(to) : Sum<T>(0)));
                }
        });
    });
}

template <typename T, typename Read, typename To>
void gradient(const ConvShape& s, const T* image, const Read& signal, bool add, To* grad_weight,
              To* grad_bias, Sum<T>* scratch, const Exec& exec) {
    const Source<Gate::none, T> source{image, nullptr};
    const std::int64_t size = s.in_per_group() * s.taps() + (grad_bias ? 1 : 0);
    const std::int64_t row_blocks = gemm::divide_up(s.out_per_group(), kGradRows);
    const std::int64_t column_blocks = gemm::divide_up(size, kGradColumns<T>);
    const std::int64_t block = gemm::padded_columns<T>(gemm::divide_up(size, column_blocks));
    const std::int64_t units = s.groups * row_blocks * column_blocks;
    parallel_for_thread(units, exec, [&](std::int64_t unit, int thread) {
        const std::int64_t column = unit % column_blocks * block;
        const std::int64_t row = unit / column_blocks % row_blocks * kGradRows;
        const std::int64_t group = unit / column_blocks / row_blocks;
        const std::int64_t rows = std::min(kGradRows, s.out_per_group() - row);
        const std::int64_t columns = std::min(block, size - column);
        const std::int64_t channel = group * s.out_per_group() + row;
        auto* a = scratch + thread * kGradScratch<T>;
        auto* b = a + gemm::kDepth * kGradRows;
        auto* tiles = b + gemm::kDepth * kGradColumns<T>;
        const auto taps = image_taps<T>(s, group);
        const std::int64_t pixels = taps.positions(s.batch);
        std::int64_t k = 0;
        do {
            const std::int64_t length = std::min(gemm::kDepth, pixels - k);
            if (length > 0) {
                const Cursor at(taps.rows, taps.columns, k);
                if (s.channels_last)
                    pack_signal(s.maps(), signal, at, channel, rows, length,
                                std::integral_constant<std::int64_t, 1>{}, a);
                else
                    pack_signal(s.maps(), signal, at, channel, rows, length,
                                s.maps().step_channel(), a);
                pack_image(taps, source, at, column, columns, length, b);
            }
            gemm::multiply<Sum<T>, gemm::Rows::k_major>(a, b, rows, columns, length, tiles, k > 0);
            k += length;
        } while (k < pixels);
        store_gradient<T>(s, tiles, channel, rows, column, columns, add, grad_weight, grad_bias);
    });
}

std::int64_t weights(const ConvShape& s) { return s.out_channels * s.in_per_group() * s.taps(); }

template <typename T>
std::int64_t unpooled_images(const ConvShape& s) {
    const std::int64_t fit = kMapsBytes / (s.maps().step_image() * std::int64_t(sizeof(Sum<T>)));
    return std::clamp<std::int64_t>(fit, 1, s.batch);
}

// The gated maps of `count` images from `first` on, in the layout of the pool.
template <typename T>
void unpool_images(const ConvShape& s, const Unpool<T>& unpool, std::int64_t first,
                   std::int64_t count, Sum<T>* maps, const Exec& exec) {
    const Layout to = s.maps();
    if (s.channels_last)
        return parallel_for(count * s.out_height, exec, [&](std::int64_t line) {
            const std::int64_t n = line / s.out_height, y = line % s.out_height;
            unpool.rows(first + n, 0, s.out_channels, y, y + 1, maps + to.offset(n, 0, y, 0));
        });
    parallel_for(count * s.out_channels, exec, [&](std::int64_t plane) {
        const std::int64_t n = plane / s.out_channels, c = plane % s.out_channels;
        unpool.rows(first + n, c, 1, 0, s.out_height, maps + to.offset(n, c, 0, 0));
    });
}

template <typename T>
bool gradient_by_groups(const ConvShape& s) {
    return kWhole<T> && narrow_groups<T>(s.channels_last, s.groups, s.in_per_group(),
                                         s.out_per_group(), s.taps());
}

// Where a position's channels lie a plane apart and are so few that copying their planes again for
// every block of maps takes less time than packing them.
template <typename T>
bool gradient_by_planes(const ConvShape& s) {
    return kWhole<T> && !s.channels_last &&
           PlaneGradient<Sum<T>>(s).scratch() * std::int64_t(sizeof(Sum<T>)) <= 8 * kPlaneBytes;
}

// Whichever way the shape goes.
template <typename T, typename Read, typename To>
void any_gradient(const ConvShape& s, const T* image, const Read& signal, bool add, To* grad_weight,
                  To* grad_bias, Sum<T>* scratch, const Exec& exec) {
    if constexpr (kWhole<T>) {
        if (gradient_by_groups<T>(s))
            return run_grouped_gradient(s, image, signal, add, grad_weight, grad_bias, scratch,
                                        exec);
        if (gradient_by_planes<T>(s))
            return PlaneGradient<T>(s).run(image, signal, add, grad_weight, grad_bias, scratch,
                                           exec);
    }
    gradient(s, image, signal, add, grad_weight, grad_bias, scratch, exec);
}

}  // namespace

std::int64_t conv2d_weight_gradient_workspace(const ConvShape& s, Dtype dtype, const Exec& exec) {
    std::int64_t bytes = 0;
    with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        std::int64_t scratch = kGradScratch<T>, shared = 0;
        if (gradient_by_groups<T>(s)) {
            scratch = GroupedGradient<Sum<T>, Source<Gate::none, Sum<T>>>::scratch(s);
        } else if (gradient_by_planes<T>(s)) {
            const PlaneGradient<Sum<T>> plan(s);
            scratch = plan.scratch();
            shared = plan.offsets_room();
        }
        bytes = kLine + sizeof(Sum<T>) * (shared + scratch * max_threads(exec));
    });
    return bytes;
}

void conv2d_weight_gradient(const ConvShape& s, Dtype dtype, Gate gate, Address image,
                            Address signal, Address forward, Address grad_weight, Address grad_bias,
                            Address workspace, const Exec& exec) {
    with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        with_source<T>(gate, signal, forward, [&](const auto& source) {
            any_gradient(s, image.as<const T>(), source, false, grad_weight.as<T>(),
                         grad_bias.as<T>(), aligned<Sum<T>>(workspace), exec);
        });
    });
}

std::int64_t unpool_relu_weight_gradient_workspace(const ConvShape& s, const PoolShape&,
                                                   Dtype dtype, const Exec& exec) {
    std::int64_t values = 0;
    with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        values = gemm::round_up(unpooled_images<T>(s) * s.maps().step_image(), kLine);
        if (!kWhole<T>) values += gemm::round_up(weights(s), kLine);
        values *= sizeof(Sum<T>);
    });
    return values + conv2d_weight_gradient_workspace(s, dtype, exec);
}

void unpool_relu_weight_gradient(const ConvShape& s, const PoolShape& pool, Dtype dtype, Gate gate,
                                 bool overwrite, Address image, Address signal, Address switches,
                                 Address forward, Address grad_weight, Address workspace,
                                 const Exec& exec) {
    with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        const Unpool<T> unpool{pool,
                               gate,
                               overwrite,
                               signal.as<const T>(),
                               switches.as<const std::uint8_t>(),
                               forward.as<const T>()};
        const std::int64_t images = unpooled_images<T>(s);
        auto* const maps = aligned<Sum<T>>(workspace);
        auto* scratch = maps + gemm::round_up(images * s.maps().step_image(), kLine);
        auto* sums = grad_weight.as<Sum<T>>();
        if (!kWhole<T>) {  // rounded when all of them are there
            sums = scratch;
            scratch += gemm::round_up(weights(s), kLine);
        }
        ConvShape part = s;
        part.batch = images;
        for (std::int64_t first = 0; first < s.batch; first += part.batch) {
            part.batch = std::min(part.batch, s.batch - first);
            unpool_images(part, unpool, first, part.batch, maps, exec);
            any_gradient(part, image.as<const T>() + first * s.image().step_image(),
                         Source<Gate::none, Sum<T>>{maps, nullptr}, first > 0, sums,
                         static_cast<Sum<T>*>(nullptr), scratch, exec);
        }
        for (std::int64_t i = 0; !kWhole<T> && i < weights(s); ++i)
            grad_weight.as<T>()[i] = T(sums[i]);
    });
}

}  // namespace zfcuda
