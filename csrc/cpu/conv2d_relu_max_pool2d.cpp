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
// bits. With more threads than images, an image is cut into bands, whose neighbours compute the
// rows between them twice.
//
// Where the maxima of the maps are asked for, a row of windows offers its own while it is in the
// cache, and what no window covers of the map comes from the ring; the bands of an image meet at
// the end. To look first whether a row has a value as large as the best, without positions, lost:
// of random images most rows have, for one lane or another.
//
// Measured (ZFNet, batch 8, float32, Zen 4, AVX-512, one thread, processor time, medians, calls of
// both in turn, ours into buffers of the caller), torch 2.13's conv2d, relu_ and max_pool2d / ours:
//   channels_last  layer1 1.73  layer2 0.94  layer5 0.85    contiguous  3.5  1.14  0.96
// Layers 2 and 5 are their convolutions, whose pools are a hundredth of them: see conv2d_relu.cpp.
#include "convolution.h"
#include "pool_row.h"
#include "strongest.h"

namespace zfcuda {
namespace {

template <typename T>
struct Plan {
    const ConvShape& s;
    const PoolShape& pool;
    bool maximum;  // of the maps is wanted, too
    Pass<T> pass;
    std::int64_t widest, blocks;  // channels of a block; blocks of a group
    std::int64_t bands, extent, ring_rows;

    Plan(const ConvShape& shape, const PoolShape& pool_shape, bool with_maximum, const T* weight,
         const Exec& exec)
        : s(shape), pool(pool_shape), maximum(with_maximum), pass(forward_pass(shape, weight)) {
        widest = std::min(pass.columns, kPassColumns<T>);
        blocks = gemm::divide_up(pass.columns, kPassColumns<T>);
        const std::int64_t units = s.batch * s.groups * blocks, threads = max_threads(exec);
        const std::int64_t wanted = threads > 1 ? gemm::divide_up(4 * threads, units) : 1;
        bands = std::min(wanted, pool.out_height);
        extent = (pool.kernel_h - 1) * pool.dilation_h + 1;
        const std::int64_t rows = maximum ? extent + pool.stride_h - 1 : extent;  // see needed()
        ring_rows = std::min(s.out_height, rows + kPassRows / s.out_width + 2);
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
    // The first row of the maps that windows of row oy read; behind the last one all have been.
    std::int64_t begin(std::int64_t oy) const {
        if (oy == pool.out_height) return s.out_height;
        const std::int64_t row = oy * pool.stride_h - pool.padding_h;
        return std::clamp<std::int64_t>(row, 0, s.out_height);
    }
    // Rows of the maps before that of the last window in [0, oy] ends; for a maximum also those
    // before the next begin.
    std::int64_t needed(std::int64_t oy) const {
        const std::int64_t end = oy * pool.stride_h - pool.padding_h + extent;
        return std::max(std::min(s.out_height, end), maximum ? begin(oy + 1) : 0);
    }
    // The strongest of each image, band and channel.
    std::int64_t strongest() const { return maximum ? s.batch * bands * s.out_channels : 0; }
};

template <typename T>
constexpr std::int64_t kPassVectors = gemm::divide_up(kPassColumns<T>, Lanes<T>::count);

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

    void pool_one(std::int64_t oy, T* output, std::uint8_t* switches, Strongest<T>* best) const {
        const PoolShape& pool = plan.pool;
        const Layout out = pool.output();
        const auto ring_row = [&](std::int64_t y) { return row(y); };
        const std::int64_t at = out.offset(n, channel(), oy, 0);
        const bool last = out.channels_last;
        T* const to = last ? output + at : values;
        std::uint8_t* const where = last ? switches + at : bytes;
        const std::int64_t step = last ? out.channels : columns;
        pool_row(pool, oy, ring, ring_row, plan.pixel(), columns, least<T>(true), false, to, where,
                 step);
        if (plan.maximum) offer(oy, to, where, step, best);
        if (last) return;
        for (std::int64_t c = 0; c < columns; ++c)
            for (std::int64_t x = 0; x < out.width; ++x) {
                output[at + c * out.step_channel() + x] = values[x * columns + c];
                switches[at + c * out.step_channel() + x] = bytes[x * columns + c];
            }
    }

    // Offers row oy of windows, and what no window covers of the rows before the next.
    void offer(std::int64_t oy, const T* pooled, const std::uint8_t* where, std::int64_t step,
               Strongest<T>* best) const {
        const PoolShape& pool = plan.pool;
        const Offers<T> offers(pool);
        const std::int64_t height = pool.gaps() ? 0 : pool.covered_height();
        const std::int64_t width = pool.gaps() ? 0 : pool.covered_width();
        const auto each = [&](auto&& body) {  // body(best, channel, lanes)
            for (std::int64_t c = 0; c < columns; c += Lanes<T>::count)
                body(best[c / Lanes<T>::count], c,
                     std::min<std::int64_t>(Lanes<T>::count, columns - c));
        };
        for (std::int64_t x = 0; x < pool.out_width && !pool.gaps(); ++x)
            each([&](Strongest<T>& mine, std::int64_t c, std::int64_t lanes) {
                offers.pooled(mine, pooled + x * step + c, where + x * step + c,
                              offers.corner(oy, x), 0, lanes);
            });
        for (std::int64_t y = plan.begin(oy); y < plan.begin(oy + 1); ++y)
            for (std::int64_t x = y < height ? width : 0; x < pool.in_width; ++x)
                each([&](Strongest<T>& mine, std::int64_t c, std::int64_t lanes) {
                    offers.template map<true>(mine, ring + row(y) + x * plan.pixel() + c,
                                              y * pool.in_width + x, 0, lanes);
                });
    }

    template <typename Read>
    void run(const Read& source, const Sum<T>* packed, const T* bias, Sum<T>* a, T* output,
             std::uint8_t* switches, Strongest<T>* best) const {
        const Pass<T>& pass = plan.pass;
        const std::int64_t height = plan.s.out_height, width = plan.s.out_width;
        const std::int64_t padded = gemm::padded_columns<T>(pass.columns);
        const std::int64_t top = plan.begin(first);
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
            for (; oy < last && plan.needed(oy) <= complete; ++oy)
                pool_one(oy, output, switches, best);
        }
    }
};

// What bands have found of their maps: [image][band][channel].
template <typename T>
struct Found {
    std::int64_t* positions;
    Sum<T>* values;

    static std::int64_t bytes(const Plan<T>& plan) {
        return plan.strongest() * (sizeof(std::int64_t) + sizeof(Sum<T>));
    }
    Found(const Plan<T>& plan, char* room)
        : positions(reinterpret_cast<std::int64_t*>(room)),
          values(reinterpret_cast<Sum<T>*>(positions + plan.strongest())) {}

    void keep(const Strongest<T>* best, std::int64_t count, std::int64_t at) const {
        for (std::int64_t c = 0; c < count; ++c) {
            const Strongest<T>& mine = best[c / Lanes<T>::count];
            values[at + c] = mine.value[c % Lanes<T>::count];
            positions[at + c] = mine.position[c % Lanes<T>::count];
        }
    }
    // The bands of each map meet.
    void meet(const Plan<T>& plan, T* value, std::int64_t* position, const Exec& exec) const {
        const std::int64_t channels = plan.s.out_channels;
        parallel_for(plan.s.batch, exec, [&](std::int64_t n) {
            for (std::int64_t c = 0; c < channels; ++c) {
                const std::int64_t first = n * plan.bands * channels + c;
                std::int64_t best = first;
                for (std::int64_t i = first; i < first + plan.bands * channels; i += channels)
                    if (values[i] > values[best] ||
                        (values[i] == values[best] && positions[i] < positions[best]))
                        best = i;
                value[n * channels + c] = T(values[best]);
                position[n * channels + c] = positions[best];
            }
        });
    }
};

}  // namespace

std::int64_t conv2d_relu_max_pool2d_workspace(const ConvShape& s, const PoolShape& pool,
                                              Dtype dtype, bool maximum, const Exec& exec) {
    std::int64_t bytes = 0;
    with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        const Plan<T> plan(s, pool, maximum, nullptr, exec);
        bytes = kLine + sizeof(Sum<T>) * plan.pass.packed_weight() +
                plan.scratch() * max_threads(exec) + Found<T>::bytes(plan);
    });
    return bytes;
}

void conv2d_relu_max_pool2d(const ConvShape& s, const PoolShape& pool, Dtype dtype, Address image,
                            Address weight, Address bias, Address output, Address switches,
                            Address values, Address positions, Address workspace,
                            const Exec& exec) {
    with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        const Plan<T> plan(s, pool, bool(values), weight.as<const T>(), exec);
        auto* const packed = aligned<Sum<T>>(workspace);
        auto* const scratch = reinterpret_cast<char*>(packed + plan.pass.packed_weight());
        const Found<T> found(plan, scratch + plan.scratch() * max_threads(exec));
        pack_weight(plan.pass, packed, exec);
        const Source<Gate::none, T> source{image.as<const T>(), nullptr};
        const std::int64_t units = s.batch * s.groups * plan.blocks * plan.bands;
        parallel_for_thread(units, exec, [&](std::int64_t unit, int thread) {
            const std::int64_t band = unit % plan.bands, part = unit / plan.bands;
            const std::int64_t column = part % plan.blocks * kPassColumns<T>;
            auto* const a = reinterpret_cast<Sum<T>*>(scratch + thread * plan.scratch());
            auto* const tiles = a + kPassRows * gemm::kRowStride;
            auto* const ring = reinterpret_cast<T*>(a + pass_scratch<T>(plan.pass.columns));
            T* const line = ring + plan.ring();
            const PoolBand<T> work{plan,
                                   part / plan.blocks / s.groups,
                                   part / plan.blocks % s.groups,
                                   column,
                                   std::min(kPassColumns<T>, plan.pass.columns - column),
                                   band * pool.out_height / plan.bands,
                                   (band + 1) * pool.out_height / plan.bands,
                                   tiles,
                                   ring,
                                   line,
                                   reinterpret_cast<std::uint8_t*>(line + plan.line())};
            Strongest<T> best[kPassVectors<T>];
            work.run(source, packed, bias.as<const T>(), a, output.as<T>(),
                     switches.as<std::uint8_t>(), best);
            if (plan.maximum)
                found.keep(best, work.columns,
                           (work.n * plan.bands + band) * s.out_channels + work.channel());
        });
        if (plan.maximum) found.meet(plan, values.as<T>(), positions.as<std::int64_t>(), exec);
    });
}

std::int64_t conv2d_relu_max_pool2d_norm_workspace(const ConvShape& s, const PoolShape& pool,
                                                   Dtype dtype, bool pooled, const Exec& exec) {
    const std::int64_t bytes = conv2d_relu_max_pool2d_workspace(s, pool, dtype, false, exec);
    return pooled ? bytes : bytes + pool.outputs() * element_bytes(dtype);
}

// In two passes: the second one waits for its square roots, not for memory.
void conv2d_relu_max_pool2d_norm(const ConvShape& s, const PoolShape& pool, const NormShape& norm,
                                 Dtype dtype, double alpha, double beta, double k, Address image,
                                 Address weight, Address bias, Address pooled, Address output,
                                 Address switches, Address workspace, const Exec& exec) {
    if (!pooled) {
        pooled = workspace;
        workspace = {workspace.as<char>() + pool.outputs() * element_bytes(dtype)};
    }
    conv2d_relu_max_pool2d(s, pool, dtype, image, weight, bias, pooled, switches, {}, {}, workspace,
                           exec);
    local_response_norm(norm, dtype, alpha, beta, k, pooled, output, exec);
}

}  // namespace zfcuda
