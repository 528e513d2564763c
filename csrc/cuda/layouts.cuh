// NCHW at the edge: where a product takes less time in NHWC, by more than the copies of its tensors
// cost (tap_choice.cuh), it runs there on copies, some images at a time.
//
//   image NCHW --copy--> image NHWC --product--> maps NHWC --copy--> maps NCHW
//
// The copies lie at the beginning of the workspace, each at a multiple of 16 bytes, and behind them
// the workspace of the product itself.
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

// NHWC copies of parts of NCHW tensors, images `first` to `first` + `count`.
class Copies {
  public:
    Copies(std::int64_t first, std::int64_t count, Address workspace, const Exec& exec)
        : first_(first), count_(count), next_(workspace), exec_(exec) {}

    static std::int64_t size(const Layout& layout, std::int64_t count, std::int64_t bytes) {
        return (layout.step_image() * count * bytes + 15) / 16 * 16;
    }
    // Room for a result; none for what is not given.
    Address room(const Layout& layout, std::int64_t bytes, Address given) {
        if (!given) return given;
        const Address here = next_;
        next_.value = here.as<char>() + size(layout, count_, bytes);
        return here;
    }
    Address in(const Layout& layout, std::int64_t bytes, Address given) {
        const Address copy = room(layout, bytes, given);
        if (copy)
            copy_layout(layout, count_, bytes, image_at(layout, bytes, given, first_), copy, exec_);
        return copy;
    }
    // From the room of a result to where it belongs.
    void out(Layout layout, std::int64_t bytes, Address copy, Address given) const {
        if (!copy) return;
        const Address to = image_at(layout, bytes, given, first_);
        layout.channels_last = true;
        copy_layout(layout, count_, bytes, copy, to, exec_);
    }
    Address rest() const { return next_; }

  private:
    std::int64_t first_, count_;
    Address next_;
    const Exec& exec_;
};

}  // namespace zfcuda
