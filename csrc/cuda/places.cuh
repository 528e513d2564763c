// Where a thread works in an operator that passes over its elements once in storage order.
//
//   NCHW   slab = image and channel, then y, x                 (inner == 1)
//   NHWC   slab = image, then y, x, then the channel pack      (inner == channels / kVector)
//
// so that one kernel serves both layouts, coalesced, with vectors of channels in NHWC. A block
// passes over kItems * kThreads neighbours. It divides with 64 bits once for its first element;
// each element then needs only 32-bit multiplications.
#pragma once

#include <limits>

#include "vector.cuh"

namespace zfcuda {

constexpr int kThreads = 256, kItems = 4;

// Division of 0 <= n < 2^31 by a constant, as a multiplication: with shift = ceil(log2(divisor)),
// n * ceil(2^(31 + shift) / divisor) / 2^(31 + shift) rounds down to the exact quotient.
struct Divisor {
    std::uint32_t divisor, factor;
    int shift;

    Divisor() = default;
    explicit Divisor(std::int64_t value) : divisor(static_cast<std::uint32_t>(value)), shift(31) {
        if (value < 1 || value > std::numeric_limits<int>::max())
            throw std::runtime_error("zfcuda: a side of a CUDA tensor is over 2^31");
        while ((std::int64_t(1) << (shift - 31)) < value) ++shift;
        factor = static_cast<std::uint32_t>(((std::uint64_t(1) << shift) + divisor - 1) / divisor);
    }
    ZF_HD int divide(int n) const {
        return static_cast<int>(std::uint64_t(static_cast<std::uint32_t>(n)) * factor >> shift);
    }
    ZF_HD int ceil_divide(int n) const { return divide(n + static_cast<int>(divisor) - 1); }
};

struct Place {
    std::int64_t slab;
    int y, x, inner;
};

// The places of a dense activation: their number and how to find one.
struct Places {
    std::int64_t count, slab_elements;  // elements, not packs
    std::int64_t row_elements;
    int column_elements, vector;
    Divisor inner, width, plane;

    Places(const Layout& l, std::int64_t batch, int vector_size)
        : slab_elements(l.channels_last ? l.step_image() : l.step_channel()),
          row_elements(l.step_y()),
          column_elements(static_cast<int>(l.step_x())),
          vector(vector_size),
          inner(l.channels_last ? l.channels / vector_size : 1),
          width(l.width),
          plane(l.height * l.width) {
        count = batch * l.step_image() / vector_size;
    }

    // Element `item` of this block's thread; `index` counts packs in storage order.
    ZF_HD Place find(std::int64_t first, int step) const {
        const std::int64_t first_pixel = first / inner.divisor;
        const int inner_step = static_cast<int>(first - first_pixel * inner.divisor) + step;
        const std::int64_t first_slab = first_pixel / plane.divisor;
        const int carry = inner.divide(inner_step);
        const int pixel_step = static_cast<int>(first_pixel - first_slab * plane.divisor) + carry;
        const int slab_step = plane.divide(pixel_step);
        const int pixel = pixel_step - slab_step * static_cast<int>(plane.divisor);
        const int y = width.divide(pixel);
        return {first_slab + slab_step, y, pixel - y * static_cast<int>(width.divisor),
                inner_step - carry * static_cast<int>(inner.divisor)};
    }
    // The first element of a pack in a tensor of this layout.
    ZF_HD std::int64_t offset(std::int64_t slab, int y, int x, int inner_index) const {
        return slab * slab_elements + y * row_elements + std::int64_t(x) * column_elements +
               inner_index * vector;
    }
    dim3 grid() const {
        const std::int64_t blocks = (count + kThreads * kItems - 1) / (kThreads * kItems);
        if (blocks > std::numeric_limits<int>::max())
            throw std::runtime_error("zfcuda: a CUDA tensor has over 2^41 elements");
        return dim3(static_cast<unsigned>(blocks));
    }
};

// body(index, place) for each place of this thread.
template <typename Body>
__device__ void for_each_place(const Places& places, Body&& body) {
    const std::int64_t first = std::int64_t(blockIdx.x) * (kThreads * kItems);
    for (int item = 0; item < kItems; ++item) {
        const int step = item * kThreads + static_cast<int>(threadIdx.x);
        if (first + step >= places.count) break;
        body(first + step, places.find(first, step));
    }
}

}  // namespace zfcuda
