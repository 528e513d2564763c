// The image as the weight gradient's tensor cores take it where its channels are no whole pieces of
// 16 bytes: folded by a stride, and filled up with zeros.
//
// Three colours fill a piece of eight halves to three eighths, and each tap has such a piece. But
// where a convolution's windows lie a stride apart, the pixels from one to the next can stand side
// by side as channels, as stacked phases do on the way down (columns.cuh):
//
//   folded[n][Y][X][(i, j, c)] = image[n][Y * stride - padding + i][X * stride - padding + j][c]
//                                with i, j < stride: row and column in the fold
//
//   image    . 0 1 2 3 4 5 6 7     stride 2, padding 1: window x begins at folded pixel x, and its
//            \_/ \_/ \_/ \_/       seven columns are four taps of the folded image, of which the
//   folded    0   1   2   3        last lacks one: that column of the gradient is dropped
//
// It is a convolution with stride 1 and without padding, for there is no row or column of the
// folded image but for windows. Either axis is folded, or both, or none: what leaves the fewest
// columns. Columns of ZFNet's conv1 (147 are useful): 192 in tf32 by both axes, 224 in halves by
// rows' pixels; filled up alone 196 and 392. AlexNet's (363): 396 and 432, not 484 and 968.
// It is written once and read in place of the image: a tenth of the gradient's traffic.
// Model, conv1's gradient in bf16, batch 128: 651 us filled up and 325 folded on an A100, 547 and
// 274 on an H100. In tf32 both are two tiles.
#pragma once

#include "gradient_plan.cuh"
#include "tile.cuh"

namespace zfcuda {

// One axis: how many pixels stand side by side, and how far before the image the first one lies.
struct FoldedAxis {
    std::int64_t fold = 1, padding = 0;

    // Folds an axis of a convolution, whose sizes these are, or leaves it.
    static FoldedAxis of(bool folds, std::int64_t& size, std::int64_t out_size,
                         std::int64_t& kernel, std::int64_t& stride, std::int64_t& padding) {
        if (!folds) return {};
        const FoldedAxis axis = {stride, padding};
        kernel = divide_up(kernel, stride);
        size = out_size + kernel - 1;
        stride = 1, padding = 0;
        return axis;
    }
};

struct FoldedImage {
    FoldedAxis y, x;
    ConvShape shape;  // of the convolution that has the folded image

    FoldedImage(const ConvShape& s, bool folds_y, bool folds_x, Dtype dtype) : shape(s) {
        y = FoldedAxis::of(folds_y, shape.in_height, s.out_height, shape.kernel_h, shape.stride_h,
                           shape.padding_h);
        x = FoldedAxis::of(folds_x, shape.in_width, s.out_width, shape.kernel_w, shape.stride_w,
                           shape.padding_w);
        const std::int64_t piece = 16 / element_bytes(dtype);
        const std::int64_t channels = y.fold * x.fold * s.in_per_group();
        shape.in_channels = s.groups * (divide_up(channels, piece) * piece);
    }
    std::int64_t columns() const { return shape.in_per_group() * shape.taps(); }
};

// That with the fewest columns. Channels of whole pieces stay as they are.
inline FoldedImage folded_image(const ConvShape& s, Dtype dtype) {
    FoldedImage best(s, false, false, dtype);
    if (best.shape.in_channels == s.in_channels || s.groups != 1) return best;
    for (const bool folds_y : {false, true})
        for (const bool folds_x : {false, true}) {
            if ((folds_y && s.dilation_h != 1) || (folds_x && s.dilation_w != 1)) continue;
            const FoldedImage other(s, folds_y, folds_x, dtype);
            if (other.columns() < best.columns()) best = other;
        }
    return best;
}

// What the kernel needs of it, with the groups of an image that is not folded as pixels of a row.
struct FoldedPieces {
    std::int64_t count, pieces;  // in all; of a pixel
    std::int64_t from_height, from_width, height, width;
    std::int64_t channels;
    int fold_y, fold_x, padding_y, padding_x;

    FoldedPieces(const ConvShape& s, const FoldedImage& to, int elements)
        : pieces(to.shape.in_per_group() / elements),
          from_height(s.in_height),
          from_width(s.in_width * s.groups),
          height(to.shape.in_height),
          width(to.shape.in_width * s.groups),
          channels(s.in_per_group()),
          fold_y(static_cast<int>(to.y.fold)),
          fold_x(static_cast<int>(to.x.fold)),
          padding_y(static_cast<int>(to.y.padding)),
          padding_x(static_cast<int>(to.x.padding)) {
        count = s.batch * height * width * pieces;
    }
};

// A thread a piece.
template <typename T>
__global__ void __launch_bounds__(kTileThreads)
    fold_image_kernel(FoldedPieces p, const T* image, Pack<T>* folded) {
    const std::int64_t i = std::int64_t(blockIdx.x) * kTileThreads + threadIdx.x;
    if (i >= p.count) return;
    const std::int64_t pixel = i / p.pieces, line = pixel / p.width, n = line / p.height;
    const int first = static_cast<int>(i - pixel * p.pieces) * Pack<T>::size;
    const std::int64_t top = (line - n * p.height) * p.fold_y - p.padding_y;
    const std::int64_t left = (pixel - line * p.width) * p.fold_x - p.padding_x;
    const int channels = static_cast<int>(p.channels);
    Pack<T> piece = {};
#pragma unroll
    for (int e = 0; e < Pack<T>::size; ++e) {
        const int beside = (first + e) / channels, down = beside / p.fold_x;
        const std::int64_t y = top + down, x = left + beside - down * p.fold_x;
        if (down < p.fold_y && y >= 0 && y < p.from_height && x >= 0 && x < p.from_width)
            piece.value[e] = image[((n * p.from_height + y) * p.from_width + x) * channels + first +
                                   e - beside * channels];
    }
    folded[i] = piece;
}

template <typename T>
void fold_image(const ConvShape& s, const FoldedImage& to, Address image, Address folded,
                const Exec& exec) {
    const FoldedPieces p(s, to, Pack<T>::size);
    launch(fold_image_kernel<T>, gradient_grid(divide_up(p.count, kTileThreads)),
           dim3(kTileThreads), 0, exec, p, image.as<const T>(), folded.as<Pack<T>>());
}

}  // namespace zfcuda
