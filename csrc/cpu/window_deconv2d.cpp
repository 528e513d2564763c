// One step down of a receptive-field-local projection: unpool, gate, transposed convolution, clip.
// The plain form, one multiplication at a time.
#include "parallel.h"

namespace zfcuda {
namespace {

// The gated maps of one window, (out_height, out_width, out_channels).
template <typename T>
void read_maps(const WindowShape& s, Gate gate, std::int64_t window, const T* signal,
               const std::uint8_t* switches, const std::uint8_t* positive, T* maps) {
    const std::int64_t size = s.out_height * s.out_width * s.out_channels;
    if (s.pooled()) {
        std::fill_n(maps, size, T(0));
        const std::int64_t pooled = s.pooled_height * s.pooled_width * s.out_channels;
        const std::int64_t taps = s.pool_kernel_h * s.pool_kernel_w;
        for (std::int64_t i = 0; i < pooled; ++i) {
            const std::int64_t tap = switches[window * pooled + i], c = i % s.out_channels;
            if (tap >= taps) continue;
            const std::int64_t x = i / s.out_channels % s.pooled_width * s.pool_stride_w +
                                   tap % s.pool_kernel_w * s.pool_dilation_w;
            const std::int64_t y = i / s.out_channels / s.pooled_width * s.pool_stride_h +
                                   tap / s.pool_kernel_w * s.pool_dilation_h;
            maps[(y * s.out_width + x) * s.out_channels + c] += signal[window * pooled + i];
        }
    } else {
        std::copy_n(signal + window * size, size, maps);
    }
    for (std::int64_t i = 0; i < size; ++i) {
        const std::int64_t c = i % s.out_channels, at = window * size + i;
        if ((gate == Gate::deconvnet || gate == Gate::guided) && maps[i] <= 0) maps[i] = 0;
        if ((gate == Gate::backprop || gate == Gate::guided) &&
            !(positive[at / s.out_channels * s.bit_bytes() + c / 8] >> c % 8 & 1))
            maps[i] = 0;
    }
}

// Adds one map position's value to the image window.
template <typename T>
void add_filter(const WindowShape& s, T value, std::int64_t o, std::int64_t y, std::int64_t x,
                const T* weight, T* image) {
    const std::int64_t first = o / s.out_per_group() * s.in_per_group();
    for (std::int64_t c = 0; c < s.in_per_group(); ++c)
        for (std::int64_t tap = 0; tap < s.taps(); ++tap) {
            const std::int64_t row = y * s.stride_h + tap / s.kernel_w * s.dilation_h;
            const std::int64_t column = x * s.stride_w + tap % s.kernel_w * s.dilation_w;
            image[(row * s.in_width + column) * s.in_channels + first + c] +=
                value * weight[(o * s.in_per_group() + c) * s.taps() + tap];
        }
}

template <typename T>
void clip(const WindowShape& s, std::int64_t top, std::int64_t left, T* image) {
    for (std::int64_t y = 0; y < s.in_height; ++y)
        for (std::int64_t x = 0; x < s.in_width; ++x) {
            const std::int64_t row = top + y, column = left + x;
            if (row < 0 || row >= s.image_height || column < 0 || column >= s.image_width)
                std::fill_n(image + (y * s.in_width + x) * s.in_channels, s.in_channels, T(0));
        }
}

}  // namespace

std::int64_t window_deconv2d_packed(const WindowShape& s, Dtype dtype, const Exec&) {
    return s.out_channels * s.in_per_group() * s.taps() * (dtype == Dtype::float32 ? 4 : 8);
}

void window_deconv2d_pack(const WindowShape& s, Dtype dtype, Address weight, Address packed,
                          const Exec& exec) {
    std::copy_n(weight.as<const char>(), window_deconv2d_packed(s, dtype, exec), packed.as<char>());
}

std::int64_t window_deconv2d_workspace(const WindowShape& s, Dtype dtype, const Exec& exec) {
    const std::int64_t maps = s.out_height * s.out_width * s.out_channels;
    return max_threads(exec) * maps * (dtype == Dtype::float32 ? 4 : 8);
}

void window_deconv2d(const WindowShape& s, Dtype dtype, Gate gate, Address signal, Address switches,
                     Address positive, Address packed, Address origins, Address image,
                     Address workspace, const Exec& exec) {
    with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        const std::int64_t size = s.in_height * s.in_width * s.in_channels;
        parallel_for_thread(s.windows, exec, [&](std::int64_t window, int thread) {
            T* maps = workspace.as<T>() + thread * s.out_height * s.out_width * s.out_channels;
            T* result = image.as<T>() + window * size;
            read_maps(s, gate, window, signal.as<const T>(), switches.as<const std::uint8_t>(),
                      positive.as<const std::uint8_t>(), maps);
            std::fill_n(result, size, T(0));
            for (std::int64_t i = 0; i < s.out_height * s.out_width * s.out_channels; ++i)
                if (maps[i] != 0)
                    add_filter(s, maps[i], i % s.out_channels, i / s.out_channels / s.out_width,
                               i / s.out_channels % s.out_width, packed.as<const T>(), result);
            const auto* origin = origins.as<const std::int64_t>() + 2 * window;
            clip(s, origin[0], origin[1], result);
        });
    });
}

}  // namespace zfcuda
