// Convolution, bias, rectifier and max-pooling with switches in one pass.
//
//   output[n,o,oy,ox] = max over the window of max(maps, 0),  switches as in max_pool2d.cpp
//   maps[n,o,y,x]     = bias[o] + sum over i,ky,kx of weight[o,i,ky,kx] *
//                                   image[n, i, y*stride - padding + ky*dilation, …]
//
//   image --product--> | ring: the latest rows of the maps, pixels of    | --pool_row.h--> output
//     kPassRows         | a block of channels; row y lies at y % rows     | switches positions a
//     time  +--------------------------------------------------+
//
// The product runs over the positions of an image in order, in whole blocks that care for no row's
// end; whenever a row of windows has its last row of the maps, it is pooled. The rows that the next
// windows share stay in the ring, which has just enough for them and for the block to come, and
// lies in the cache: the maps are neither written to memory nor read from it. The sums are those of
// conv2d_relu.cpp, term by term, and rounded like them, so that values and switches are the same
// bits. With more threads
// than images, an image is cut into bands, whose neighbours compute the rows between them twice.
//
// Measured (ZFNet, batch 8, float32, Zen 4, AVX-512, one thread, processor time, medians, calls of
// both in turn, ours into buffers of the caller), torch 2.13's conv2d, relu_ and max_pool2d / ours:
//   channels_last  layer1 1.73  layer2 0.94  layer5 0.85    contiguous  3.5  1.14  0.96
// Layers 2 and 5 are their convolutions, whose pools are a hundredth of them: see conv2d_relu.cpp.
#include "convolution.h"
#include "pool_row.h"

namespace zfcuda {
namespace {

template <typename T>
struct Plan {
    const ConvShape& s;
    const PoolShape& pool;
    Pass<T> pass;
    std::int64_t widest, blocks;  // channels of a block; blocks of a group
    std::int64_t bands, extent, ring_rows;

    Plan(const ConvShape& shape, const PoolShape& pool_shape, const T* weight, const Exec& exec)
        : s(shape), pool(pool_shape), pass(forward_pass(shape, weight)) {
        widest = std::min(pass.columns, kPassColumns<T>);
        blocks = gemm::divide_up(pass.columns, kPassColumns<T>);
        const std::int64_t units = s.batch * s.groups * blocks, threads = max_threads(exec);
        const std::int64_t wanted = threads > 1 ? gemm::divide_up(4 * threads, units) : 1;
        bands = std::min(wanted, pool.out_height);
        extent = (pool.kernel_h - 1) * pool.dilation_h + 1;
        ring_rows = std::min(s.out_height, extent + kPassRows / s.out_width + 2);
    }
    // Elements from pixel to pixel of the ring: whole vectors.
    std::int64_t pixel() const { return gemm::padded_columns<T>(widest); }
    std::int64_t ring() const { return ring_rows * s.out_width * pixel(); }
    // A row of results before it is turned into planes.
    std::int64_t line() const { return s.channels_last ? 0 : pool.out_width * widest; }
    // Bytes of one thread: the product's, the ring, a row of results and one of switches.
    std::int64_t scratch() const {
        const std::int64_t product = pass_scratch<T>(pass.columns) * sizeof(Sum<T>);
        return gemm::round_up(product + (ring() + line()) * sizeof(T) + line(), kLine);
    }
    // Rows of the maps before that of the last window in [0, oy] ends.
    std::int64_t needed(std::int64_t oy) const {
        return std::min(s.out_height, oy * pool.stride_h - pool.padding_h + extent);
    }
};

// One band of pooled rows of one image, for one block of channels.
template <typename T>
struct PoolBand {
    const Plan<T>& plan;
    std::int64_t n, group, column, columns;  // the block: columns of the group from `column` on
    std::int64_t first, last;                // pooled rows
    Sum<T>* tiles;
    T *ring, *values;
    std::uint8_t* bytes;

    std::int64_t channel() const { return group * plan.pass.columns + column; }
    std::int64_t row(std::int64_t y) const {
        return y % plan.ring_rows * plan.s.out_width * plan.pixel();
    }

    // Adds the bias to a block of the product and stores it in the ring.
    void keep(std::int64_t position, std::int64_t rows, const Sum<T>* shift) const {
        gemm::for_column_panels<T>(columns, [&](std::int64_t j, std::int64_t width) {
            Cursor at(plan.pass.taps.rows, plan.pass.taps.columns, position);
            gemm::for_row_panels(rows, [&](std::int64_t i, std::int64_t height) {
                const Sum<T>* tile = tiles + gemm::tile_offset<T>(rows, i, j, width);
                for (std::int64_t r = 0; r < std::min(height, rows - i); ++r, at.next()) {
                    T* const to = ring + row(at.y) + at.x * plan.pixel() + j;
                    for (std::int64_t c = 0; c < width; ++c)
                        to[c] = T(tile[r * width + c] + shift[j + c]);
                }
            });
        });
    }

    void pool_one(std::int64_t oy, T* output, std::uint8_t* switches) const {
        const PoolShape& pool = plan.pool;
        const Layout out = pool.output();
        const auto ring_row = [&](std::int64_t y) { return row(y); };
        const std::int64_t at = out.offset(n, channel(), oy, 0);
        if (out.channels_last)
            return pool_row(pool, oy, ring, ring_row, plan.pixel(), columns, least<T>(true), false,
                            output + at, switches + at, out.channels);
        pool_row(pool, oy, ring, ring_row, plan.pixel(), columns, least<T>(true), false, values,
                 bytes, columns);
        for (std::int64_t c = 0; c < columns; ++c)
            for (std::int64_t x = 0; x < out.width; ++x) {
                output[at + c * out.step_channel() + x] = values[x * columns + c];
                switches[at + c * out.step_channel() + x] = bytes[x * columns + c];
            }
    }

    template <typename Read>
    void run(const Read& source, const Sum<T>* packed, const T* bias, Sum<T>* a, T* output,
             std::uint8_t* switches) const {
        const Pass<T>& pass = plan.pass;
        const std::int64_t height = plan.s.out_height, width = plan.s.out_width;
        const std::int64_t padded = gemm::padded_columns<T>(pass.columns);
        const std::int64_t top =
            std::max<std::int64_t>(0, first * plan.pool.stride_h - plan.pool.padding_h);
        const std::int64_t end = (n * height + plan.needed(last - 1)) * width;
        Sum<T> shift[kPassColumns<T>] = {};
        if (bias) std::copy_n(bias + channel(), columns, shift);
        Taps<Sum<T>> taps = pass.taps;
        taps.first_channel += group * taps.channels;
        std::int64_t oy = first;
        for (std::int64_t position = (n * height + top) * width; position < end;
             position += kPassRows) {
            const std::int64_t rows = std::min(kPassRows, end - position);
            multiply_block(taps, source, position, rows, packed + group * pass.depth() * padded,
                           padded, columns, a, tiles, column);
            keep(position, rows, shift);
            const std::int64_t complete = (position + rows) / width - n * height;
            for (; oy < last && plan.needed(oy) <= complete; ++oy) pool_one(oy, output, switches);
        }
    }
};

}  // namespace

std::int64_t conv2d_relu_max_pool2d_workspace(const ConvShape& s, const PoolShape& pool,
                                              Dtype dtype, const Exec& exec) {
    std::int64_t bytes = 0;
    with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        const Plan<T> plan(s, pool, nullptr, exec);
        bytes =
            kLine + sizeof(Sum<T>) * plan.pass.packed_weight() + plan.scratch() * max_threads(exec);
    });
    return bytes;
}

void conv2d_relu_max_pool2d(const ConvShape& s, const PoolShape& pool, Dtype dtype, Address image,
                            Address weight, Address bias, Address output, Address switches,
                            Address workspace, const Exec& exec) {
    with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        const Plan<T> plan(s, pool, weight.as<const T>(), exec);
        auto* const packed = aligned<Sum<T>>(workspace);
        auto* const scratch = reinterpret_cast<char*>(packed + plan.pass.packed_weight());
        pack_weight(plan.pass, packed, exec);
        const Source<Gate::none, T> source{image.as<const T>(), nullptr};
        const std::int64_t units = s.batch * s.groups * plan.blocks * plan.bands;
        parallel_for_thread(units, exec, [&](std::int64_t unit, int thread) {
            const std::int64_t band = unit % plan.bands, part = unit / plan.bands;
            const std::int64_t column = part % plan.blocks * kPassColumns<T>;
            auto* const a = reinterpret_cast<Sum<T>*>(scratch + thread * plan.scratch());
            auto* const tiles = a + kPassRows * gemm::kRowStride;
            auto* const ring = reinterpret_cast<T*>(a + pass_scratch<T>(plan.pass.columns));
            T* const values = ring + plan.ring();
            const PoolBand<T> work{plan,
                                   part / plan.blocks / s.groups,
                                   part / plan.blocks % s.groups,
                                   column,
                                   std::min(kPassColumns<T>, plan.pass.columns - column),
                                   band * pool.out_height / plan.bands,
                                   (band + 1) * pool.out_height / plan.bands,
                                   tiles,
                                   ring,
                                   values,
                                   reinterpret_cast<std::uint8_t*>(values + plan.line())};
            work.run(source, packed, bias.as<const T>(), a, output.as<T>(),
                     switches.as<std::uint8_t>());
        });
    });
}

}  // namespace zfcuda
