// The paper's constraint on filters, after each step of training.
//
//   filter *= max_rms / rms   where   max_rms < rms = sqrt(sum of filter² / size) < infinity
//
// A filter is read once for its sum and once more, from the cache, if it is too large. Squares are
// added as doubles, so that no float overflows, in kSums interleaved sums: vectors, and one order
// on every instruction-set level. Floor: one read of the weight.
#include <cmath>
#include <limits>

#include "parallel.h"

namespace zfcuda {
namespace {

constexpr std::int64_t kSums = 32;

template <typename T>
double sum_of_squares(const T* filter, std::int64_t size) {
    double sums[kSums] = {}, sum = 0;
    std::int64_t i = 0;
    for (; i + kSums <= size; i += kSums)
        for (std::int64_t j = 0; j < kSums; ++j)
            sums[j] += double(filter[i + j]) * double(filter[i + j]);
    for (; i < size; ++i) sum += double(filter[i]) * double(filter[i]);
    for (const double part : sums) sum += part;
    return sum;
}

}  // namespace

void renormalize_filters(std::int64_t filters, std::int64_t size, Dtype dtype, double max_rms,
                         Address weight, const Exec& exec) {
    with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        parallel_for(filters, exec, [&](std::int64_t i) {
            T* const filter = weight.as<T>() + i * size;
            const double rms = std::sqrt(sum_of_squares(filter, size) / double(size));
            if (!(rms > max_rms && rms < std::numeric_limits<double>::infinity())) return;
            const auto scale = static_cast<Sum<T>>(max_rms / rms);
            for (std::int64_t j = 0; j < size; ++j) filter[j] = T(filter[j] * scale);
        });
    });
}

}  // namespace zfcuda
