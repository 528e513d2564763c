// Local response normalisation across channels, and its gradient.
//
//   d[c] = k + alpha/size * sum over c' in [c - size/2, c + (size-1)/2] of x[c']^2
//   y[c] = x[c] * d[c]^-beta
//   grad_x[j] = g[j] * d[j]^-beta - 2*alpha*beta/size * x[j] *
//               sum over c in [j - (size-1)/2, j + size/2] of g[c] * x[c] * d[c]^(-beta-1)
#include <cmath>

#include "parallel.h"

namespace zfcuda {
namespace {

template <typename T>
struct Norm {
    NormShape s;
    T scale, beta, k;
    const T* input;

    // d[c] of the position whose channel 0 lies at `base`.
    T denominator(std::int64_t base, std::int64_t c) const {
        const std::int64_t first = std::max<std::int64_t>(c - s.size / 2, 0);
        const std::int64_t last = std::min(c + (s.size - 1) / 2, s.channels - 1);
        T sum = 0;
        for (std::int64_t i = first; i <= last; ++i) {
            const T value = input[base + i * s.layout().step_channel()];
            sum += value * value;
        }
        return k + scale * sum;
    }
};

// body(base) for each position, base the storage index of its channel 0.
template <typename Body>
void for_positions(const NormShape& s, const Exec& exec, Body&& body) {
    parallel_for(s.batch * s.height, exec, [&](std::int64_t row) {
        for (std::int64_t x = 0; x < s.width; ++x)
            body(s.layout().offset(row / s.height, 0, row % s.height, x));
    });
}

}  // namespace

void local_response_norm(const NormShape& s, Dtype dtype, double alpha, double beta, double k,
                         Address input, Address output, const Exec& exec) {
    with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        const Norm<T> norm{s, T(alpha / s.size), T(beta), T(k), input.as<const T>()};
        const std::int64_t step = s.layout().step_channel();
        for_positions(s, exec, [&](std::int64_t base) {
            for (std::int64_t c = 0; c < s.channels; ++c)
                output.as<T>()[base + c * step] = norm.input[base + c * step] *
                                                  std::pow(norm.denominator(base, c), -norm.beta);
        });
    });
}

void local_response_norm_gradient(const NormShape& s, Dtype dtype, double alpha, double beta,
                                  double k, Address input, Address grad_output,
                                  Address grad_input, const Exec& exec) {
    with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        const Norm<T> norm{s, T(alpha / s.size), T(beta), T(k), input.as<const T>()};
        const std::int64_t step = s.layout().step_channel();
        const T* g = grad_output.as<const T>();
        for_positions(s, exec, [&](std::int64_t base) {
            for (std::int64_t j = 0; j < s.channels; ++j) {
                const std::int64_t first = std::max<std::int64_t>(j - (s.size - 1) / 2, 0);
                const std::int64_t last = std::min(j + s.size / 2, s.channels - 1);
                T sum = 0;
                for (std::int64_t c = first; c <= last; ++c)
                    sum += g[base + c * step] * norm.input[base + c * step] *
                           std::pow(norm.denominator(base, c), -norm.beta - 1);
                const std::int64_t here = base + j * step;
                grad_input.as<T>()[here] =
                    g[here] * std::pow(norm.denominator(base, j), -norm.beta) -
                    2 * norm.scale * norm.beta * norm.input[here] * sum;
            }
        });
    });
}

}  // namespace zfcuda
