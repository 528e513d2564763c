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
// Narrow groups and contiguous images of few channels go ways of their own: grouped_gradient.h,
// plane_gradient.h.
#include "grouped_gradient.h"
#include "plane_gradient.h"

namespace zfcuda {
namespace {

constexpr std::int64_t kGradRows = 32 * gemm::kRows;
template <typename T>
constexpr std::int64_t kGradColumns = 3 * gemm::kColumns<T>;

// Scratch of one thread: packed signal, packed image, tiles.
template <typename T>
constexpr std::int64_t kGradScratch =
    gemm::kDepth * (kGradRows + kGradColumns<T>)+kGradRows * kGradColumns<T>;

template <typename T>
Taps<T> image_taps(const ConvShape& s, std::int64_t group) {
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

template <typename T>
void store_gradient(const ConvShape& s, const T* tiles, std::int64_t channel, std::int64_t rows,
                    std::int64_t column, std::int64_t columns, T* grad_weight, T* grad_bias) {
    const std::int64_t channels = s.in_per_group(), size = channels * s.taps();
    gemm::for_column_panels<T>(columns, [&](std::int64_t j, std::int64_t width) {
        gemm::for_row_panels(rows, [&](std::int64_t i, std::int64_t height) {
            const T* tile = tiles + gemm::tile_offset<T>(rows, i, j, width);
            for (std::int64_t r = 0; r < std::min(height, rows - i); ++r)
                for (std::int64_t c = 0; c < std::min(width, columns - j); ++c) {
                    const std::int64_t k = column + j + c, o = channel + i + r;
                    const T value = tile[r * width + c];
                    if (k == size)
                        grad_bias[o] = value;
                    else
                        grad_weight[(o * channels + k % channels) * s.taps() + k / channels] =
                            value;
                }
        });
    });
}

template <typename T, typename Read>
void gradient(const ConvShape& s, const T* image, const Read& signal, T* grad_weight, T* grad_bias,
              T* scratch, const Exec& exec) {
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
        T* a = scratch + thread * kGradScratch<T>;
        T* b = a + gemm::kDepth * kGradRows;
        T* tiles = b + gemm::kDepth * kGradColumns<T>;
        const Taps<T> taps = image_taps<T>(s, group);
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
            gemm::multiply<T, gemm::Rows::k_major>(a, b, rows, columns, length, tiles, k > 0);
            k += length;
        } while (k < pixels);
        store_gradient(s, tiles, channel, rows, column, columns, grad_weight, grad_bias);
    });
}

template <typename T>
bool gradient_by_groups(const ConvShape& s) {
    return narrow_groups<T>(s.channels_last, s.groups, s.in_per_group(), s.out_per_group(),
                            s.taps());
}

// Where a position's channels lie a plane apart and are so few that copying their planes again for
// every block of maps takes less time than packing them.
template <typename T>
bool gradient_by_planes(const ConvShape& s) {
    if (getenv("ZFG")) return false;
    return !s.channels_last &&
           PlaneGradient<T>(s).scratch() * std::int64_t(sizeof(T)) <= 8 * kPlaneBytes;
}

}  // namespace

std::int64_t conv2d_weight_gradient_workspace(const ConvShape& s, Dtype dtype, const Exec& exec) {
    std::int64_t bytes = 0;
    with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        std::int64_t scratch = kGradScratch<T>, shared = 0;
        if (gradient_by_groups<T>(s)) {
            scratch = GroupedGradient<T, Source<Gate::none, T>>::scratch(s);
        } else if (gradient_by_planes<T>(s)) {
            const PlaneGradient<T> plan(s);
            scratch = plan.scratch();
            shared = plan.offsets_room();
        }
        bytes = kLine + sizeof(T) * (shared + scratch * max_threads(exec));
    });
    return bytes;
}

void conv2d_weight_gradient(const ConvShape& s, Dtype dtype, Gate gate, Address image,
                            Address signal, Address forward, Address grad_weight, Address grad_bias,
                            Address workspace, const Exec& exec) {
    with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        with_source<T>(gate, signal, forward, [&](const auto& source) {
            const T* const from = image.as<const T>();
            T *const by_weight = grad_weight.as<T>(), *const by_bias = grad_bias.as<T>();
            T* const scratch = aligned<T>(workspace);
            if (gradient_by_groups<T>(s))
                run_grouped_gradient(s, from, source, by_weight, by_bias, scratch, exec);
            else if (gradient_by_planes<T>(s))
                PlaneGradient<T>(s).run(from, source, by_weight, by_bias, scratch, exec);
            else
                gradient(s, from, source, by_weight, by_bias, scratch, exec);
        });
    });
}

}  // namespace zfcuda
