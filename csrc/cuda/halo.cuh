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

#include <algorithm>

#include "tap_block.cuh"

namespace zfcuda {

constexpr int kBlockPixels = 128;      // at most
constexpr int kMostPlanes = 4;         // of an axis: larger strides do without halos
constexpr int kUnread = kOutside - 1;  // the row of a slot that no tap reads

// The taps of a plane (or phase) along one axis: those from `first` on, tap_step apart. A slot at
// position y is the plane's position y + least, and tap t reads the slot of its pixel
// back + t * step positions further on.
struct HaloTaps {
    int count, first, least, back;

    HaloTaps() = default;
    __host__ __device__ HaloTaps(const PhaseTaps& taps, int step)
        : count(taps.count), first(taps.first) {
        back = step < 0 ? (count - 1) * -step : 0;
        least = taps.offset - back;
    }
};

// One dimension: tap_step and step as TapAxis has for phases, `span` positions at most from a
// plane's first tap to its last.
struct HaloAxis {
    int planes, tap_step, step, span;
    HaloTaps taps[kMostPlanes];  // of each plane of a convolution
};

// The least pitch for pixels in lines of this width.
inline std::int64_t halo_pitch(std::int64_t width, int span) {
    return width % 8 == 0 ? width + span : width + (span + 7) / 8 * 8;
}

struct HaloPlan {
    HaloAxis y, x;
    int pitch, slots;
    int chunks;  // of channels
    int part;    // what a thread brings of the next halo with each tap

    // For halos of so many rows, of lines of pixels of this width. Threads bring every 32nd slot,
    // in all steps of a chunk but the last, where there are several.
    void set(std::int64_t rows, std::int64_t width, int pieces) {
        pitch = static_cast<int>(halo_pitch(width, x.span));
        slots = static_cast<int>(rows) * pitch;
        chunks = (pieces + 3) / 4;
        const int steps = fewest(y) * fewest(x) - 1;
        const int items = (slots + 31) / 32;
        part = steps > 0 ? (items + steps - 1) / steps : items;
    }

  private:
    // The fewest taps of a plane that has any.
    static int fewest(const HaloAxis& axis) {
        int count = std::numeric_limits<int>::max();
        for (int i = 0; i < axis.planes; ++i)
            if (axis.taps[i].count > 0 && axis.taps[i].count < count) count = axis.taps[i].count;
        return count;
    }
};

// The taps of one plane of a convolution's source.
inline PhaseTaps plane_taps(const TapAxis& axis, int tap_step, int plane) {
    int first = 0;
    while (first < axis.kernel && (first * axis.dilation - axis.padding - plane) % axis.stride)
        ++first;
    return {(axis.kernel - first + tap_step - 1) / tap_step, first,
            (first * axis.dilation - axis.padding - plane) / axis.stride, axis.size};
}

template <bool kTransposed>
HaloAxis halo_axis(const TapAxis& axis) {
    const int divisor = static_cast<int>(greatest_divisor(axis.stride, axis.dilation));
    const int tap_step = axis.stride / divisor, step = axis.dilation / divisor;
    HaloAxis h = {kTransposed ? 1 : axis.stride,
                  tap_step,
                  kTransposed ? -step : step,
                  static_cast<int>(halo_span(axis.kernel, axis.stride, axis.dilation)),
                  {}};
    // Of the phases the one with the fewest taps stands for all.
    if (kTransposed) h.taps[0].count = axis.kernel / tap_step > 0 ? axis.kernel / tap_step : 1;
    for (int plane = 0; !kTransposed && plane < axis.stride && plane < kMostPlanes; ++plane)
        h.taps[plane] = HaloTaps(plane_taps(axis, tap_step, plane), step);
    return h;
}

// How many ends of lines lie at most among `pixels` that follow each other, the first of which is a
// multiple of `pixels`.
inline std::int64_t line_ends(std::int64_t length, std::int64_t pixels) {
    return (length - greatest_divisor(length, pixels) + pixels - 1) / length;
}

// Chooses strips and the pixels of a block: of those with size_of(strip, pixels) <= most the ones
// that compute least in vain, of these the ones of the least size.
template <typename SizeOf>
void choose_strips(TapPlan& p, std::int64_t most, SizeOf&& size_of) {
    const int width = (p.x.size + p.x.phases - 1) / p.x.phases;
    double best = 1e30;
    std::int64_t least = most;
    const auto consider = [&](int strips, int strip, int pixels) {
        const double cost = double(strips) * strip / pixels;
        const std::int64_t size = size_of(strip, pixels);
        if (size > most || cost > best || (cost == best && size >= least)) return;
        best = cost, least = size;
        p.strips = strips, p.strip = strip, p.block_pixels = pixels;
    };
    for (int pixels = kBlockPixels; pixels > 0 && double(width) / pixels < best; pixels -= 8)
        for (const int widest : {128, 64, 48, 32, 24, 16, 8}) {
            const int strips = (width + widest - 1) / widest;
            const int strip = (width + strips - 1) / strips;
            consider(strips, strip, pixels);
            consider(strips, (strip + 7) / 8 * 8, pixels);
        }
}

// The halo of blocks of strips, for a filter whose halos fit (tap_plan.cuh).
template <bool kTransposed>
HaloPlan halo_plan(TapPlan& p, int pieces) {
    HaloPlan h = {};
    h.y = halo_axis<kTransposed>(p.y), h.x = halo_axis<kTransposed>(p.x);
    const auto rows = [&](int strip, int pixels) {
        std::int64_t most = 0;
        for (const int height : {p.y.size / p.y.phases, (p.y.size + p.y.phases - 1) / p.y.phases}) {
            const std::int64_t strips = line_ends(std::int64_t(strip) * height, pixels);
            most = std::max(most, 1 + line_ends(strip, pixels) + (strips + 1) * h.y.span);
        }
        return most;
    };
    choose_strips(p, kHaloSlots, [&](int strip, int pixels) {
        return rows(strip, pixels) * halo_pitch(strip, h.x.span);
    });
    h.set(rows(p.strip, p.block_pixels), p.strip, pieces);
    return h;
}

// Whether halos serve a convolution better than reading its source for each tap does: planes meet
// four taps on the average, and chunks of channels are nearly full.
inline bool halo_pays(const TapPlan& p, int pieces) {
    const std::int64_t planes = std::int64_t(p.y.stride) * p.x.stride;
    return p.halo_fits && p.y.stride <= kMostPlanes && p.x.stride <= kMostPlanes &&
           std::int64_t(p.y.kernel) * p.x.kernel >= 4 * planes &&
           pieces * 5 >= (pieces + 3) / 4 * 16;
}

// The slot of a row of the block's tile, for the tap with the least position.
template <bool kTransposed>
__device__ int halo_slot(const TapBlock<kTransposed>& block, const HaloPlan& h, int row) {
    if (row >= block.pixels) return 0;
    const auto start = block.start();
    const int x = start.x + row, lines = x / block.strip, y = start.y + lines;
    return (lines + y / block.rows.pixels * h.y.span) * h.pitch + x % block.strip;
}

// What a slot reads when that position is 0.
template <bool kTransposed>
__device__ TapPixel halo_pixel(const TapBlock<kTransposed>& block, const TapPlan& p,
                               const HaloPlan& h, int slot) {
    const auto start = block.start();
    const int row = start.y + slot / h.pitch, column = slot % h.pitch;
    const int tall = block.rows.pixels + h.y.span;
    const std::int64_t strip = start.strip + row / tall, n = strip / block.strips;
    const int y = row % tall * p.y.pixel_step;
    const int x =
        (static_cast<int>(strip - n * block.strips) * block.strip + column) * p.x.pixel_step;
    const std::int64_t from = p.steps.offset(n, std::int64_t(block.group) * p.channels, y, x);
    return {from, column >= block.strip + h.x.span ? kUnread : n < p.batch ? y : kOutside, x};
}

}  // namespace zfcuda
