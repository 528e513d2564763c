// Maps that are not in memory, as the source of a product: gathered by switches where they are
// read.
//
//   maps[y,x] = sum of masked signal over the windows that cover (y,x) and whose switch points to
//               it, in row-major order; with overwrite: the last of them
//
// `forward` masks a value before the sum; the rectifier, which acts after it, is the product's.
#pragma once

#include "pool_windows.cuh"
#include "tap_block.cuh"

namespace zfcuda {

template <typename T>
struct UnpooledSource {
    using Value = Sum<T>;
    WindowAxis y, x;
    std::int64_t row_step, column_step;  // of the signal
    const T* signal;
    const std::uint8_t* switches;
    const T* forward;
    bool overwrite;

    UnpooledSource(const PoolShape& s, Gate gate, bool last_only, Address pooled, Address places,
                   Address mask)
        : y(Windows(s, 1).y),
          x(Windows(s, 1).x),
          row_step(s.output().step_y()),
          column_step(s.output().step_x()),
          signal(pooled.as<const T>()),
          switches(places.as<const std::uint8_t>()),
          forward(mask_of(gate, mask).as<const T>()),
          overwrite(last_only) {}

    // Rows and columns of the maps are found by `load` alone.
    static TapSteps steps(const PoolShape& s) {
        return {s.output().step_image(), s.output().step_channel(), 0, 0};
    }

    // kVector channels of the maps at a row and column; `offset` is that of window (0, 0).
    template <int kVector>
    __device__ Vector<Value, kVector> load(std::int64_t offset, int row, int column) const {
        Vector<Value, kVector> sum = {};
        const int last_y = y.last(row), last_x = x.last(column);
        for (int oy = y.first(row); oy <= last_y; ++oy) {
            const int i = y.tap(row, oy);
            if (i < 0) continue;
            for (int ox = x.first(column); ox <= last_x; ++ox) {
                const int j = x.tap(column, ox);
                if (j < 0) continue;
                const std::int64_t at = offset + oy * row_step + ox * column_step;
                const auto where = load_vector<std::uint8_t, kVector>(switches + at);
                const auto value = convert<Value>(load_gated<T, kVector>(signal, forward, at));
#pragma unroll
                for (int e = 0; e < kVector; ++e)
                    if (where.value[e] == i * x.kernel + j)
                        sum.value[e] = overwrite ? value.value[e] : sum.value[e] + value.value[e];
            }
        }
        return sum;
    }
};

template <typename T>
constexpr bool kGathers<UnpooledSource<T>> = true;

}  // namespace zfcuda
