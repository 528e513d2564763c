// Positions in a convolution's sum without divisions.
#pragma once

#include "port.cuh"

namespace zfcuda {

constexpr int kOutside = -(1 << 30);  // a coordinate that no tap brings back into an image

// A number of three digits that counts up by a fixed step without divisions; `high` is unbounded.
// Convolutions count k = (row of taps, column of taps, channel) or (image, row, column) with it.
struct Odometer {
    int low, middle, high;

    Odometer() = default;
    ZF_HD Odometer(std::int64_t number, int low_base, int middle_base)
        : low(static_cast<int>(number % low_base)),
          middle(static_cast<int>(number / low_base % middle_base)),
          high(static_cast<int>(number / low_base / middle_base)) {}

    ZF_HD void advance(const Odometer& step, int low_base, int middle_base) {
        low += step.low;
        middle += step.middle;
        high += step.high;
        if (low >= low_base) {
            low -= low_base;
            ++middle;
        }
        if (middle >= middle_base) {
            middle -= middle_base;
            ++high;
        }
    }
};

}  // namespace zfcuda
