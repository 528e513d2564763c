// Gate, then transposed convolution: the way down of a deconvnet, and the data gradient.
//
//   image[n,i,y,x] = bias[i] + sum over o,ky,kx of weight[o,i,ky,kx] * gate(signal)[n,o,oy,ox]
//                    where oy*stride - padding + ky*dilation = y, likewise x.
//
// The positions y = phase, phase + stride, … meet the same taps, so each of the stride_h * stride_w
// phases is a plain convolution of stride 1 that gathers: no products with inserted zeros, no
// scattered additions, one order of the sum.
//
// Few image channels (conv1's three colours) go another way, in scatter.h; narrow groups and
// contiguous signals of few channels theirs, in grouped.h and planes.h.
//
// Measured in one run, one pinned thread of an AVX-512 server, batch 8, medians of 10 interleaved
// calls, torch's conv_transpose2d / ours, both channels_last (then both contiguous):
//   conv1 3.21 (3.72)  conv2 0.89 (0.81)  conv3 0.89 (0.87)  conv4 0.84 (0.85)  conv5 0.91 (0.84)
// Tried and lost: conv1 by phases as well, three columns for a vector of 16 lanes: 0.79 (0.55).
#include "passes.h"
#include "scatter.h"

namespace zfcuda {
namespace {

// Whether the products go first. Not in narrow groups, nor behind a gate that reads the forward
// map, where every phase has a way of its own for few channels.
template <typename T>
bool product_first(const ConvShape& s, Gate gate) {
    const bool plain = gate == Gate::none || gate == Gate::deconvnet;
    bool general = s.groups == 1 && plain;
    for_phases<T>(s, nullptr, [&](const Pass<T>& pass) { general |= by_product(pass, !plain); });
    return general && scatters<T>(s);
}

}  // namespace

std::int64_t deconv2d_workspace(const ConvShape& s, Dtype dtype, const Exec& exec) {
    std::int64_t bytes = 0;
    with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        if (scatters<T>(s)) {  // with some gates
            const std::int64_t packed = scatter_pass<T>(s, nullptr).packed_weight();
            bytes = kLine + sizeof(Sum<T>) * (packed + scatter_scratch<T>(s) * max_threads(exec));
        }
        for_phases<T>(s, nullptr, [&](const Pass<T>& pass) {
            const std::int64_t most = std::max(room(pass, false, exec), room(pass, true, exec));
            bytes = std::max<std::int64_t>(bytes, kLine + sizeof(Sum<T>) * most);
        });
    });
    return bytes;
}

void deconv2d(const ConvShape& s, Dtype dtype, Gate gate, Address signal, Address forward,
              Address weight, Address bias, Address image, Address workspace, const Exec& exec) {
    with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        auto* scratch = aligned<Sum<T>>(workspace);
        if (product_first<T>(s, gate)) {
            const Pass<T> pass = scatter_pass(s, weight.as<const T>());
            auto* packed = scratch + scatter_scratch<T>(s) * max_threads(exec);
            with_source<T>(gate, signal, forward, [&](const auto& source) {
                const auto fill = [&](const Band<T>& band, std::int64_t n, std::int64_t group,
                                      Sum<T>* own) {
                    fill_band(band, pass, source, packed, n, group, own);
                };
                run_scatter(s, pass, bias.as<const T>(), image.as<T>(), packed, scratch,
                            scatter_scratch<T>(s), exec, fill);
            });
            return;
        }
        const Epilogue<T> epilogue{Gate::none, bias.as<const T>(), nullptr, image.as<T>()};
        with_source<T>(gate, signal, forward, [&](const auto& source) {
            for_phases(s, weight.as<const T>(),
                       [&](const Pass<T>& pass) { run(pass, source, epilogue, scratch, exec); });
        });
    });
}

}  // namespace zfcuda
