// A convolution as a list of taps: which positions of a source an output position reads, and how
// a row of them is packed for the matrix product. The forward convolution is one such list; the
// transposed convolution is one for each phase of its stride, with only the taps that meet it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "../ops.h"
#include "lanes.h"

namespace zfcuda {

// One dimension. Output position q, q < count, reads through tap t, t < taps, the source position
// q * step + first + t * tap_step, weighted by the kernel's position kernel_first + t *
// kernel_step; it is stored at dest_first + q * dest_step.
struct Axis {
    std::int64_t count, step, first;
    std::int64_t taps, tap_step, kernel_first, kernel_step;
    std::int64_t dest_first, dest_step;
    std::int64_t source_size;

    std::int64_t source(std::int64_t q) const { return q * step + first; }
    std::int64_t kernel(std::int64_t t) const { return kernel_first + t * kernel_step; }
    std::int64_t dest(std::int64_t q) const { return dest_first + q * dest_step; }

    // The taps [first, last) that read inside the source when tap 0 reads `start`.
    std::int64_t first_inside(std::int64_t start) const {
        return start >= 0 ? 0 : std::min(taps, (-start + tap_step - 1) / tap_step);
    }
    std::int64_t last_inside(std::int64_t start) const {
        const std::int64_t room = source_size - start;
        return room <= 0 ? 0 : std::min(taps, (room + tap_step - 1) / tap_step);
    }
};

// The axis of a convolution: output q reads q * stride - padding + t * dilation.
inline Axis forward_axis(std::int64_t in, std::int64_t out, std::int64_t kernel,
                         std::int64_t stride, std::int64_t padding, std::int64_t dilation) {
    return {out, stride, -padding, kernel, dilation, 0, 1, 0, 1, in};
}

// The axis of the positions phase, phase + stride, … of a transposed convolution: position y gets
// what map position o sent through tap i where o * stride - padding + i * dilation = y. The taps
// that divide so are gcd-spaced; they run backwards so that the positions read run forwards.
inline Axis transposed_axis(std::int64_t in, std::int64_t out, std::int64_t kernel,
                            std::int64_t stride, std::int64_t padding, std::int64_t dilation,
                            std::int64_t phase) {
    const std::int64_t common = std::gcd(stride, dilation), spacing = stride / common;
    const std::int64_t count = (in - phase + stride - 1) / stride;
    std::int64_t tap = 0;
    while (tap < kernel && (phase + padding - tap * dilation) % stride != 0) ++tap;
    const std::int64_t taps = tap < kernel ? (kernel - 1 - tap) / spacing + 1 : 0;
    const std::int64_t last = tap + (taps - 1) * spacing;
    const std::int64_t first = taps ? (phase + padding - last * dilation) / stride : 0;
    return {count, 1, first, taps, dilation / common, last, -spacing, phase, stride, out};
}

// signal behind a gate, widened; `forward` is read only by the gates that need it.
template <Gate gate, typename T>
struct Source {
    const T* signal;
    const T* forward;

    Sum<T> operator()(std::int64_t i) const {
        Sum<T> value = signal[i];
        if constexpr (gate == Gate::deconvnet || gate == Gate::guided)
            value = value <= 0 ? Sum<T>(0) : value;
        if constexpr (gate == Gate::backprop || gate == Gate::guided)
            value = forward[i] <= 0 ? Sum<T>(0) : value;
        return value;
    }

    // Neighbours, to dest.
    void run(std::int64_t first, std::int64_t count, Sum<T>* dest) const {
        if constexpr (gate == Gate::none && !std::is_same_v<T, Sum<T>>)
            widened(signal + first, count, dest);
        else
            for (std::int64_t i = 0; i < count; ++i) dest[i] = (*this)(first + i);
    }
};

// Calls body(Source) with the gate as a compile-time constant.
template <typename T, typename Body>
void with_source(Gate gate, Address signal, Address forward, Body&& body) {
    const T *s = signal.as<const T>(), *f = forward.as<const T>();
    switch (gate) {
        case Gate::none:
            return body(Source<Gate::none, T>{s, f});
        case Gate::deconvnet:
            return body(Source<Gate::deconvnet, T>{s, f});
        case Gate::backprop:
            return body(Source<Gate::backprop, T>{s, f});
        case Gate::guided:
            return body(Source<Gate::guided, T>{s, f});
    }
}

// Output positions (n, y, x) in order, without a division at each step.
struct Cursor {
    std::int64_t n, y, x;
    std::int64_t height, width;

    Cursor(const Axis& rows, const Axis& columns, std::int64_t position)
        : n(position / (rows.count * columns.count)),
          y(position / columns.count % rows.count),
          x(position % columns.count),
          height(rows.count),
          width(columns.count) {}
    void next() {
        if (++x < width) return;
        x = 0;
        if (++y < height) return;
        y = 0;
        ++n;
    }
};

// The values that an output position reads: element (ty * taps_x + tx) * channels + c of its row
// is source channel first_channel + c through tap (ty, tx), zero outside the source.
template <typename T>
struct Taps {
    Layout layout;
    Axis rows, columns;
    std::int64_t first_channel, channels;

    std::int64_t size() const { return rows.taps * columns.taps * channels; }
    std::int64_t positions(std::int64_t batch) const { return batch * rows.count * columns.count; }

    // Elements [from, to) of the row of one output position, to dest[0 … to - from).
    template <typename Read>
    void read_row(const Read& source, const Cursor& at, std::int64_t from, std::int64_t to,
                  T* dest) const {
        if (from == to) return;
        const std::int64_t line = columns.taps * channels;
        const std::int64_t top = rows.source(at.y), left = columns.source(at.x);
        const std::int64_t inside = columns.first_inside(left) * channels;
        const std::int64_t outside = std::max(inside, columns.last_inside(left) * channels);
        for (std::int64_t ty = from / line; ty * line < to; ++ty) {
            const std::int64_t y = top + ty * rows.tap_step;
            const bool valid = y >= 0 && y < rows.source_size;
            const std::int64_t begin = std::max<std::int64_t>(from - ty * line, 0);
            const std::int64_t end = std::min(to - ty * line, line);
            const std::int64_t first = std::min(end, std::max(begin, valid ? inside : end));
            const std::int64_t last = std::max(first, std::min(end, valid ? outside : end));
            T* out = dest + ty * line - from;
            std::fill(out + begin, out + first, T(0));
            if (first < last)
                read_line(source, layout.offset(at.n, first_channel, y, left), first, last, out);
            std::fill(out + last, out + end, T(0));
        }
    }

  private:
    // Elements [from, to) of one line of taps; element 0 lies at `base` of the source.
    template <typename Read>
    void read_line(const Read& source, std::int64_t base, std::int64_t from, std::int64_t to,
                   T* out) const {
        const std::int64_t step = columns.tap_step * layout.step_x();
        if (layout.channels_last && step == channels) {  // one run
            source.run(base + from, to - from, out + from);
            return;
        }
        for (std::int64_t tx = from / channels; tx * channels < to; ++tx) {
            const std::int64_t begin = std::max(from, tx * channels), start = tx * channels;
            const std::int64_t end = std::min(to, start + channels), pixel = base + tx * step;
            if (layout.channels_last)
                source.run(pixel + begin - start, end - begin, out + begin);
            else
                for (std::int64_t i = begin; i < end; ++i)
                    out[i] = source(pixel + (i - start) * layout.step_channel());
        }
    }
};

}  // namespace zfcuda
