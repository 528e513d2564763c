// One step down the deconvnet: unpool, gate, transposed convolution, in one pass.
//
//   maps = max_unpool2d(signal, switches)                                   (max_unpool2d.cpp)
//   image[n,i,y,x] = bias[i] + sum over o,ky,kx of weight[o,i,ky,kx] * gate(maps)[n,o,oy,ox]
//                    where oy*stride - padding + ky*dilation = y, likewise x
//
//   signal,   --unpool_rows.h-->  | rows of gate(maps), channels --product--> image rows
//   switches                      | innermost, in the cache   |               [top, bottom)
//
// A unit of work is a band of image rows. The rows of the maps that reach it are unpooled into a
// workspace of about kMapsBytes, once for all taps and phases, and multiplied from there: the maps,
// four times as large as the signal after a pool of stride 2, are neither written to memory nor
// read from it. Rows at the borders of a band are unpooled by both neighbours. The product and the
// order of its sums are those of deconv2d.cpp, but in narrow groups, and it takes the same two
// ways: by phases of the stride, or for few image channels the product first, then additions
// (scatter.h), a few rows at a time.
//
// Measured (ZFNet, batch 8, float32, Zen 4, AVX-512, one thread, processor time, medians, calls of
// both in turn, ours into buffers of the caller), torch 2.13's unpooling (the backward pass of its
// pool), relu_ and conv_transpose2d / ours:
//   channels_last  layer1 2.9  layer2 0.88  layer5 0.86    contiguous  2.6  0.91  0.90
// Layers 2 and 5 are their transposed convolutions: see deconv2d.cpp.
#include "scatter.h"
#include "unpool_rows.h"

namespace zfcuda {
namespace {

constexpr std::int64_t kMapsBytes = 384 * 1024;

// Element `i` of the workspace: the gate has acted already.
template <typename T>
using Rows = Source<Gate::none, Sum<T>>;

template <typename T>
struct Plan {
    const ConvShape& s;
    bool scattered;
    std::int64_t packed, line;       // elements of the packed weights, of a row of the maps
    std::int64_t band, bands, rows;  // image rows of a unit; units of an image; rows of the maps

    Plan(const ConvShape& shape, const Exec& exec)
        : s(shape),
          scattered(scatters<T>(shape)),
          packed(0),
          line(s.out_width * s.out_per_group()) {
        const std::int64_t fit =
            std::max<std::int64_t>(kMapsBytes / (line * std::int64_t(sizeof(Sum<T>))), 1);
        if (scattered) {
            packed = scatter_pass<T>(s, nullptr).packed_weight();
            rows = std::min(fit, s.out_height);
            return;
        }
        for_phases<T>(s, nullptr, [&](const Pass<T>& pass) { packed += pass.packed_weight(); });
        const std::int64_t halo = (s.kernel_h - 1) * s.dilation_h / s.stride_h + 1;
        const std::int64_t strides = gemm::divide_up(s.in_height, s.stride_h);
        const std::int64_t threads = max_threads(exec), units = s.batch * s.groups;
        std::int64_t wanted = gemm::divide_up(strides, std::max<std::int64_t>(fit - halo, 1));
        if (threads > 1) wanted = std::max(wanted, gemm::divide_up(4 * threads, units));
        band = gemm::divide_up(strides, std::min(wanted, strides)) * s.stride_h;
        bands = gemm::divide_up(s.in_height, band);
        rows = std::min(s.out_height, band / s.stride_h + halo);
    }
    std::int64_t product() const {
        return scattered ? scatter_scratch<T>(s) : pass_scratch<T>(s.in_per_group());
    }
    std::int64_t scratch() const { return product() + rows * line; }
    // The workspace as an image: of one group, channels innermost.
    Layout layout() const { return {s.out_per_group(), rows, s.out_width, true}; }
};

// Image rows [top, bottom) by phases; `packed` has the weights of all phases.
template <typename T>
void phases_of_band(const Plan<T>& plan, const Unpool<T>& unpool, const T* bias, T* image,
                    const Sum<T>* packed, std::int64_t n, std::int64_t group, std::int64_t top,
                    std::int64_t bottom, Sum<T>* scratch) {
    const ConvShape& s = plan.s;
    const Reach reach(s, top, bottom);
    Sum<T>* const maps = scratch + plan.product();
    unpool.rows(n, group * s.out_per_group(), s.out_per_group(), reach.first,
                std::max(reach.first, reach.last), maps);
    const Epilogue<T> epilogue{Gate::none, bias, nullptr, image + n * s.image().step_image()};
    const Rows<T> source{maps, nullptr};
    for_phases<T>(s, nullptr, [&](Pass<T> pass) {
        const auto* const own =
            packed + group * pass.depth() * gemm::padded_columns<T>(pass.columns);
        packed += pass.packed_weight();
        Axis& rows = pass.taps.rows;
        const std::int64_t skipped = top / s.stride_h;
        const std::int64_t end = (bottom - rows.dest_first + s.stride_h - 1) / s.stride_h;
        rows.count = std::max<std::int64_t>(0, std::min(rows.count, end) - skipped);
        rows.first += skipped * rows.step - reach.first;
        rows.dest_first += skipped * rows.dest_step;
        rows.source_size = reach.last - reach.first;
        pass.taps.layout = plan.layout();
        const std::int64_t positions = pass.taps.positions(1);
        for (std::int64_t position = 0; position < positions; position += kPassRows)
            for (std::int64_t column = 0; column < pass.columns; column += kPassColumns<T>)
                run_block(pass, pass.taps, source, epilogue, own, group, position, positions,
                          column, scratch);
    });
}

// Adds all products that reach a band of scatter.h, a few rows of the maps at a time.
template <typename T>
void scatter_band(const Plan<T>& plan, const Unpool<T>& unpool, const Band<T>& band,
                  const Pass<T>& pass, const Sum<T>* packed, std::int64_t n, std::int64_t group,
                  Sum<T>* scratch) {
    const ConvShape& s = plan.s;
    const Reach reach(s, band.top, band.bottom);
    Sum<T>* const maps = scratch + plan.product();
    Taps<Sum<T>> taps = pass.taps;
    taps.layout = plan.layout();
    packed += group * pass.depth() * gemm::padded_columns<T>(pass.columns);
    for (std::int64_t row = reach.first; row < reach.last; row += plan.rows) {
        const std::int64_t last = std::min(row + plan.rows, reach.last);
        unpool.rows(n, group * s.out_per_group(), s.out_per_group(), row, last, maps);
        add_products(band, pass, taps, Rows<T>{maps, nullptr}, packed, 0,
                     (last - row) * s.out_width, row, scratch);
    }
}

}  // namespace

std::int64_t unpool_relu_deconv2d_workspace(const ConvShape& s, const PoolShape&, Dtype dtype,
                                            const Exec& exec) {
    std::int64_t bytes = 0;
    with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        const Plan<T> plan(s, exec);
        bytes = kLine + sizeof(Sum<T>) * (plan.packed + plan.scratch() * max_threads(exec));
    });
    return bytes;
}

void unpool_relu_deconv2d(const ConvShape& s, const PoolShape& pool, Dtype dtype, Gate gate,
                          bool overwrite, Address signal, Address switches, Address forward,
                          Address weight, Address bias, Address image, Address workspace,
                          const Exec& exec) {
    with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        const Plan<T> plan(s, exec);
        const Unpool<T> unpool{pool,
                               gate,
                               overwrite,
                               signal.as<const T>(),
                               switches.as<const std::uint8_t>(),
                               forward.as<const T>()};
        const T *filters = weight.as<const T>(), *shift = bias.as<const T>();
        auto *const packed = aligned<Sum<T>>(workspace), *const scratch = packed + plan.packed;
        if (plan.scattered) {
            const Pass<T> pass = scatter_pass(s, filters);
            const auto fill = [&](const Band<T>& band, std::int64_t n, std::int64_t group,
                                  Sum<T>* own) {
                scatter_band(plan, unpool, band, pass, packed, n, group, own);
            };
            return run_scatter(s, pass, shift, image.as<T>(), packed, scratch, plan.scratch(), exec,
                               fill);
        }
        auto* next = packed;
        for_phases(s, filters, [&](const Pass<T>& pass) {
            pack_weight(pass, next, exec);
            next += pass.packed_weight();
        });
        const std::int64_t units = s.batch * s.groups * plan.bands;
        parallel_for_thread(units, exec, [&](std::int64_t unit, int thread) {
            const std::int64_t top = unit % plan.bands * plan.band, part = unit / plan.bands;
            phases_of_band(plan, unpool, shift, image.as<T>(), packed, part / s.groups,
                           part % s.groups, top, std::min(top + plan.band, s.in_height),
                           scratch + thread * plan.scratch());
        });
    });
}

}  // namespace zfcuda
