// Convolution, bias, rectifier and max-pooling with switches in one pass.
//
//   output[n,o,oy,ox] = max over the window of max(maps, 0),  switches as in max_pool2d.cu
//   maps[n,o,y,x]     = bias[o] + sum over i,ky,kx of
//                       weight[o,i,ky,kx] * image[n,i, y*stride - padding + ky*dilation, ...]
//
// The kernels, blocks of windows with the box of the maps that they read: pool_product.cuh.
// The tile is the one with the fewest blocks.
//
// Or the convolution by itself and then its pool, whichever costs less: pool_choice.cuh.
//
// Where the maxima of the maps are asked for, each block leaves those of its tile in the workspace,
// and a small kernel lets the tiles of a map meet: a value and a position for every 25 windows and
// channel. The alternative, one atomic maximum of 64 bits a map (value over inverted position), has
// no room for a double beside its position, and needs a kernel before this one that fills it and
// one after it that takes it apart. Pixels that no window covers belong to the map, too: blocks go
// on behind the last windows where there are such. Windows with gaps would leave some to no block
// at all: then, too, one after the other.
//
// Where a normalisation across channels follows, blocks that have all of them do it at once: a warp
// has the windows of whole pixels in registers, and a lane meets its neighbours by shuffles. So a
// pass over the pooled maps is saved: a batch of 128 of ZFNet's first layer reads 77 MB and writes
// 186, instead of reading 226 and writing 335; the pool by itself is written only if a gradient is
// to come. Other blocks (of some of the channels; of tap_product.cuh) leave it to
// local_response_norm.cu.
// Least bytes: image + weights + output + one byte a switch (+ a value and a position a map).
// Measured: not yet, for want of a GPU; `make bench` on one fills this line.
#include <algorithm>

#include "edge.cuh"
#include "pool_choice.cuh"
#include "pool_product.cuh"

namespace zfcuda {
namespace {

constexpr int kMetMaps = 32;  // of a block of the following

// The strongest of each map, from those of its tiles: lanes along channels, warps along tiles.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    conv2d_relu_max_pool2d_maximum_kernel(const Strongest<Sum<T>>* tiles, int count,
                                          std::int64_t channels, T* values,
                                          std::int64_t* positions) {
    ZF_SHARED(Strongest<Sum<T>>, met, kThreads);
    const std::int64_t blocks = (channels + kMetMaps - 1) / kMetMaps, n = blockIdx.x / blocks;
    const std::int64_t c = blockIdx.x % blocks * kMetMaps + threadIdx.x % kMetMaps;
    Strongest<Sum<T>> found;
    if (c < channels)
        for (int tile = threadIdx.x / kMetMaps; tile < count; tile += kThreads / kMetMaps)
            found.offer(tiles[(n * count + tile) * channels + c]);
    meet(found, met, kMetMaps, channels, n, c, values, positions);
}

// Where the results go: PoolResults of any type.
struct PoolAddresses {
    Address pooled, switches, strongest, normalized;
    std::int64_t size = 1;  // of the normalisation
    double alpha = 0, beta = 0, k = 1;

    template <typename T>
    PoolResults<T> of() const {
        return {pooled.as<T>(), switches.as<std::uint8_t>(), strongest.as<Strongest<Sum<T>>>(),
                normalized.as<T>(), WarpNorm<Sum<T>>(size, alpha, beta, k)};
    }
};

// The maxima of image n.
Address maxima_at(const PoolShape& pool, std::int64_t bytes, Address maxima, std::int64_t n) {
    if (!maxima) return maxima;
    return {maxima.as<char>() + n * pool.channels * bytes};
}

// What the convolution of some images at a time needs; the maps lie behind it.
std::int64_t convolution_workspace(const ConvShape& s, Dtype dtype, const Exec& exec) {
    return workspace_of_parts(
        s, exec, [&](const ConvShape& part) { return conv2d_workspace(part, dtype, exec); });
}

void one_after_the_other(const ConvShape& s, PoolShape pool, Dtype dtype, Address image,
                         Address weight, Address bias, const PoolAddresses& to, Address values,
                         Address positions, Address workspace, const Exec& exec) {
    const std::int64_t bytes = element_bytes(dtype);
    const Address maps{workspace.as<char>() + convolution_workspace(s, dtype, exec)};
    for_parts(s, exec, [&](const ConvShape& part, std::int64_t first) {
        pool.batch = part.batch;
        const Address from = image_at(s.image(), bytes, image, first);
        const Address pooled = image_at(pool.output(), bytes, to.pooled, first);
        const Address switches = image_at(pool.output(), 1, to.switches, first);
        conv2d(part, dtype, Gate::deconvnet, from, weight, bias, Address{}, maps, workspace, exec);
        max_pool2d(pool, dtype, true, maps, pooled, switches, exec);
        if (values)
            map_maximum(pool, dtype, maps, pooled, switches, maxima_at(pool, bytes, values, first),
                        maxima_at(pool, sizeof(std::int64_t), positions, first), exec);
    });
}

// The maxima of tiles, null where nobody asks, lie behind the packed weights.
Address tile_maxima(const ConvShape& s, Dtype dtype, Address values, Address workspace) {
    if (!values) return {};
    return {workspace.as<char>() + (packed_weights<false>(s, dtype) + 15) / 16 * 16};
}

// body(Factors{}) for a way whose kernels have a loop of pool_product.cuh.
template <typename Body>
void with_loop_factors(Way way, Dtype dtype, Body&& body) {
    way == Way::fma ? body(Fma{}) : with_factors(way, dtype, body);
}

void by_boxes(const ConvShape& s, const Boxes& boxes, Dtype dtype, Address image, Address weight,
              Address bias, const PoolAddresses& to, Address workspace, const Exec& exec) {
    const Way way = boxes.way;
    const PoolPlan& plan = boxes.plan;
    const LoopBoxes& by = boxes.by;
    pack_weights<false>(s, dtype, way, weight, workspace, exec);
    TapPlan p = tap_plan<false>(s, dtype, way, Gate::none);
    const auto grid = [&](int columns) {
        p.column_tiles = p.padded_columns / columns;
        return tap_grid(std::int64_t(p.column_tiles) * plan.x.tiles * plan.y.tiles * p.groups *
                        s.batch);
    };
    if (boxes.loops())
        return with_loop_factors(way, dtype, [&](auto factors) {
            using Factors = decltype(factors);
            using T = typename Factors::T;
            const T* const source = image.as<const T>();
            if (by.patches)
                return with_patch_tile<Factors>(p.padded_columns, [&](auto tile) {
                    using Tile = decltype(tile);
                    PatchPlan h = by.patch(plan.y.box, plan.x.box);
                    const dim3 tiles = grid(Tile::kN);
                    const auto [blocks, threads, bytes] =
                        team_grid<Factors, Tile>(p, h, tiles, TileMaps<T, Tile>::kBytes, exec);
                    launch(conv2d_relu_max_pool2d_patch_kernel<Factors, Tile>, blocks, threads,
                           bytes, exec, p, plan, h, source, workspace.as<const T>(),
                           bias.as<const T>(), to.of<T>());
                });
            if constexpr (!std::is_same_v<Factors, Fma>) {
                const auto run = [&](auto tile, const auto& loop) {
                    using Tile = decltype(tile);
                    using Loop = std::decay_t<decltype(loop)>;
                    const dim3 blocks = grid(Tile::kN);
                    launch(conv2d_relu_max_pool2d_loop_kernel<Factors, Tile, Loop>, blocks,
                           dim3(Tile::kThreads), std::max(loop.bytes(), TileMaps<T, Tile>::kBytes),
                           exec, p, plan, loop, workspace.as<const T>(), bias.as<const T>(),
                           to.of<T>());
                };
                const auto others = [&](auto tile) {
                    using Tile = decltype(tile);
                    if (by.halos) return run(tile, ByHalo<Factors, Tile>{source, by.halo});
                    run(tile, ByTaps<Factors, Tile>{source});
                };
                p.padded_columns == 16 ? others(NarrowMmaTile{}) : others(MediumMmaTile{});
            }
        });
    const bool channels_last = s.channels_last != 0;
    const bool vector = channels_last && p.channels % 4 == 0 && aligned(image);
    with_variant(p, dtype, channels_last, vector, [&](auto variant) {
        using Variant = decltype(variant);
        using T = typename Variant::T;
        using Tile = typename Variant::Tile;
        const dim3 blocks = grid(Tile::kN);
        launch(conv2d_relu_max_pool2d_kernel<T, Tile, Variant::kChannelsLast, Variant::kVector>,
               blocks, dim3(kTileThreads), 0, exec, p, plan, TensorSource<T>{image.as<const T>()},
               workspace.as<const Sum<T>>(), bias.as<const T>(), to.of<T>());
    });
}

// Bytes of a pool that the caller does not keep, which lies at the beginning of the workspace.
std::int64_t own_pool(const PoolShape& pool, Dtype dtype) {
    return (pool.outputs() * element_bytes(dtype) + 15) / 16 * 16;
}

Edges<3> pool_edges(const ConvShape& s, const PoolShape& pool, Dtype dtype, Address image = {},
                    Address output = {}, Address switches = {}) {
    const std::int64_t bytes = element_bytes(dtype);
    return {Edge{s.image(), bytes, image}, Edge{pool.output(), bytes, output, Edge::Role::result},
            Edge{pool.output(), 1, switches, Edge::Role::result}};
}

// With the pool itself, which not every caller keeps.
Edges<4> norm_edges(const ConvShape& s, const PoolShape& pool, Dtype dtype, Address image = {},
                    Address pooled = {}, Address output = {}, Address switches = {}) {
    const auto [from, to, where] = pool_edges(s, pool, dtype, image, output, switches);
    return {from, Edge{pool.output(), element_bytes(dtype), pooled, Edge::Role::kept}, to, where};
}

// Whether blocks have all channels of their pixels, as many as a warp sees, in shared memory at
// once.
bool normalizes(const ConvShape& s, const Boxes& boxes, std::int64_t size) {
    return boxes.pay && boxes.loops() && s.groups == 1 && size / 2 <= WarpNorm<float>::kReach &&
           boxes.by.p.padded_columns <= ThirdsMmaTile::kN;
}

}  // namespace

// For both ways of the convolution: the addresses decide which it takes.
std::int64_t conv2d_relu_max_pool2d_workspace(const ConvShape& s, const PoolShape& pool,
                                              Dtype dtype, bool maximum, const Exec& exec) {
    const Edges<3> edges = pool_edges(s, pool, dtype);
    if (by_copies<false>(s, dtype, edges, exec))
        return workspace_of_copies(s, edges, exec, [&](const ConvShape& part) {
            return conv2d_relu_max_pool2d_workspace(part, in_nhwc(pool, part.batch), dtype, maximum,
                                                    exec);
        });
    std::int64_t bytes = 0;
    for (const Way way : {Way::fma, tap_way<false>(s, dtype, exec)}) {
        const Boxes boxes(s, pool, dtype, maximum, way, exec);
        std::int64_t own = 0;
        if (!boxes.pay) {
            const std::int64_t maps = images_at_a_time(s, exec) * s.maps().step_image();
            own = convolution_workspace(s, dtype, exec) + maps * element_bytes(dtype);
        } else {
            own = packed_weights<false>(s, dtype);
            if (maximum)
                own += 15 + s.batch * boxes.plan.tiles() * s.out_channels * 2 * sum_bytes(dtype);
        }
        bytes = std::max(bytes, own);
    }
    return bytes;
}

void conv2d_relu_max_pool2d(const ConvShape& s, const PoolShape& pool, Dtype dtype, Address image,
                            Address weight, Address bias, Address output, Address switches,
                            Address values, Address positions, Address workspace,
                            const Exec& exec) {
    if (values && pool.in_height * pool.in_width > std::numeric_limits<int>::max())
        throw std::runtime_error("zfcuda: the maximum of a map of over 2^31 positions");
    const Edges<3> edges = pool_edges(s, pool, dtype, image, output, switches);
    if (by_copies<false>(s, dtype, edges, exec))
        return on_copies_of_parts(
            s, edges, workspace, exec,
            [&](const ConvShape& part, std::int64_t first, const auto& copies, Address rest) {
                const auto [from, to, where] = copies;
                conv2d_relu_max_pool2d(
                    part, in_nhwc(pool, part.batch), dtype, from, weight, bias, to, where,
                    maxima_at(pool, element_bytes(dtype), values, first),
                    maxima_at(pool, sizeof(std::int64_t), positions, first), rest, exec);
            });
    const Way way = tap_way<false>(s, dtype, exec, image);
    const Boxes boxes(s, pool, dtype, bool(values), way, exec);
    const PoolAddresses to = {output, switches, tile_maxima(s, dtype, values, workspace), {}};
    if (!boxes.pay)
        return one_after_the_other(s, pool, dtype, image, weight, bias, to, values, positions,
                                   workspace, exec);
    by_boxes(s, boxes, dtype, image, weight, bias, to, workspace, exec);
    if (!values) return;
    with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        launch(conv2d_relu_max_pool2d_maximum_kernel<T>,
               maps_grid(s.batch, s.out_channels, kMetMaps), dim3(kThreads), 0, exec,
               to.strongest.as<const Strongest<Sum<T>>>(), boxes.plan.tiles(), s.out_channels,
               values.as<T>(), positions.as<std::int64_t>());
    });
}

std::int64_t conv2d_relu_max_pool2d_norm_workspace(const ConvShape& s, const PoolShape& pool,
                                                   Dtype dtype, bool pooled, const Exec& exec) {
    const Edges<4> edges = norm_edges(s, pool, dtype);
    if (by_copies<false>(s, dtype, edges, exec))
        return workspace_of_copies(s, edges, exec, [&](const ConvShape& part) {
            return conv2d_relu_max_pool2d_norm_workspace(part, in_nhwc(pool, part.batch), dtype,
                                                         pooled, exec);
        });
    const std::int64_t bytes = conv2d_relu_max_pool2d_workspace(s, pool, dtype, false, exec);
    return pooled ? bytes : bytes + own_pool(pool, dtype);
}

void conv2d_relu_max_pool2d_norm(const ConvShape& s, const PoolShape& pool, const NormShape& norm,
                                 Dtype dtype, double alpha, double beta, double k, Address image,
                                 Address weight, Address bias, Address pooled, Address output,
                                 Address switches, Address workspace, const Exec& exec) {
    const Edges<4> edges = norm_edges(s, pool, dtype, image, pooled, output, switches);
    if (by_copies<false>(s, dtype, edges, exec))
        return on_copies_of_parts(
            s, edges, workspace, exec,
            [&](const ConvShape& part, std::int64_t, const auto& copies, Address rest) {
                const auto [from, between, to, where] = copies;
                NormShape normed = norm;
                normed.batch = part.batch, normed.channels_last = 1;
                conv2d_relu_max_pool2d_norm(part, in_nhwc(pool, part.batch), normed, dtype, alpha,
                                            beta, k, from, weight, bias, between, to, where, rest,
                                            exec);
            });
    const Boxes boxes(s, pool, dtype, false, tap_way<false>(s, dtype, exec, image), exec);
    if (normalizes(s, boxes, norm.size)) {
        const PoolAddresses to = {pooled, switches, {}, output, norm.size, alpha, beta, k};
        return by_boxes(s, boxes, dtype, image, weight, bias, to, workspace, exec);
    }
    if (!pooled) {
        pooled = workspace;
        workspace = {workspace.as<char>() + own_pool(pool, dtype)};
    }
    conv2d_relu_max_pool2d(s, pool, dtype, image, weight, bias, pooled, switches, {}, {}, workspace,
                           exec);
    local_response_norm(norm, dtype, alpha, beta, k, pooled, output, exec);
}

}  // namespace zfcuda
