// The transposed convolution to few image channels (the colours): the product first, then
// additions. A gathering product has the image's channels as its columns, and three of them would
// leave most of a vector of 16 empty. Here the columns are all (channel, tap) pairs:
//
//   products[position][channel, tap] = sum over o of gate(signal)[position][o] * weight[o][channel,
//   tap] image[channel][position * stride - padding + tap * dilation] +=
//   products[position][channel, tap]
//
// A unit of work is a band of kBand image rows: it takes all map rows that reach the band (those at
// its edges are multiplied by both neighbours, a tenth more work for 7 x 7) and adds in order of
// position, so that every sum has one order, whatever the number of threads. The band is kept as
// planes in the cache and written once.
#pragma once

#include "convolution.h"

namespace zfcuda {

constexpr std::int64_t kBand = 64;

// Whether this way is the better one: columns that would waste half a vector, and several taps a
// phase, which fit one block of columns.
template <typename T>
bool scatters(const ConvShape& s) {
    return 2 * s.in_per_group() <= gemm::kVector<T> && s.taps() > s.stride_h * s.stride_w &&
           s.in_per_group() * s.taps() <= kPassColumns<T>;
}

// The product: a convolution of the maps with 1 x 1 filters, one for each (channel, tap).
template <typename T>
Pass<T> scatter_pass(const ConvShape& s, const T* weight) {
    const std::int64_t filter = s.in_per_group() * s.taps();
    return {{s.maps(), forward_axis(s.out_height, s.out_height, 1, 1, 0, 1),
             forward_axis(s.out_width, s.out_width, 1, 1, 0, 1), 0, s.out_per_group()},
            s.maps(),
            s.batch,
            s.groups,
            filter,
            weight,
            s.out_per_group() * filter,
            1,
            filter,
            1};
}

// Scratch of one thread: the product's, a row of products, the planes of a band.
template <typename T>
std::int64_t scatter_scratch(const ConvShape& s) {
    return pass_scratch<T>(s.in_per_group() * s.taps()) + kPassColumns<T> +
           s.in_per_group() * kBand * s.in_width;
}

// One band of one image and group, in planes.
template <typename T>
struct Band {
    const ConvShape& s;
    std::int64_t top, bottom;  // its rows of the image
    Sum<T>* planes;

    // Adds the products of the map position (y, x).
    void add(const Sum<T>* products, std::int64_t y, std::int64_t x) const {
        const std::int64_t from_y = y * s.stride_h - s.padding_h;
        const std::int64_t from_x = x * s.stride_w - s.padding_w;
        std::int64_t first = 0, last = s.kernel_w;  // taps inside the image
        while (first < last && from_x + first * s.dilation_w < 0) ++first;
        while (last > first && from_x + (last - 1) * s.dilation_w >= s.in_width) --last;
        for (std::int64_t c = 0; c < s.in_per_group(); ++c)
            for (std::int64_t i = 0; i < s.kernel_h; ++i) {
                const std::int64_t row = from_y + i * s.dilation_h;
                if (row < top || row >= bottom) continue;
                Sum<T>* line = planes + (c * kBand + row - top) * s.in_width + from_x;
                const Sum<T>* taps = products + (c * s.kernel_h + i) * s.kernel_w;
                if (s.dilation_w == 1)
                    for (std::int64_t j = first; j < last; ++j) line[j] += taps[j];
                else
                    for (std::int64_t j = first; j < last; ++j) line[j * s.dilation_w] += taps[j];
            }
    }

    void fill(const T* bias) const {
        for (std::int64_t c = 0; c < s.in_per_group(); ++c)
            std::fill_n(planes + c * kBand * s.in_width, kBand * s.in_width,
                        bias ? Sum<T>(bias[c]) : Sum<T>(0));
    }

    void store(T* image, std::int64_t n, std::int64_t first_channel) const {
        const Layout layout = s.image();
        for (std::int64_t c = 0; c < s.in_per_group(); ++c)
            for (std::int64_t y = top; y < bottom; ++y) {
                T* to = image + layout.offset(n, first_channel + c, y, 0);
                const Sum<T>* line = planes + (c * kBand + y - top) * s.in_width;
                for (std::int64_t x = 0; x < s.in_width; ++x) to[x * layout.step_x()] = T(line[x]);
            }
    }
};

// The rows [first, last) of the maps that reach the image rows [top, bottom).
struct Reach {
    std::int64_t first, last;

    Reach(const ConvShape& s, std::int64_t top, std::int64_t bottom) {
        const std::int64_t begin = top + s.padding_h - (s.kernel_h - 1) * s.dilation_h;
        first = gemm::divide_up(std::max<std::int64_t>(begin, 0), s.stride_h);
        last = std::min(s.out_height, (bottom - 1 + s.padding_h) / s.stride_h + 1);
    }
};

// Adds the products of positions [position, end) of `taps`, a block at a time; row 0 of the taps is
// row `first` of the maps.
template <typename T, typename Read>
void add_products(const Band<T>& band, const Pass<T>& pass, const Taps<Sum<T>>& taps,
                  const Read& source, const Sum<T>* packed, std::int64_t position, std::int64_t end,
                  std::int64_t first, Sum<T>* scratch) {
    const std::int64_t padded = gemm::padded_columns<T>(pass.columns);
    Sum<T>* const tiles = scratch + kPassRows * gemm::kRowStride;
    Sum<T>* const products = scratch + pass_scratch<T>(pass.columns);
    for (; position < end; position += kPassRows) {
        const std::int64_t rows = std::min(kPassRows, end - position);
        multiply_block(taps, source, position, rows, packed, padded, pass.columns, scratch, tiles);
        Cursor at(taps.rows, taps.columns, position);
        for (std::int64_t r = 0; r < rows; ++r, at.next()) {
            gemm::for_column_panels<T>(pass.columns, [&](std::int64_t j, std::int64_t width) {
                const Sum<T>* panel = tiles + gemm::tile_offset<T>(rows, r, j, width);
                std::copy_n(panel, width, products + j);
            });
            band.add(products, first + at.y, at.x);
        }
    }
}

// All products that reach a band.
template <typename T, typename Read>
void fill_band(const Band<T>& band, const Pass<T>& pass, const Read& source, const Sum<T>* packed,
               std::int64_t n, std::int64_t group, Sum<T>* scratch) {
    const Reach reach(band.s, band.top, band.bottom);
    const std::int64_t image = n * band.s.out_height, width = band.s.out_width;
    Taps<Sum<T>> taps = pass.taps;
    taps.first_channel += group * taps.channels;
    add_products(band, pass, taps, source,
                 packed + group * pass.depth() * gemm::padded_columns<T>(pass.columns),
                 (image + reach.first) * width, (image + reach.last) * width, 0, scratch);
}

// Runs the whole transposed convolution. `fill(band, n, group, own)` adds the products of a band;
// `own` is its thread's part of `scratch`, of `size`, which begins with scatter_scratch().
template <typename T, typename Fill>
void run_scatter(const ConvShape& s, const Pass<T>& pass, const T* bias, T* image, Sum<T>* packed,
                 Sum<T>* scratch, std::int64_t size, const Exec& exec, Fill&& fill) {
    pack_weight(pass, packed, exec);
    const std::int64_t bands = gemm::divide_up(s.in_height, kBand);
    const std::int64_t planes = s.in_per_group() * kBand * s.in_width;
    parallel_for_thread(s.batch * s.groups * bands, exec, [&](std::int64_t unit, int thread) {
        const std::int64_t top = unit % bands * kBand, group = unit / bands % s.groups;
        const std::int64_t n = unit / bands / s.groups, channel = group * s.in_per_group();
        Sum<T>* const own = scratch + thread * size;
        const Band<T> band{s, top, std::min(top + kBand, s.in_height),
                           own + scatter_scratch<T>(s) - planes};
        band.fill(bias ? bias + channel : nullptr);
        fill(band, n, group, own);
        band.store(image, n, channel);
    });
}

}  // namespace zfcuda
