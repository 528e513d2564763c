// The gradient of both convolutions with respect to weights and bias.
//
//   grad_weight[o,i,ky,kx] = sum over n,y,x of gate(signal)[n,o,y,x] *
//                            image[n,i, y*stride - padding + ky*dilation, ...]
//   grad_bias[o]           = sum over n,y,x of gate(signal)[n,o,y,x]
//
//                         columns j = (i, tap) in NCHW, (tap, i) in NHWC
//                        +-----------+
//   k = pixels (n,y,x)   | image     |
//   of one split         | under tap |
//   +--------------------+-----------+
//   | signal             | gradient  |   rows o
//   +--------------------+-----------+
//
// Work: 2 * batch * out pixels * weights operations. The sum is as long as the batch has pixels
// while the result is small, so blocks share the pixels too: each split writes its own partial
// gradient into the workspace, and a second pass adds the splits in order (deterministic), puts
// what NHWC has as (o, tap, i) into the weight's order, and rounds. The number of splits depends on
// the shape and the GPU alone; the tiles of all splits are just under whole waves, if few. The gate
// acts while the signal is loaded. Where the signal is pooled, the maps are gathered in its place
// (unpooled_source.cuh), and never in memory.
//
//   product             for                                                         results a block
//   gradient_mma.cuh    NHWC with whole pieces of 16 bytes of output channels, on   128 x 128
//                       the tensor cores: halves, float32 in tf32 and tf32x3        64 x 64
//   gradient_fma.cuh    all else: NCHW, float64, ieee, other channels               64 x 64
//
// Measured: not yet, for want of a GPU; `make bench` on one fills this line.
#include "bias_gradient.cuh"
#include "edge.cuh"
#include "gradient_fma.cuh"
#include "gradient_mma.cuh"
#include "tap_mma.cuh"

namespace zfcuda {
namespace {

// Whether a product by FMA needs no second pass: one split that writes sums in the weight's order.
bool direct(const ConvShape& s, Dtype dtype, const Exec& exec) {
    return weight_splits(s, kFmaSide, exec).count == 1 &&
           element_bytes(dtype) == sum_bytes(dtype) && (!s.channels_last || s.taps() == 1);
}

// The workspace, in bytes, whichever way the product will run: the image, folded, if its channels
// are no whole pieces; partial gradients, which `bias` may follow.
struct Room {
    std::int64_t image = 0, partial = 0;

    Room(const ConvShape& s, Dtype dtype, const Exec& exec) {
        const auto add = [&](const ConvShape& shape, std::int64_t side) {
            const std::int64_t sums = weight_splits(shape, side, exec).count * weights(shape);
            if (sums * sum_bytes(dtype) > partial) partial = sums * sum_bytes(dtype);
        };
        if (!direct(s, dtype, exec)) add(s, kFmaSide);
        if (!gradient_pieces(s, dtype)) return;
        const ConvShape folded = folded_image(s, dtype).shape;
        add(folded, MediumGradientTile::kM);
        add(folded, WideMmaTile::kM);
        if (folded.in_channels != s.in_channels)
            image = s.batch * folded.image().step_image() * element_bytes(dtype);
    }
    std::int64_t bytes() const { return image + partial; }
};

template <typename T>
T* at_byte(Address workspace, std::int64_t byte) {
    return reinterpret_cast<T*>(workspace.as<unsigned char>() + byte);
}

template <typename T, bool kChannelsLast, int kVector, typename Source>
void by_fma(const ConvShape& s, Dtype dtype, const TapSteps& steps, Gate gate, Address image,
            const Source& source, Address grad_weight, Address workspace, const Exec& exec) {
    const GradientPlan p = gradient_plan(s, steps, gate, kFmaSide, exec);
    const bool once = direct(s, dtype, exec);
    auto* const partial =
        once ? grad_weight.as<Sum<T>>() : at_byte<Sum<T>>(workspace, Room(s, dtype, exec).image);
    launch(weight_gradient_kernel<T, kChannelsLast, kVector, Source>, p.grid(), dim3(kTileThreads),
           0, exec, p, image.as<const T>(), source, partial);
    if (once) return;
    const PartialOrder order = {s.out_channels, kChannelsLast ? s.taps() : 1,
                                kChannelsLast ? s.in_per_group() : p.columns};
    sum_splits<T>(order, partial, p.splits, grad_weight, exec);
}

// body(Tile{}) for the tile of a product on the tensor cores: the largest, unless that has over a
// third more padding, or split factors, whose registers would spill. (By the model the smaller one
// takes 1.6 times as long for as many results on an A100, twice as long on an H100, which its bytes
// from L2 hold up, and as long on an RTX 4090.)
template <typename Factors, typename Body>
void with_gradient_tile(const ConvShape& s, Body&& body) {
    if constexpr (!std::is_same_v<Factors, Tf32x3>)
        if (3 * gradient_tiles(s, WideMmaTile::kM) <= gradient_tiles(s, MediumGradientTile::kM))
            return body(WideMmaTile{});
    body(MediumGradientTile{});
}

template <typename Factors, typename Source>
void by_mma(const ConvShape& s, Dtype dtype, const TapSteps& steps, Gate gate, Address image,
            const Source& source, Address grad_weight, Address workspace, const Exec& exec) {
    using T = typename Factors::T;
    const FoldedImage folded = folded_image(s, dtype);
    const Room room(s, dtype, exec);
    if (room.image != 0) {
        fold_image<T>(s, folded, image, workspace, exec);
        image = workspace;
    }
    auto* const partial = at_byte<float>(workspace, room.image);
    with_gradient_tile<Factors>(folded.shape, [&](auto tile) {
        using Tile = decltype(tile);
        const GradientPlan p = gradient_plan(folded.shape, steps, gate, Tile::kM, exec);
        launch(weight_gradient_mma_kernel<Factors, Tile, Source>, p.grid(), dim3(Tile::kThreads),
               gradient_shared_bytes<T, Tile>, exec, p, image.as<const T>(), source, partial);
        sum_splits<T>(PartialOrder(s, folded), partial, p.splits, grad_weight, exec);
    });
}

// How the tensor cores multiply it; by FMA where they do not.
Way gradient_way(Dtype dtype, const Exec& exec) {
    return mma_way(dtype, exec.precision, architecture(&sum_splits_kernel<float>, exec));
}

// `source_of(T{})` is the signal; `others` are the addresses of what it reads.
template <typename SourceOf, typename... Addresses>
void weight_gradient(const ConvShape& s, Dtype dtype, const TapSteps& steps, Gate gate,
                     Address image, SourceOf&& source_of, Address grad_weight, Address workspace,
                     const Exec& exec, Addresses... others) {
    const bool copied = Room(s, dtype, exec).image != 0;
    if (gradient_pieces(s, dtype) && aligned(copied ? Address{} : image, others...)) {
        const Way way = gradient_way(dtype, exec);
        if (way != Way::fma)
            return with_factors(way, dtype, [&](auto factors) {
                using Factors = decltype(factors);
                const auto source = source_of(typename Factors::T{});
                by_mma<Factors>(s, dtype, steps, gate, image, source, grad_weight, workspace, exec);
            });
    }
    const bool four = s.channels_last && s.in_per_group() % 4 == 0 && s.out_per_group() % 4 == 0 &&
                      aligned(image, others...);
    with_vector(dtype, four, [&](auto zero, auto vector) {
        using T = decltype(zero);
        const auto source = source_of(zero);
        if (s.channels_last)
            return by_fma<T, true, vector()>(s, dtype, steps, gate, image, source, grad_weight,
                                             workspace, exec);
        if constexpr (vector() == 1)
            by_fma<T, false, 1>(s, dtype, steps, gate, image, source, grad_weight, workspace, exec);
    });
}

// Whether an NCHW gradient runs on copies in NHWC, of the whole batch: where the tensor cores
// multiply it, and FMA, 64 products a cycle and multiprocessor, would take longer than the copies.
template <std::size_t kCount>
bool pays_copies(const ConvShape& s, Dtype dtype, const Edges<kCount>& edges, const Exec& exec) {
    if (s.channels_last || !gradient_pieces(in_nhwc(s), dtype) ||
        gradient_way(dtype, exec) == Way::fma)
        return false;
    const std::int64_t products = s.batch * s.maps().step_image() * s.in_per_group() * s.taps();
    return products / (64 * processors(exec)) > copy_cycles(edges, s.batch, exec);
}

Edges<3> gradient_edges(const ConvShape& s, Dtype dtype, Address image = {}, Address signal = {},
                        Address forward = {}) {
    const std::int64_t bytes = element_bytes(dtype);
    return {Edge{s.image(), bytes, image}, Edge{s.maps(), bytes, signal},
            Edge{s.maps(), bytes, forward, Edge::Role::mask}};
}

// Of a pooled signal.
Edges<4> gradient_edges(const ConvShape& s, const PoolShape& pool, Dtype dtype, Address image = {},
                        Address signal = {}, Address switches = {}, Address forward = {}) {
    const std::int64_t bytes = element_bytes(dtype);
    return {Edge{s.image(), bytes, image}, Edge{pool.output(), bytes, signal},
            Edge{pool.output(), 1, switches},
            Edge{pool.output(), bytes, forward, Edge::Role::mask}};
}

}  // namespace

std::int64_t conv2d_weight_gradient_workspace(const ConvShape& s, Dtype dtype, const Exec& exec) {
    const Edges<3> edges = gradient_edges(s, dtype);
    if (pays_copies(s, dtype, edges, exec))
        return copied_bytes(edges, s.batch) +
               conv2d_weight_gradient_workspace(in_nhwc(s), dtype, exec);
    return Room(s, dtype, exec).bytes() +
           bias_splits(s, exec).count * s.out_channels * sum_bytes(dtype);
}

void conv2d_weight_gradient(const ConvShape& s, Dtype dtype, Gate gate, Address image,
                            Address signal, Address forward, Address grad_weight, Address grad_bias,
                            Address workspace, const Exec& exec) {
    const Edges<3> edges = gradient_edges(s, dtype, image, signal, forward);
    if (pays_copies(s, dtype, edges, exec))
        return on_copies(edges, 0, s.batch, workspace, exec, [&](const auto& copies, Address rest) {
            const auto [from, above, gated_by] = copies;
            conv2d_weight_gradient(in_nhwc(s), dtype, gate, from, above, gated_by, grad_weight,
                                   grad_bias, rest, exec);
        });
    const Address mask = mask_of(gate, forward);
    const Layout maps = s.maps();
    const TapSteps steps = {maps.step_image(), maps.step_channel(), maps.step_y(), maps.step_x()};
    const auto source = [&](auto zero) {
        using T = decltype(zero);
        return MaskedSource<T>{signal.as<const T>(), mask.as<const T>()};
    };
    weight_gradient(s, dtype, steps, gate, image, source, grad_weight, workspace, exec, signal,
                    mask);
    if (!grad_bias) return;
    with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        const auto bias = s.channels_last ? bias_gradient<T, true> : bias_gradient<T, false>;
        bias(s, (static_cast<int>(gate) & kRectify) != 0, signal, mask, grad_bias,
             at_byte<Sum<T>>(workspace, Room(s, dtype, exec).bytes()), exec);
    });
}

std::int64_t unpool_relu_weight_gradient_workspace(const ConvShape& s, const PoolShape& pool,
                                                   Dtype dtype, const Exec& exec) {
    const Edges<4> edges = gradient_edges(s, pool, dtype);
    if (pays_copies(s, dtype, edges, exec))
        return copied_bytes(edges, s.batch) + Room(in_nhwc(s), dtype, exec).bytes();
    return Room(s, dtype, exec).bytes();
}

void unpool_relu_weight_gradient(const ConvShape& s, const PoolShape& pool, Dtype dtype, Gate gate,
                                 bool overwrite, Address image, Address signal, Address switches,
                                 Address forward, Address grad_weight, Address workspace,
                                 const Exec& exec) {
    const Edges<4> edges = gradient_edges(s, pool, dtype, image, signal, switches, forward);
    if (pays_copies(s, dtype, edges, exec))
        return on_copies(edges, 0, s.batch, workspace, exec, [&](const auto& copies, Address rest) {
            const auto [from, above, where, gated_by] = copies;
            unpool_relu_weight_gradient(in_nhwc(s), in_nhwc(pool, s.batch), dtype, gate, overwrite,
                                        from, above, where, gated_by, grad_weight, rest, exec);
        });
    const auto source = [&](auto zero) {
        return UnpooledSource<decltype(zero)>(pool, gate, overwrite, signal, switches, forward);
    };
    weight_gradient(s, dtype, UnpooledSource<float>::steps(pool), gate, image, source, grad_weight,
                    workspace, exec, signal, switches, mask_of(gate, forward));
}

}  // namespace zfcuda
