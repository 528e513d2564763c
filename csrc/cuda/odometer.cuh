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

// The same for loops that keep what depends on the tap alone: which tap, by row and column among
// those of its phase, and which of its channels (or pieces of them).
struct TapWalk {
    int channel, column, row;

    __device__ TapWalk(int number, int channels, int width)
        : channel(number % channels),
          column(number / channels % width),
          row(number / channels / width) {}

    // Whether the step leads to another tap.
    __device__ bool advance(int step, int channels, int width) {
        channel += step;
        if (channel < channels) return false;
        do {
            channel -= channels;
            if (++column == width) {
                column = 0;
                ++row;
            }
        } while (channel >= channels);
        return true;
    }
};

}  // namespace zfcuda
