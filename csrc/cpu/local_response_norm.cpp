// Local response normalisation across channels, and its gradient.
//
//   d[c] = k + alpha/size * sum over c' in [c - size/2, c + (size-1)/2] of x[c']^2
//   y[c] = x[c] * d[c]^-beta
//   grad_x[j] = g[j] * d[j]^-beta - 2*alpha*beta/size * x[j] *
//               sum over c in [j - (size-1)/2, j + size/2] of g[c] * x[c] * d[c]^(-beta-1)
//
// Work goes by blocks of up to 64 lanes, neighbours in memory: channels of one pixel in
// channels_last (neighbours in the window are then neighbours in the vector, read unaligned),
// pixels of one channel in contiguous memory. Nothing is kept between forward and backward: a
// denominator costs `size` multiply-adds, less than reading it back.
//
// Floor: forward one read and one write, backward two reads and one write. The usual beta = 3/4
// takes two square roots and a division, which vectorise; another beta takes std::pow.
//
// Measured (ZFNet, batch 8, float32, Zen 4, AVX-512, one thread, processor time, medians, calls of
// both in turn, buffers reused), torch 2.13 / ours, channels_last:
//   norm1 13.8   norm2 15.3   backward 14.3, 13.7   contiguous: 7.9, 13.3, backward 7.3, 7.5
//   (3.7 to 4.4 times a copy: bound by the square roots and the division, not yet by memory)
#include <cmath>

#include "lanes.h"
#include "parallel.h"

namespace zfcuda {
namespace {

constexpr std::int64_t kLanes = 64;
// Sums of the gradient that a thread keeps: 32 channels of 64 pixels, or 2048 channels of one.
constexpr std::int64_t kSums = 32 * kLanes;

struct Range {
    std::int64_t first, last;
};

template <typename T>
struct Norm {
    using V = Sum<T>;
    NormShape s;
    V scale, beta, k;
    const T* x;

    // The channels that a block of lanes spans from channel c on, of those before `end`.
    std::int64_t channels(std::int64_t c, std::int64_t end) const {
        return s.channels_last ? std::min(kLanes, end - c) : 1;
    }
    // The lanes of a block at channel c whose channel lies in [begin, end).
    Range lanes_inside(std::int64_t c, std::int64_t begin, std::int64_t end,
                       std::int64_t lanes) const {
        if (!s.channels_last) return {0, begin <= c && c < end ? lanes : 0};
        return {std::max<std::int64_t>(begin - c, 0), std::min(lanes, end - c)};
    }

    // d of the block at channel c, storage index `at`.
    void denominators(std::int64_t at, std::int64_t c, std::int64_t lanes, V* d) const {
        std::fill_n(d, lanes, V(0));
        for (std::int64_t o = -(s.size / 2); o <= (s.size - 1) / 2; ++o) {
            const Range inside = lanes_inside(c + o, 0, s.channels, lanes);
            if (inside.first >= inside.last) continue;
            V room[kLanes];
            const T* source = x + at + o * s.layout().step_channel() + inside.first;
            const V* value = widened(source, inside.last - inside.first, room);
            for (std::int64_t i = inside.first; i < inside.last; ++i, ++value)
                d[i] += *value * *value;
        }
        for (std::int64_t i = 0; i < lanes; ++i) d[i] = k + scale * d[i];
    }

    // d^-beta of a block.
    void powers(const V* d, std::int64_t lanes, V* power) const {
        if (beta == V(0.75))
            for (std::int64_t i = 0; i < lanes; ++i) {
                const V root = std::sqrt(d[i]);
                power[i] = 1 / (root * std::sqrt(root));
            }
        else
            for (std::int64_t i = 0; i < lanes; ++i) power[i] = std::pow(d[i], -beta);
    }

    // The normalised values of `lanes` pixels (one in channels_last), channel 0 at `base`.
    void forward(std::int64_t base, std::int64_t lanes, T* y) const {
        V d[kLanes], power[kLanes];
        for (std::int64_t c = 0; c < s.channels; c += channels(c, s.channels)) {
            const std::int64_t at = base + c * s.layout().step_channel();
            const std::int64_t block = s.channels_last ? channels(c, s.channels) : lanes;
            denominators(at, c, block, d);
            powers(d, block, power);
            V room[kLanes];
            const V* value = widened(x + at, block, room);
            if constexpr (std::is_same_v<T, V>) {
                for (std::int64_t i = 0; i < block; ++i) y[at + i] = value[i] * power[i];
            } else {
                for (std::int64_t i = 0; i < block; ++i) power[i] *= value[i];
                store_rounded(y + at, power, block);
            }
        }
    }

    // The gradient of the same pixels, a run of channels [begin, end) at a time: each block of
    // terms g x d^(-beta-1) is computed once and added to the sums of the channels it reaches.
    void backward(std::int64_t base, std::int64_t lanes, const T* g, T* grad) const {
        const std::int64_t step = s.layout().step_channel();
        const std::int64_t sum_step = s.channels_last ? 1 : kLanes, run = kSums / sum_step;
        V d[kLanes], term[kLanes], own[kSums], sums[kSums];
        for (std::int64_t begin = 0; begin < s.channels; begin += run) {
            const std::int64_t end = std::min(begin + run, s.channels);
            const std::int64_t last = std::min(end + s.size / 2, s.channels);
            std::fill_n(sums, (end - begin) * sum_step, V(0));
            std::int64_t c = std::max<std::int64_t>(begin - (s.size - 1) / 2, 0);
            for (std::int64_t next; c < last; c = next) {
                next = c + channels(c, last);
                const std::int64_t block = s.channels_last ? next - c : lanes, at = base + c * step;
                denominators(at, c, block, d);
                powers(d, block, term);
                const Range inside = lanes_inside(c, begin, end, block);
                for (std::int64_t i = inside.first; i < inside.last; ++i)
                    own[(c - begin) * sum_step + i] = g[at + i] * term[i];
                for (std::int64_t i = 0; i < block; ++i) term[i] *= g[at + i] * x[at + i] / d[i];
                for (std::int64_t o = -(s.size / 2); o <= (s.size - 1) / 2; ++o) {
                    const Range reached = lanes_inside(c + o, begin, end, block);
                    const std::int64_t sum = (c + o - begin) * sum_step;
                    for (std::int64_t i = reached.first; i < reached.last; ++i)
                        sums[sum + i] += term[i];
                }
            }
            const V factor = 2 * scale * beta;
            for (c = begin; c < end; c += channels(c, end)) {
                const std::int64_t block = s.channels_last ? channels(c, end) : lanes;
                const std::int64_t at = base + c * step, sum = (c - begin) * sum_step;
                for (std::int64_t i = 0; i < block; ++i)
                    grad[at + i] = T(own[sum + i] - factor * x[at + i] * sums[sum + i]);
            }
        }
    }
};

// body(base, lanes) for all pixels: `lanes` neighbours whose channel 0 starts at storage `base`.
template <typename Body>
void for_pixels(const NormShape& s, const Exec& exec, Body&& body) {
    const std::int64_t plane = s.height * s.width;
    if (s.channels_last)
        return parallel_for(s.batch * plane, exec,
                            [&](std::int64_t pixel) { body(pixel * s.channels, 1); });
    const std::int64_t blocks = (plane + kLanes - 1) / kLanes;
    parallel_for(s.batch * blocks, exec, [&](std::int64_t block) {
        const std::int64_t first = block % blocks * kLanes;
        body(block / blocks * s.channels * plane + first, std::min(kLanes, plane - first));
    });
}

}  // namespace

void local_response_norm(const NormShape& s, Dtype dtype, double alpha, double beta, double k,
                         Address input, Address output, const Exec& exec) {
    with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        const Norm<T> norm{s, Sum<T>(alpha / s.size), Sum<T>(beta), Sum<T>(k), input.as<const T>()};
        for_pixels(s, exec, [&](std::int64_t base, std::int64_t lanes) {
            norm.forward(base, lanes, output.as<T>());
        });
    });
}

void local_response_norm_gradient(const NormShape& s, Dtype dtype, double alpha, double beta,
                                  double k, Address input, Address grad_output, Address grad_input,
                                  const Exec& exec) {
    with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        const Norm<T> norm{s, Sum<T>(alpha / s.size), Sum<T>(beta), Sum<T>(k), input.as<const T>()};
        for_pixels(s, exec, [&](std::int64_t base, std::int64_t lanes) {
            norm.backward(base, lanes, grad_output.as<const T>(), grad_input.as<T>());
        });
    });
}

}  // namespace zfcuda
