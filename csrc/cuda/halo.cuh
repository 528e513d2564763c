// What a block of halo_mma.cuh reads, laid out so that a tap of the filter is one shift for all of
// the block's pixels.
//
// A block's pixels lie close to each other, so the places that they read under one tap are nearly
// those that they read under another. Together they are the block's halo: the rows of a strip, as
// many as the taps span above and below, and beside it
//
//            pitch                       3 x 3 taps: pixel (y, x) reads slot (y, x) + (i, j)
//   +--------------------+- -
//   |  strip  | span     |               its slot under the next tap is the next one, under the
//   |  +---------+       |               next row of taps the one a pitch further on
//   |  | pixels  |       |
//   +--------------------+- -            eight pixels that follow each other lie in slots that
//                                        are all different modulo 8, across the end of a line
//                                        too: pitch and strip have the same remainder
//
// The lines of all strips of all images stand in one column, each strip `span` rows taller than its
// pixels, and a block takes the next few pixels of that column, wherever one strip ends.
//
// Stride: the source is split into planes, one for each remainder of its rows and columns, in each
// of which the pixels stand side by side and meet every stride-th tap: a convolution with stride 2
// and 5 x 5 taps is a sum of four of stride 1, of 9 + 6 + 6 + 4 taps. The transposed one has phases
// of its result instead (tap_gemm.cuh), each with one plane.
#pragma once

#include "tap_block.cuh"

namespace zfcuda {

constexpr int kHaloPixels = 128;  // of a block at most
constexpr int kUnread = std::numeric_limits<int>::min();  // the row of a slot that no tap reads

// One dimension: tap_step and step as TapAxis has for phases, `span` positions at most from a
// plane's first tap to its last.
struct HaloAxis {
    int planes, tap_step, step, span;
};

// The least pitch for pixels in lines of this width.
inline std::int64_t halo_pitch(std::int64_t width, int span) {
    return width % 8 == 0 ? width + span : width + (span + 7) / 8 * 8;
}

struct HaloPlan {
    HaloAxis y, x;
    int pitch, slots;
    int chunks;  // of channels

    // For a block whose pixels are a box.
    void set(int height, int width, int pieces) {
        pitch = static_cast<int>(halo_pitch(width, x.span));
        slots = (height + y.span) * pitch;
        chunks = (pieces + 3) / 4;
    }
};

template <bool kTransposed>
HaloAxis halo_axis(const TapAxis& axis) {
    const int divisor = static_cast<int>(greatest_divisor(axis.stride, axis.dilation));
    const int step = axis.dilation / divisor;
    return {kTransposed ? 1 : axis.stride, axis.stride / divisor, kTransposed ? -step : step,
            static_cast<int>(halo_span(axis.kernel, axis.stride, axis.dilation))};
}

// How many ends of lines lie at most among `pixels` that follow each other, the first of which is a
// multiple of `pixels`.
inline std::int64_t line_ends(std::int64_t length, std::int64_t pixels) {
    return (length - greatest_divisor(length, pixels) + pixels - 1) / length;
}

// Chooses strips and the pixels of a block for a filter that fits: of those whose halo fits the
// ones that compute least in vain, of these the ones with the smallest halo.
template <bool kTransposed>
HaloPlan halo_plan(TapPlan& p, int pieces) {
    HaloPlan h = {halo_axis<kTransposed>(p.y), halo_axis<kTransposed>(p.x), 0, kHaloSlots + 1,
                  (pieces + 3) / 4};
    const int width = (p.x.size + p.x.phases - 1) / p.x.phases;
    const int heights[] = {p.y.size / p.y.phases, (p.y.size + p.y.phases - 1) / p.y.phases};
    double best = std::numeric_limits<double>::max();
    const auto consider = [&](int strips, int strip, int pixels) {
        const std::int64_t pitch = halo_pitch(strip, h.x.span);
        std::int64_t slots = 0;
        for (const int height : heights) {
            const std::int64_t ends = line_ends(std::int64_t(strip) * height, pixels);
            const std::int64_t rows = 1 + line_ends(strip, pixels) + (ends + 1) * h.y.span;
            if (rows * pitch > slots) slots = rows * pitch;
        }
        const double cost = double(strips) * strip / pixels;
        if (slots > kHaloSlots || cost > best || (cost == best && slots >= h.slots)) return;
        best = cost, p.strips = strips, p.strip = strip, p.block_pixels = pixels;
        h.pitch = static_cast<int>(pitch), h.slots = static_cast<int>(slots);
    };
    for (int pixels = kHaloPixels; pixels > 0 && double(width) / pixels < best; pixels -= 8)
        for (int strips = (width + kHaloPixels - 1) / kHaloPixels;; ++strips) {
            const int strip = (width + strips - 1) / strips;
            consider(strips, strip, pixels);
            consider(strips, (strip + 7) / 8 * 8, pixels);
            if (strip <= 8) break;
        }
    return h;
}

// Whether halos serve a convolution better than reading its source for each tap does: planes meet
// four taps on the average, and chunks of channels are nearly full.
inline bool halo_pays(const TapPlan& p, int pieces) {
    const std::int64_t planes = std::int64_t(p.y.stride) * p.x.stride;
    return p.halo_fits && std::int64_t(p.y.kernel) * p.x.kernel >= 4 * planes &&
           pieces * 5 >= (pieces + 3) / 4 * 16;
}

// The taps of one plane of a convolution's source: tap t of them is at t * step + offset in it.
__device__ inline PhaseTaps plane_taps(const TapAxis& axis, const HaloAxis& halo, int plane) {
    int first = 0;
    while (first < axis.kernel && (first * axis.dilation - axis.padding - plane) % axis.stride)
        ++first;
    return {(axis.kernel - first + halo.tap_step - 1) / halo.tap_step, first,
            (first * axis.dilation - axis.padding - plane) / axis.stride, axis.size};
}

// The distances of a plane's taps from the least one, and that one's position: tap t reads what a
// pixel's slot does `first + t * step` positions further on, a slot at position y the source's y +
// `least`, in the plane.
struct HaloTaps {
    int first, least;
};
__device__ inline HaloTaps halo_taps(const PhaseTaps& taps, const HaloAxis& halo) {
    const int back = halo.step < 0 ? (taps.count - 1) * -halo.step : 0;
    return {back, taps.offset - back};
}

// The slot of a row of the block's tile, for the tap with the least position.
template <bool kTransposed>
__device__ int halo_slot(const TapBlock<kTransposed>& block, const HaloPlan& h, int row) {
    if (row >= block.pixels) return 0;
    const std::int64_t line = block.first_pixel / block.strip;
    const int x = static_cast<int>(block.first_pixel - line * block.strip) + row;
    const int lines = x / block.strip;
    const int y = static_cast<int>(line % block.rows.pixels) + lines;
    return (lines + y / block.rows.pixels * h.y.span) * h.pitch + x % block.strip;
}

// What a slot reads when that position is 0.
template <bool kTransposed>
__device__ TapPixel halo_pixel(const TapBlock<kTransposed>& block, const TapPlan& p,
                               const HaloPlan& h, int slot) {
    const std::int64_t line = block.first_pixel / block.strip;
    const std::int64_t first = line / block.rows.pixels;  // strip of an image
    const int row = static_cast<int>(line - first * block.rows.pixels) + slot / h.pitch;
    const int column = slot % h.pitch, tall = block.rows.pixels + h.y.span;
    const std::int64_t strip = first + row / tall, n = strip / block.strips;
    const int y = row % tall * p.y.pixel_step;
    const int x = (static_cast<int>(strip - n * block.strips) * block.strip + column) *
                  p.x.pixel_step;
    const std::int64_t from = p.steps.offset(n, std::int64_t(block.group) * p.channels, y, x);
    return {from, column >= block.strip + h.x.span ? kUnread : n < p.batch ? y : kOutside, x};
}

}  // namespace zfcuda
