// Convolution and transposed convolution as one implicit product of matrices.
//
//   result[n, column, pixel] = sum over taps and channels of
//                              source[n, channel, q * pixel_step + offset(tap)] * weight[...]
//
//              columns (result channels of a group)
//             +-----------+
//   k = (tap, |  packed   |   packed weights [group][tap][channel][column], columns padded to kN
//   channel)  |  weights  |
//   +---------+-----------+
//   | source  |  result   |   rows: pixels q of all images, kM a block
//   +---------+-----------+
//
// Convolution: q is a pixel of the maps, pixel_step the stride, offset(t) = t * dilation - padding.
// Transposed: the image's pixels y = phase + q * stride of one phase of the stride are hit only by
// the taps with t * dilation = phase + padding (mod stride), every tap_step-th one, and tap t
// reads the maps at q + (phase + padding - t * dilation) / stride. Each phase is a convolution with
// its own few taps, a slice of the grid; results are gathered, with no zero work and no atomics. Of
// few channels, the phases are columns of one convolution (columns.cuh).
//
// Work: 2 * batch * pixels * taps * in_channels * out_channels / groups operations. A block reads
// its source tile once for each column tile, the taps' overlap coming from L1, and writes each
// result once. The main loop is tap_product.cuh, by FMA: float64, and float32 and halves where the
// tensor cores do not serve. These have three loops: from halos (halo_mma.cuh), from each tap
// (tap_mma.cuh), and from patches of images of few channels (patch_mma.cuh), which also float32 by
// FMA has (patch_fma.cuh). The weights are packed first (a transposition of at most megabytes) so
// that every block reads them as 16-byte packs.
//
//   results      a thread   FMA a shared load   for
//   128 x 128    16 x 8     21.3                float32, NHWC by four channels, many pixels
//   128 x 96     8 x 12     8.7                 float32, NHWC, few channels (patch_fma.cuh)
//   128 x 64     8 x 8      6.4                 likewise, maps that are not so many thirds
//   128 x 64     8 x 4      10.7                the others
//   256 x 16     4 x 4      8                   groups with few result channels
//   64 x 64      4 x 4      4                   float64
//
// Which of two tiles, and into how many splits k goes where there are few of them: tap_choice.cuh.
//
// Static: two blocks live on an SM: at most 128 registers for each of 256 threads in float32, or
// 255 for the 128 threads of 128 x 128, and at most 40 KiB of shared memory. Of 128 x 128 a chunk
// issues at most 2275 instructions, 2048 of them FFMA (90 %); entering another tap, once in C / 16
// chunks, about 110 more, with which they are 86 % of the loop's code. 128 x 64: 41 % in NCHW,
// whose every load has a tap of its own, and 67 % by four channels.
// Tried: 128 x 128 with 8 x 8 a thread (88 %, 79 % of the code: 64 shared loads for 1024 FFMA
// instead of 48), for two blocks an SM 8 deep (87 %, but it spills on sm_100 and 120) and 16 deep
// (89 %, but it spills on sm_120); 16 x 8 with an exclusive or in the places of k (88 to 90 %: each
// store has an address of its own). The transposed product keeps 128 x 64: its sources, which are
// gated or gathered, need registers of their own.
//
// Measured: not yet, for want of a GPU; `make bench` on one fills this line.
#pragma once

#include "halo_mma.cuh"
#include "patch_product.cuh"
#include "tap_product.cuh"

namespace zfcuda {

template <typename T, typename Tile, bool kTransposed, bool kChannelsLast, int kVector,
          typename Source>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kResident)
    tap_gemm_kernel(TapPlan p, Source source, const Sum<T>* packed, const T* bias, const T* forward,
                    void* result) {
    using V = Sum<T>;
    constexpr int kM = Tile::kM, kN = Tile::kN, kPack = Pack<V>::size;
    ZF_SHARED(Pack<V>, left_tiles, 2 * Tile::kLeftSize / kPack);
    ZF_SHARED(Pack<V>, right_tiles, 2 * Tile::kRightSize / kPack);
    ZF_SHARED(TapPixel, pixels, kM);
    using Target = TapTarget<kTransposed, Tile>;
    ZF_SHARED(Target, targets, kM);
    const TapTiles<V, Tile> tiles = {reinterpret_cast<V*>(left_tiles),
                                     reinterpret_cast<V*>(right_tiles), pixels};
    const int thread = threadIdx.x;

    const auto block = tap_block<kTransposed, kN>(p, blockIdx.x);
    if (block.first_pixel >= block.pixel_count) return;  // later phases have fewer pixels
    if (thread < kM) {
        pixels[thread] = block.pixel(p, thread);
        targets[thread] = block.target(p, thread);
    }
    __syncthreads();

    typename Tile::Accumulator sum = {};
    tap_product<V, Tile, kTransposed, kChannelsLast, kVector>(
        p, source, block.rows, block.columns, block.group, block.first_column, packed, tiles, sum);

    // Bias and gate; then quads of neighbours: pixels in NCHW, channels in NHWC.
    const auto to = tap_result<kTransposed>(p, forward, result);
#pragma unroll
    for (int q = 0; q < Tile::kColumns; q += 4) {
        const int column = block.first_column + Tile::column(q);
        if constexpr (kStacks<kTransposed, Tile>)
            if (p.stacked()) {
                store_phases<Tile::kRows, Tile::kDepth>(
                    p, to, bias, source, packed, column, targets,
                    [](int i) { return Tile::row(i); },
                    [&](int i, int e) { return sum[i][q + e]; });
                continue;
            }
        V shift[4];
        load_bias(p, block.group, bias, column, shift);
#pragma unroll
        for (int i = 0; i < Tile::kRows; i += 4)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                // Quad j: of pixels i…i+3 in channel j, or of all four channels in pixel i+j.
                V quad[4];
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    quad[e] =
                        kChannelsLast ? sum[i + j][q + e] + shift[e] : sum[i + e][q + j] + shift[j];
                if constexpr (kChannelsLast) {
                    to.store_channels(p, quad, targets[Tile::row(i + j)].offset, column);
                } else if (column + j < p.columns) {
                    const std::int64_t plane = (column + j) * p.result.step_channel();
                    if (p.quads) {
                        const std::int64_t target = targets[Tile::row(i)].offset;
                        if (target >= 0) to.store_quad(quad, target + plane);
                    } else {
#pragma unroll
                        for (int e = 0; e < 4; ++e) {
                            const std::int64_t target = targets[Tile::row(i + e)].offset;
                            if (target >= 0) to.store(quad[e], target + plane);
                        }
                    }
                }
            }
    }
}

// How a product runs, as a type: which tile, layout of the source and vector of its channels.
template <typename Element, typename BlockTile, bool kLast, int kChannels>
struct TapVariant {
    using T = Element;
    using Tile = BlockTile;
    static constexpr bool kChannelsLast = kLast;
    static constexpr int kVector = kChannels;
};

// body(TapVariant{}) for the best variant; `vector`: whether the source goes by four channels.
template <typename Body>
void with_variant(const TapPlan& p, Dtype dtype, bool channels_last, bool vector, Body&& body) {
    with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        const auto with_tile = [&](auto tile) {
            using BlockTile = decltype(tile);
            if constexpr (std::is_same_v<T, float>)  // halves that come here are few
                if (vector) return body(TapVariant<T, BlockTile, true, 4>{});
            if constexpr (sizeof(T) > 2)  // halves come in NHWC (edge.cuh)
                if (!channels_last) return body(TapVariant<T, BlockTile, false, 1>{});
            body(TapVariant<T, BlockTile, true, 1>{});
        };
        if constexpr (sizeof(T) == 8)
            with_tile(DoubleTile{});
        else if (narrow(p.columns, dtype))
            with_tile(NarrowTile{});
        else
            with_tile(PlainTile{});
    });
}

template <typename Variant, typename Tile, bool kTransposed, typename Source>
void launch_tile(TapPlan p, const Source& source, int splits, Address packed, Address bias,
                 Address forward, Address result, const Exec& exec) {
    using T = typename Variant::T;
    const dim3 grid = tap_grid(p, Tile::kM, Tile::kN, splits);
    if (grid.x == 0) return;
    constexpr bool kChannelsLast = Variant::kChannelsLast;
    const std::int64_t neighbours =
        kChannelsLast ? p.columns : std::int64_t(p.result.height) * p.result.width;
    const bool dense = kChannelsLast || p.y.phases * p.x.phases == 1;
    p.quads = dense && neighbours % 4 == 0 && aligned(result);
    launch(tap_gemm_kernel<T, Tile, kTransposed, kChannelsLast, Variant::kVector, Source>, grid,
           dim3(Tile::kThreads), 0, exec, p, source, packed.as<const Sum<T>>(), bias.as<const T>(),
           forward.as<const T>(), result.value);
}

template <typename Variant, bool kTransposed, typename Source>
void launch_tap_gemm(const TapPlan& plan, const Source& source, Address packed, Address partial,
                     Address bias, Address forward, Address result, const Exec& exec) {
    using T = typename Variant::T;
    constexpr bool kSquare = !kTransposed && std::is_same_v<T, float> && Variant::kVector == 4;
    const TapCut cut = tap_cut(plan, sizeof(T), kSquare, bool(partial), processors(exec));
    const auto product = [&](const TapPlan& p, Address bias, Address forward, Address result) {
        if constexpr (kSquare && Variant::Tile::kN == PlainTile::kN)
            if (cut.columns == SquareTile::kN)
                return launch_tile<Variant, SquareTile, kTransposed>(p, source, cut.splits, packed,
                                                                     bias, forward, result, exec);
        launch_tile<Variant, typename Variant::Tile, kTransposed>(p, source, cut.splits, packed,
                                                                  bias, forward, result, exec);
    };
    with_splits<T, kTransposed>(plan, cut.splits, partial, bias, forward, result, exec, product);
}

// `gate` acts on the source of the transposed convolution, on the result of the other; `packed` are
// the weights, by pack_weights in the same way; `partial` has room for the partial sums of splits,
// or is null: then there are none.
template <bool kTransposed>
void tap_gemm(const ConvShape& s, Dtype dtype, Way way, Gate gate, Address source, Address packed,
              Address partial, Address bias, Address forward, Address result, const Exec& exec) {
    const TapPlan p = tap_plan<kTransposed>(s, dtype, way, gate);
    const Address mask = mask_of(gate, forward);
    const auto tensor = [&](auto zero) {
        using T = decltype(zero);
        if constexpr (kTransposed)
            return MaskedSource<T>{source.as<const T>(), mask.as<const T>()};
        else
            return TensorSource<T>{source.as<const T>()};
    };
    if (way != Way::fma)
        return with_factors(way, dtype, [&](auto factors) {
            using Factors = decltype(factors);
            using T = typename Factors::T;
            const LoopPlan<kTransposed> plan(p, sizeof(T));
            if constexpr (!kTransposed) {
                if (plan.loop == MainLoop::patch)
                    return launch_patch<Factors>(plan, source, packed, partial, bias, mask, result,
                                                 exec);
                if (plan.loop == MainLoop::taps)
                    return launch_tap_mma<Factors>(plan.tap, source, packed, partial, bias, mask,
                                                   result, exec);
            }
            launch_halo_mma<Factors, kTransposed>(plan, tensor(T{}), packed, partial, bias, mask,
                                                  result, exec);
        });
    if constexpr (!kTransposed)
        if (p.run != 0)
            return launch_patch<Fma>(LoopPlan<false>(p, sizeof(float)), source, packed, partial,
                                     bias, mask, result, exec);
    const bool channels_last = s.channels_last != 0;
    const bool vector = channels_last && p.channels % 4 == 0 && aligned(source, forward);
    with_variant(p, dtype, channels_last, vector, [&](auto variant) {
        using Variant = decltype(variant);
        const auto from = tensor(typename Variant::T{});
        launch_tap_gemm<Variant, kTransposed>(p, from, packed, partial, bias, mask, result, exec);
    });
}

}  // namespace zfcuda
