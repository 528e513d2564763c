// A tensor from one layout to the other.
#pragma once

#include "port.cuh"

namespace zfcuda {

// Copies `batch` tensors of elements of 1, 2 or 4 bytes into the other layout. layouts.cu
void copy_layout(const Layout& from_layout, std::int64_t batch, std::int64_t bytes, Address from,
                 Address to, const Exec& exec);

// The address of image n.
inline Address image_at(const Layout& layout, std::int64_t bytes, Address tensor, std::int64_t n) {
    if (!tensor) return tensor;
    return {tensor.as<char>() + n * layout.step_image() * bytes};
}

}  // namespace zfcuda
