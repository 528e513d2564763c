// Convolutions that sum few terms, in contiguous memory: by planes, without packing an element more
// than once.
//
//   source --copied once--> | padded planes of a band of rows, |  b(k, q) = planes[offset(k) + q]
//   (few channels)          | split by the stride, in the cache|  q: positions of the band, rows of
//                           +----------------------------------+     `pitch`, run by run
//
// In contiguous memory the positions of a row lie side by side, so they take the vectors, and the
// output channels are broadcast: tile[channel][position] = sum over k of weight[channel][k] *
// planes[offset(k) + position]. A tap is a shift of the plane, which a stride would spread; hence
// the planes hold column x of the source at (phase x % stride, x / stride), rows likewise, and a
// shift is one number. What the vectors compute between the end of one row and the start of the
// next (kernel - 1 positions of each) is not stored. The general product (convolution.h) packs each
// element for every tap and stores a position's channels a plane apart.
//
// A sum is that of the general product, term by term and block by block.
//
// Floor of 3 -> 64 channels, 3 x 3: 27 multiply-adds and 4 bytes of stores a result, that is,
// memory's speed. A depthwise convolution does a multiply-add a load.
//
// Measured (float32, batch 8, Zen 5, AVX-512, one thread, processor time, medians of calls in
// turn), torch 2.13 / ours (and before), forward and by input: 3 -> 64 at 224 x 224 2.0 (.35), 4.5
// (.65); 64 -> 64 at 56 x 56 1.0 (.68), .97 (.22); depthwise 3 x 3 at 56 x 56 1.9 (.12), 1.1 (.10);
// groups of 4 at 56 x 56 2.0 (.22), 1.4 (.12). Lost: more than 128 channels forward (their planes
// leave the L1 cache, where packing pays for itself over many columns), and a single row by two
// vectors instead of four.
#pragma once

#include "convolution.h"

namespace zfcuda {

constexpr std::int64_t kPlaneBytes = 128 * 1024;
// Positions at a time of a single row: as many vectors as sums that do not wait for each other.
template <typename T>
constexpr std::int64_t kOneRow = 4 * gemm::kVector<T>;

// How one axis is split by its step.
struct Split {
    std::int64_t phases, reach;  // of a tap; positions that the last tap is ahead

    explicit Split(const Axis& axis)
        : phases(std::min(axis.step, (axis.taps - 1) * axis.tap_step + 1)),
          reach((axis.taps - 1) * axis.tap_step / axis.step) {}
    static std::int64_t phase(const Axis& axis, std::int64_t tap) {
        return tap * axis.tap_step % axis.step;
    }
    static std::int64_t ahead(const Axis& axis, std::int64_t tap) {
        return tap * axis.tap_step / axis.step;
    }
};

// The planes of a band of `band` rows of positions, for the channels of one group.
template <typename T>
struct Planes {
    const Taps<T>& taps;
    Split rows, columns;
    std::int64_t pitch, band, height, plane;  // plane: elements of a channel

    explicit Planes(const Taps<T>& t, std::int64_t bytes = kPlaneBytes)
        : taps(t), rows(t.rows), columns(t.columns) {
        pitch = t.columns.count + columns.reach;
        const std::int64_t line = t.channels * rows.phases * columns.phases * pitch;
        const std::int64_t fit = bytes / (line * std::int64_t(sizeof(T))) - rows.reach;
        band = std::min(t.rows.count, std::max(fit, rows.reach + 1));
        height = band + rows.reach;
        plane = rows.phases * columns.phases * height * pitch;
    }
    std::int64_t bands() const { return gemm::divide_up(taps.rows.count, band); }
    // The last vectors read past the end.
    std::int64_t elements() const { return taps.channels * plane + kOneRow<T>; }

    // Where each element of a row of taps lies, for position 0.
    void find_offsets(std::int64_t* offsets) const {
        for (std::int64_t ty = 0; ty < taps.rows.taps; ++ty)
            for (std::int64_t tx = 0; tx < taps.columns.taps; ++tx) {
                const std::int64_t phase =
                    Split::phase(taps.rows, ty) * columns.phases + Split::phase(taps.columns, tx);
                const std::int64_t first = (phase * height + Split::ahead(taps.rows, ty)) * pitch +
                                           Split::ahead(taps.columns, tx);
                for (std::int64_t c = 0; c < taps.channels; ++c) *offsets++ = c * plane + first;
            }
    }

    // Copies what the positions from row `top` on read of some channels, zero outside the source.
    template <typename Read>
    void fill(const Read& source, std::int64_t n, std::int64_t first_channel, std::int64_t channels,
              std::int64_t top, T* to) const {
        for (std::int64_t c = 0; c < channels; ++c)
            for (std::int64_t phase = 0; phase < rows.phases; ++phase)
                for (std::int64_t x = 0; x < columns.phases; ++x)
                    for (std::int64_t r = 0; r < height; ++r, to += pitch) {
                        const std::int64_t y = taps.rows.source(top + r) + phase;
                        if (y < 0 || y >= taps.rows.source_size)
                            std::fill_n(to, pitch, T(0));
                        else
                            fill_line(source, taps.layout.offset(n, first_channel + c, y, 0),
                                      taps.columns.first + x, to);
                    }
        std::fill_n(to, kOneRow<T>, T(0));
    }

  private:
    template <typename Read>
    void fill_line(const Read& source, std::int64_t base, std::int64_t first, T* to) const {
        const std::int64_t step = taps.columns.step, size = taps.columns.source_size;
        const auto reach = [&](std::int64_t x) {  // the positions whose column is less than x
            return std::clamp<std::int64_t>((x - first + step - 1) / step, 0, pitch);
        };
        const std::int64_t begin = first < 0 ? reach(0) : 0;
        const std::int64_t end = std::max(begin, first < size ? reach(size) : 0);
        std::fill(to, to + begin, T(0));
        if (step == 1)
            for (std::int64_t i = begin; i < end; ++i) to[i] = source(base + first + i);
        else
            for (std::int64_t i = begin; i < end; ++i) to[i] = source(base + first + i * step);
        std::fill(to + end, to + pitch, T(0));
    }
};

// Whether a pass goes this way: where packing a position for the general product would take longer
// than multiplying it with so few columns, or where it means to read a gate as well, and the planes
// of so many channels still fit the cache.
template <typename T>
bool by_planes(const Pass<T>& pass, bool gated) {
    const Taps<Sum<T>>& taps = pass.taps;
    if (!kWhole<T> || taps.layout.channels_last || taps.size() == 0) return false;
    if (Planes<Sum<T>>(taps).elements() * std::int64_t(sizeof(Sum<T>)) > 8 * kPlaneBytes)
        return false;
    return gated ? taps.channels <= 256 : taps.channels <= 128 && pass.columns <= 192;
}

// A single row is not padded to a panel's.
template <typename T>
std::int64_t plane_rows(const Pass<T>& pass) {
    return pass.columns == 1 ? 1 : gemm::padded_rows(pass.columns);
}

// Elements in front of the packed weight: the offsets.
template <typename T>
std::int64_t offsets_room(const Pass<T>& pass) {
    return gemm::round_up(pass.depth() * sizeof(std::int64_t), kLine) / sizeof(Sum<T>);
}

template <typename T, int rows, int vectors>
void plane_kernel(const T* a, const T* b, const std::int64_t* offsets, std::int64_t depth, T* tile,
                  bool accumulate) {
    typedef typename Wide<T, kVectorBytes>::Value Vector;
    Vector sum[rows][vectors] = {};
    for (std::int64_t k = 0; k < depth; ++k) {
        const Vector* positions = reinterpret_cast<const Vector*>(b + offsets[k]);
        Vector columns[vectors];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) columns[v] = positions[v];
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) sum[r][v] += a[k * rows + r] * columns[v];
    }
    Vector* result = reinterpret_cast<Vector*>(tile);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
            Vector& target = result[vectors * r + v];
            target = accumulate ? target + sum[r][v] : sum[r][v];
        }
}

// One band: all channels of one group of one image.
template <typename T>
struct PlaneBand {
    const Pass<T>& pass;
    const Planes<T>& planes;
    const Epilogue<T>& epilogue;
    const std::int64_t* offsets;
    std::int64_t n, group, top, rows;

    void run(const T* packed, const T* source) const {
        constexpr int step = gemm::kRowStep;
        if (pass.columns == 1) return panel<1, 4>(packed, source, 0);
        gemm::for_row_panels(pass.columns, [&](std::int64_t channel, std::int64_t height) {
            if (height == step) panel<step, 2>(packed, source, channel);
            if (height == 2 * step) panel<2 * step, 2>(packed, source, channel);
            if (height == 3 * step) panel<3 * step, 2>(packed, source, channel);
        });
    }

  private:
    // The channels from `channel` on, all positions.
    template <int height, int vectors>
    void panel(const T* packed, const T* source, std::int64_t channel) const {
        constexpr std::int64_t width = vectors * gemm::kVector<T>;
        const std::int64_t end = (rows - 1) * planes.pitch + pass.taps.columns.count;
        const std::int64_t depth = pass.depth(), padded = plane_rows(pass);
        const std::int64_t channels = std::min<std::int64_t>(height, pass.columns - channel);
        alignas(kVectorBytes) T tile[height * width];
        for (std::int64_t q = 0; q < end; q += width) {
            for (std::int64_t k = 0; k < depth; k += gemm::kDepth) {
                const std::int64_t length = std::min(gemm::kDepth, depth - k);
                plane_kernel<T, height, vectors>(packed + k * padded + channel * length, source + q,
                                                 offsets + k, length, tile, k > 0);
            }
            store(tile, width, channel, channels, q, std::min(end, q + width));
        }
    }

    // Positions [from, to) of the band, without those between its rows.
    void store(const T* tile, std::int64_t width, std::int64_t channel, std::int64_t channels,
               std::int64_t from, std::int64_t to) const {
        const Axis &down = pass.taps.rows, &across = pass.taps.columns;
        for (std::int64_t y = from / planes.pitch; y * planes.pitch < to; ++y) {
            const std::int64_t start = y * planes.pitch, first = std::max(from, start);
            const std::int64_t count = std::min(to, start + across.count) - first;
            const T* values = tile + first - from;
            for (std::int64_t r = 0; r < channels; ++r, values += width) {
                const std::int64_t c = group * pass.columns + channel + r;
                const std::int64_t offset =
                    pass.dest.offset(n, c, down.dest(top + y), across.dest(first - start));
                if (across.dest_step == 1)
                    for (std::int64_t i = 0; i < count; ++i) epilogue(offset + i, c, values[i]);
                else
                    for (std::int64_t i = 0; i < count; ++i)
                        epilogue(offset + i * across.dest_step, c, values[i]);
            }
        }
    }
};

// As run_pass, for by_planes(); `packed` has room for offsets_room() and the weight, `scratch` for
// Planes::elements() a thread.
template <typename T, typename Read>
void run_planes(const Pass<T>& pass, const Read& source, const Epilogue<T>& epilogue, T* packed,
                T* scratch, const Exec& exec) {
    const Planes<T> planes(pass.taps);
    auto* const offsets = reinterpret_cast<std::int64_t*>(packed);
    T* const weight = packed + offsets_room(pass);
    planes.find_offsets(offsets);
    if (pass.columns == 1)
        pack_weight(pass, weight, exec, 1, 1);
    else
        pack_weight(pass, weight, exec, gemm::kRows, gemm::kRowStep);
    const std::int64_t bands = planes.bands(), filter = pass.depth() * plane_rows(pass);
    parallel_for_thread(pass.batch * pass.groups * bands, exec, [&](std::int64_t unit, int thread) {
        const std::int64_t top = unit % bands * planes.band, group = unit / bands % pass.groups;
        const std::int64_t n = unit / bands / pass.groups;
        const std::int64_t rows = std::min(planes.band, pass.taps.rows.count - top);
        T* const own = scratch + thread * planes.elements();
        planes.fill(source, n, group * pass.taps.channels, pass.taps.channels, top, own);
        PlaneBand<T>{pass, planes, epilogue, offsets, n, group, top, rows}.run(
            weight + group * filter, own);
    });
}

}  // namespace zfcuda
