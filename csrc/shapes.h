// Shapes of the operators: sizes, output-size arithmetic and index arithmetic, shared by every
// backend. All fields are int64_t, in the order in which Python passes them, so that a shape is
// a plain tuple of integers on the other side of the binding.
//
// A dense activation is stored either as N,C,H,W ("contiguous") or as N,H,W,C ("channels_last");
// weights are always dense out,in/groups,kernel_h,kernel_w. Python checks and normalises every
// tensor before it arrives here (zfcuda/ops); the core only asserts.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define ZF_HD __host__ __device__ __forceinline__
#else
#define ZF_HD inline
#endif

namespace zfcuda {

// Element (n, c, y, x) of a dense activation.
struct Layout {
    std::int64_t channels, height, width;
    bool channels_last;

    ZF_HD std::int64_t offset(std::int64_t n, std::int64_t c, std::int64_t y,
                              std::int64_t x) const {
        return channels_last ? ((n * height + y) * width + x) * channels + c
                             : ((n * channels + c) * height + y) * width + x;
    }
    // Distance in elements between neighbours along one dimension.
    ZF_HD std::int64_t step_channel() const { return channels_last ? 1 : height * width; }
    ZF_HD std::int64_t step_x() const { return channels_last ? channels : 1; }
    ZF_HD std::int64_t step_y() const { return channels_last ? width * channels : width; }
    ZF_HD std::int64_t step_image() const { return channels * height * width; }
};

// A cross-correlation from an image (batch, in_channels, in_height, in_width) to maps
// (batch, out_channels, out_height, out_width). The transposed convolution uses the same shape
// the other way round: its signal has the size of the maps, its result the size of the image.
struct ConvShape {
    std::int64_t batch;
    std::int64_t in_channels, in_height, in_width;
    std::int64_t out_channels, out_height, out_width;
    std::int64_t kernel_h, kernel_w;
    std::int64_t stride_h, stride_w;
    std::int64_t padding_h, padding_w;
    std::int64_t dilation_h, dilation_w;
    std::int64_t groups;
    std::int64_t channels_last;  // 0 or 1; image and maps share it

    ZF_HD Layout image() const { return {in_channels, in_height, in_width, channels_last != 0}; }
    ZF_HD Layout maps() const { return {out_channels, out_height, out_width, channels_last != 0}; }
    ZF_HD std::int64_t in_per_group() const { return in_channels / groups; }
    ZF_HD std::int64_t out_per_group() const { return out_channels / groups; }
    ZF_HD std::int64_t taps() const { return kernel_h * kernel_w; }
};

// Max-pooling of (batch, channels, in_height, in_width) to (…, out_height, out_width).
// Window (oy, ox) covers rows oy*stride_h - padding_h + i*dilation_h, i < kernel_h, likewise
// columns, as far as they lie inside the input. A switch is i * kernel_w + j, one byte.
// Unpooling uses the same shape the other way round.
struct PoolShape {
    std::int64_t batch, channels;
    std::int64_t in_height, in_width;
    std::int64_t out_height, out_width;
    std::int64_t kernel_h, kernel_w;
    std::int64_t stride_h, stride_w;
    std::int64_t padding_h, padding_w;
    std::int64_t dilation_h, dilation_w;
    std::int64_t channels_last;  // 0 or 1; input, output and switches share it

    ZF_HD Layout input() const { return {channels, in_height, in_width, channels_last != 0}; }
    ZF_HD Layout output() const { return {channels, out_height, out_width, channels_last != 0}; }
    ZF_HD std::int64_t outputs() const { return batch * channels * out_height * out_width; }
    ZF_HD std::int64_t inputs() const { return batch * channels * in_height * in_width; }
    // Rows and columns of the input up to the end of the last window.
    ZF_HD std::int64_t covered_height() const {
        return end((out_height - 1) * stride_h - padding_h + (kernel_h - 1) * dilation_h,
                   in_height);
    }
    ZF_HD std::int64_t covered_width() const {
        return end((out_width - 1) * stride_w - padding_w + (kernel_w - 1) * dilation_w, in_width);
    }
    // Whether windows may leave out positions before that.
    ZF_HD bool gaps() const {
        return dilation_h > 1 || dilation_w > 1 || stride_h > kernel_h || stride_w > kernel_w;
    }

  private:
    ZF_HD static std::int64_t end(std::int64_t last, std::int64_t size) {
        return last < size ? last + 1 : size;
    }
};

// Normalisation across channels of (batch, channels, height, width). Channel c is divided by a
// function of channels c - size/2 … c + (size-1)/2 (torch's window), clipped to the tensor.
struct NormShape {
    std::int64_t batch, channels, height, width;
    std::int64_t size;
    std::int64_t channels_last;  // 0 or 1

    ZF_HD Layout layout() const { return {channels, height, width, channels_last != 0}; }
    ZF_HD std::int64_t elements() const { return batch * channels * height * width; }
};

// One step down for windows of a map: a batch of small transposed convolutions, perhaps through a
// pool first. All tensors are dense, n,height,width,channels. Nothing is padded here: padding only
// moves a window's origin (Python computes it), so a window of out_height rows of the maps reaches
// in_height = (out_height - 1) * stride_h + (kernel_h - 1) * dilation_h + 1 rows of the image
// below, and a window of pooled_height rows of the pool unpools to out_height rows in the same way.
struct WindowShape {
    std::int64_t windows;   // of this call
    std::int64_t expected;  // of all calls with one packed weight; the way to compute depends on it
    std::int64_t in_channels, in_height, in_width;     // of the result
    std::int64_t out_channels, out_height, out_width;  // of the maps
    std::int64_t kernel_h, kernel_w;
    std::int64_t stride_h, stride_w;
    std::int64_t dilation_h, dilation_w;
    std::int64_t groups;
    std::int64_t image_height, image_width;  // of the whole map that the results are windows of
    // The pool that the signal comes down through; all 0 where there is none.
    std::int64_t pooled_height, pooled_width;
    std::int64_t pool_kernel_h, pool_kernel_w;
    std::int64_t pool_stride_h, pool_stride_w;
    std::int64_t pool_dilation_h, pool_dilation_w;

    ZF_HD bool pooled() const { return pool_kernel_h != 0; }
    ZF_HD std::int64_t in_per_group() const { return in_channels / groups; }
    ZF_HD std::int64_t out_per_group() const { return out_channels / groups; }
    ZF_HD std::int64_t taps() const { return kernel_h * kernel_w; }
    // Bytes of one position's bits in `positive`.
    ZF_HD std::int64_t bit_bytes() const { return (out_channels + 7) / 8; }
};

// Windows cut from dense images of n,height,width positions of `bytes` bytes each.
struct CropShape {
    std::int64_t images, height, width, bytes;
    std::int64_t windows, window_height, window_width;
    std::int64_t fill;  // the byte outside the image
};

}  // namespace zfcuda
