// The weight gradient of the convolutions of grouped.h: lanes are map channels.
//
//   grad[tap][i][o] = sum over positions of signal[position][o] * shuffle_i(image[position + tap])
//
// A unit of work is a vector of channels. It walks all rows in order, and each row once for every
// tap and i, in kChains sums that do not wait for each other.
//
// Measured as in planes.h, torch 2.13 / ours (before): depthwise at 56 x 56 .81 (.02), 7 x 7 at 28
// x 28 2.0 (.06), groups of 4 at 56 x 56 .75 (.12).
#pragma once

#include "grouped.h"

namespace zfcuda {

template <typename T, typename Read>
struct GroupedGradient {
    using L = Lanes<T>;
    using Value = typename L::Value;
    static constexpr int kChains = 4;

    const ConvShape& s;
    const T* image;
    const Read& signal;
    std::int64_t channel, lanes;
    T* sums;  // taps, channels of a group, lanes; then the bias

    // Elements of the scratch of one thread.
    static std::int64_t scratch(const ConvShape& s) {
        return (s.taps() * s.in_per_group() + 1) * L::count;
    }

    void run(bool add, T* grad_weight, T* grad_bias) const {
        std::fill_n(sums, scratch(s), T(0));
        for (std::int64_t n = 0; n < s.batch; ++n)
            for (std::int64_t y = 0; y < s.out_height; ++y) {
                if (s.in_per_group() == 1)
                    row<true>(n, y);
                else
                    row<false>(n, y);
                if (grad_bias) add_bias(n, y);
            }
        store(add, grad_weight, grad_bias);
    }

  private:
    void add(T* to, const Value& value) const {
        L::store(to, L::load(to, L::count) + value, L::count);
    }

    template <bool single>
    void row(std::int64_t n, std::int64_t y) const {
        const Layout in = s.image(), out = s.maps();
        const std::int64_t width = s.in_per_group(), step = s.stride_w * in.step_x();
        const typename L::Integer group = first_of_group<T>(width);
        T* to = sums;
        for (std::int64_t i = 0; i < s.kernel_h; ++i) {
            const std::int64_t from_y = y * s.stride_h - s.padding_h + i * s.dilation_h;
            if (from_y < 0 || from_y >= s.in_height) {
                to += s.kernel_w * width * L::count;
                continue;
            }
            for (std::int64_t j = 0; j < s.kernel_w; ++j) {
                // Positions [first, last) read inside the row.
                const std::int64_t left = j * s.dilation_w - s.padding_w;
                const std::int64_t room = s.in_width - left;
                const std::int64_t first = left < 0 ? gemm::divide_up(-left, s.stride_w) : 0;
                const std::int64_t last =
                    room <= 0 ? 0 : std::min(s.out_width, gemm::divide_up(room, s.stride_w));
                const T* from = image + in.offset(n, channel, from_y, 0) + left * in.step_x();
                const std::int64_t maps = out.offset(n, channel, y, 0);
                for (std::int64_t g = 0; g < width; ++g, to += L::count)
                    add(to, sum<single>(from, step, maps, out.step_x(), first, last,
                                        group + typename L::Int(g)));
            }
        }
    }

    template <bool single>
    ZF_INLINE Value sum(const T* from, std::int64_t step, std::int64_t maps, std::int64_t maps_step,
                        std::int64_t first, std::int64_t last,
                        const typename L::Integer& lane) const {
        Value chains[kChains] = {};
        const auto term = [&](std::int64_t x) {
            const Value value = L::load(from + x * step, lanes);
            return load_gated(signal, maps + x * maps_step, lanes) *
                   (single ? value : __builtin_shuffle(value, lane));
        };
        std::int64_t x = first;
        for (; x + kChains <= last; x += kChains)
#pragma GCC unroll 4
            for (int i = 0; i < kChains; ++i) chains[i] += term(x + i);
        for (; x < last; ++x) chains[0] += term(x);
        return (chains[0] + chains[1]) + (chains[2] + chains[3]);
    }

    void add_bias(std::int64_t n, std::int64_t y) const {
        Value value{};
        for (std::int64_t x = 0; x < s.out_width; ++x)
            value += load_gated(signal, s.maps().offset(n, channel, y, x), lanes);
        add(sums + s.taps() * s.in_per_group() * L::count, value);
    }

    // The sums, or what the gradients hold and they.
    void store(bool add, T* grad_weight, T* grad_bias) const {
        const auto put = [&](T& to, std::int64_t k, std::int64_t c) {
            to = sums[k * L::count + c] + (add ? to : T(0));
        };
        const std::int64_t taps = s.taps(), width = s.in_per_group();
        for (std::int64_t c = 0; c < lanes; ++c) {
            T* const to = grad_weight + (channel + c) * width * taps;
            for (std::int64_t t = 0; t < taps; ++t)
                for (std::int64_t g = 0; g < width; ++g) put(to[g * taps + t], t * width + g, c);
            if (grad_bias) put(grad_bias[channel + c], taps * width, c);
        }
    }
};

template <typename T, typename Read>
void run_grouped_gradient(const ConvShape& s, const T* image, const Read& signal, bool sum,
                          T* grad_weight, T* grad_bias, T* scratch, const Exec& exec) {
    using Gradient = GroupedGradient<T, Read>;
    constexpr std::int64_t count = Lanes<T>::count;
    parallel_for_thread(gemm::divide_up(s.out_channels, count), exec,
                        [&](std::int64_t block, int thread) {
                            const std::int64_t channel = block * count;
                            Gradient{s,
                                     image,
                                     signal,
                                     channel,
                                     std::min(count, s.out_channels - channel),
                                     scratch + thread * Gradient::scratch(s)}
                                .run(sum, grad_weight, grad_bias);
                        });
}

}  // namespace zfcuda
