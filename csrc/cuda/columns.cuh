// The columns of a product of taps: result channels of a group, padded to a tile's; and where these
// are few, the phases of a transposed convolution's stride beside each other.
//
// An image of three colours leaves 13 of the narrowest tile's 16 columns to padding. But with
// stride 2 its pixels have four phases, each a convolution of the same maps with other taps, that
// can be columns too: 4 * 3 = 12 of 16.
//
//   image[2 q + phase][c] = sum over u of maps[q + high - u] * weight[c][phase + padding
//                                                                        + 2 (u - high)]
//
//   maps  . m m m m .    q reads the same m whatever its phase: a convolution of stride 1 with
//           \ \ / /      ceil(kernel / stride) taps, or one more. A phase that lacks a tap has a
//   image   0 1 0 1      zero weight there: of 7 x 7 taps in 4 phases of 4 x 4, 49 of 64 are useful
//
// The maps are read once and not once a phase, and a pixel's phases are neighbours in the image.
// Zero times infinity is NaN: what is not finite is computed once more without those weights
// (stacked_result.cuh).
//
// Work: ZFNet's conv1 backwards (7 x 7 / 2 to three colours), products of a pixel of all phases and
// a map: 16 taps * 16 columns = 256, instead of 49 * 16 = 784; AlexNet's (11 x 11 / 4): 16 * 64
// instead of 121 * 16. Useful: 57 % and 35 %, instead of 19 %.
#pragma once

#include "port.cuh"

namespace zfcuda {

// A group with few result channels has a tile of its own.
inline bool narrow(std::int64_t columns, Dtype dtype) {
    return dtype != Dtype::float64 && columns <= 16;
}

inline std::int64_t padded_columns(std::int64_t columns, Dtype dtype) {
    return narrow(columns, dtype) ? 16 : (columns + 63) / 64 * 64;
}

constexpr std::int64_t kMostStacked = 64;  // columns: wider tiles know nothing of phases

// One axis of the convolution of stride 1 that has the phases as columns: taps, and what reads the
// furthest of a pixel's places, `high`, as its padding.
struct StackedAxis {
    std::int64_t kernel, padding;

    StackedAxis(std::int64_t taps, std::int64_t stride, std::int64_t given_padding)
        : padding((given_padding + stride - 1) / stride) {
        const std::int64_t last = taps - 1 - given_padding;  // the lowest place is -last / stride
        kernel = padding + 1 + (last >= 0 ? last / stride : -((stride - 1 - last) / stride));
    }
};

// The transposed convolution with its phases as columns. Its image is the first pixel of every
// stride-th row and column, with channels (phase of the row, phase of the column, channel).
inline ConvShape stacked(const ConvShape& s) {
    const StackedAxis y(s.kernel_h, s.stride_h, s.padding_h);
    const StackedAxis x(s.kernel_w, s.stride_w, s.padding_w);
    ConvShape one = s;
    one.in_channels = s.stride_h * s.stride_w * s.in_channels;
    one.in_height = (s.in_height + s.stride_h - 1) / s.stride_h;
    one.in_width = (s.in_width + s.stride_w - 1) / s.stride_w;
    one.kernel_h = y.kernel, one.kernel_w = x.kernel;
    one.padding_h = y.padding, one.padding_w = x.padding;
    one.stride_h = one.stride_w = 1;
    return one;
}

// Whether that takes fewer products, with their padding. The sizes of the images have no say:
// weights are packed once for all of them.
template <bool kTransposed>
bool stacks(const ConvShape& s, Dtype dtype) {
    if (!kTransposed || s.groups != 1 || s.dilation_h != 1 || s.dilation_w != 1 ||
        s.stride_h > kMostStacked || s.stride_w > kMostStacked ||
        s.stride_h * s.stride_w * s.in_channels > kMostStacked)
        return false;
    const ConvShape one = stacked(s);
    return one.taps() * padded_columns(one.in_channels, dtype) <
           s.taps() * padded_columns(s.in_channels, dtype);
}

// The convolution that the product computes.
template <bool kTransposed>
ConvShape product_shape(const ConvShape& s, Dtype dtype) {
    return stacks<kTransposed>(s, dtype) ? stacked(s) : s;
}

}  // namespace zfcuda
