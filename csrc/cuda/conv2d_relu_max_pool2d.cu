// Convolution, bias, rectifier and max-pooling with switches in one pass.
//
//   output[n,o,oy,ox] = max over the window of max(maps, 0),  switches as in max_pool2d.cu
//   maps[n,o,y,x]     = bias[o] + sum over i,ky,kx of
//                       weight[o,i,ky,kx] * image[n,i, y*stride - padding + ky*dilation, ...]
//
//   a block: pooled tile     the box of the maps that       x kN channels, in shared memory
//            +-----+         its windows read: at most kM   after the product: the tiles of the
//            |     |  <----  +---------+ pixels, the rows   operands are free by then
//            +-----+         +---------+ of the product
//
// The product is tap_product.cuh's, with the pixels of the box as its rows, so that the sums are
// those of conv2d_relu.cu; then the maps go to shared memory, as many channels at a time as fit
// where the left operand lay, and each thread looks through windows of them. Boxes overlap by what
// windows share: for 3 x 3 of stride 2 the 25 windows of a block read 11 x 11 pixels, of which they
// own 10 x 10: 1.21 times the work of the convolution alone, for maps that are never in memory.
// The tile is the one with the fewest blocks. A window that is larger than kM pixels fits no block:
// then the maps of one image at a time go through the workspace.
// Least bytes: image + weights + output + one byte a switch.
// Measured: not yet, for want of a GPU; `make bench` on one fills this line.
#include "places.cuh"
#include "tap_gemm.cuh"

namespace zfcuda {
namespace {

// One dimension of the pool: `tile` windows a block, which read `box` positions of the maps.
struct PoolAxis {
    int size, count;  // positions, windows
    int kernel, stride, padding, dilation;
    int tile, box, tiles;

    PoolAxis(std::int64_t positions, std::int64_t windows, std::int64_t kernel_size,
             std::int64_t stride_size, std::int64_t padding_size, std::int64_t dilation_size)
        : size(static_cast<int>(positions)),
          count(static_cast<int>(windows)),
          kernel(static_cast<int>(kernel_size)),
          stride(static_cast<int>(stride_size)),
          padding(static_cast<int>(padding_size)),
          dilation(static_cast<int>(dilation_size)) {}

    std::int64_t box_of(std::int64_t windows) const {
        return (windows - 1) * stride + std::int64_t(kernel - 1) * dilation + 1;
    }
    void set(int windows) {
        tile = windows;
        box = static_cast<int>(box_of(windows));
        tiles = (count + tile - 1) / tile;
    }
};

struct PoolPlan {
    PoolAxis y, x;
    Divisor box_width, tile_width, windows;  // of a block
    Layout output;

    explicit PoolPlan(const PoolShape& s)
        : y(s.in_height, s.out_height, s.kernel_h, s.stride_h, s.padding_h, s.dilation_h),
          x(s.in_width, s.out_width, s.kernel_w, s.stride_w, s.padding_w, s.dilation_w),
          output(s.output()) {}

    // Chooses the tile whose box has at most `pixels`; false if there is none.
    bool choose(int pixels) {
        std::int64_t fewest = std::numeric_limits<std::int64_t>::max();
        int rows = 0, columns = 0;
        for (int tall = 1; tall <= y.count && y.box_of(tall) * x.box_of(1) <= pixels; ++tall) {
            int wide = 1;
            while (wide < x.count && y.box_of(tall) * x.box_of(wide + 1) <= pixels) ++wide;
            const std::int64_t blocks =
                std::int64_t((y.count + tall - 1) / tall) * ((x.count + wide - 1) / wide);
            if (blocks < fewest) fewest = blocks, rows = tall, columns = wide;
        }
        if (rows == 0) return false;
        y.set(rows), x.set(columns);
        box_width = Divisor(x.box), tile_width = Divisor(columns),
        windows = Divisor(rows * columns);
        return true;
    }
};

template <typename T, typename Tile, bool kChannelsLast, int kVector>
__global__ void __launch_bounds__(kTileThreads, kResidentBlocks<Sum<T>>)
    conv2d_relu_max_pool2d_kernel(TapPlan p, PoolPlan pool, TensorSource<T> source,
                                  const Sum<T>* packed, const T* bias, T* output,
                                  std::uint8_t* switches) {
    using V = Sum<T>;
    constexpr int kM = Tile::kM, kN = Tile::kN, kDepth = Tile::kDepth, kPack = Pack<V>::size;
    ZF_SHARED(Pack<V>, left_tiles, 2 * kDepth * kM / kPack);
    ZF_SHARED(Pack<V>, right_tiles, 2 * kDepth * kN / kPack);
    ZF_SHARED(TapPixel, pixels, kM);
    const int thread = threadIdx.x;

    unsigned block = blockIdx.x;
    const int first_column = static_cast<int>(block % p.column_tiles) * kN;
    block /= p.column_tiles;
    const int first_x = static_cast<int>(block % pool.x.tiles) * pool.x.tile;
    block /= pool.x.tiles;
    const int first_y = static_cast<int>(block % pool.y.tiles) * pool.y.tile;
    block /= pool.y.tiles;
    const int group = static_cast<int>(block % p.groups);
    const std::int64_t n = block / p.groups;
    const int top = first_y * pool.y.stride - pool.y.padding;
    const int left = first_x * pool.x.stride - pool.x.padding;
    const PhaseTaps rows = phase_taps<false>(p.y, 0), columns = phase_taps<false>(p.x, 0);

    if (thread < kM) {
        const int row = pool.box_width.divide(thread);
        const int y = top + row, x = left + thread - row * pool.x.box;
        const bool inside =
            row < pool.y.box && y >= 0 && y < pool.y.size && x >= 0 && x < pool.x.size;
        const int from_y = y * p.y.pixel_step + rows.offset;
        const int from_x = x * p.x.pixel_step + columns.offset;
        pixels[thread] = {p.steps.offset(n, std::int64_t(group) * p.channels, from_y, from_x),
                          inside ? from_y : kOutside, from_x};
    }
    __syncthreads();
    typename Tile::Accumulator sum = {};
    const TapTiles<V, Tile> tiles = {reinterpret_cast<V*>(left_tiles),
                                     reinterpret_cast<V*>(right_tiles), pixels};
    tap_product<V, Tile, false, kChannelsLast, kVector>(p, source, rows, columns, group,
                                                        first_column, packed, tiles, sum);

    const int own_column = Tile::column();
    const std::int64_t first_channel = std::int64_t(group) * p.columns + first_column;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        if (bias == nullptr || first_column + own_column + j >= p.columns) continue;
        const V shift = bias[first_channel + own_column + j];
#pragma unroll
        for (int i = 0; i < Tile::kRows; ++i) sum[i][j] += shift;
    }
    // Windows compare what the maps would hold, so that rounding makes the same ties.
#pragma unroll
    for (int i = 0; i < Tile::kRows; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] = static_cast<V>(static_cast<T>(sum[i][j]));

    // kPart channels at a time: channel c of pixel r of the box lies at r * kPart + c in NHWC, at
    // c * kM + r in NCHW, so that lanes write packs and then read neighbours.
    constexpr int kPart = 2 * kDepth < kN ? 2 * kDepth : kN;
    V* const maps = tiles.left;
    const int count = static_cast<int>(pool.windows.divisor);
    const Divisor inner = pool.windows;
    for (int part = 0; part < kN && first_column + part < p.columns; part += kPart) {
        const int column = own_column - part;
        if (column >= 0 && column < kPart) {
#pragma unroll
            for (int i = 0; i < Tile::kRows; i += kPack)
#pragma unroll
                for (int j = 0; j < 4; j += kPack)
#pragma unroll
                    for (int e = 0; e < kPack; ++e) {
                        Pack<V> pack;
#pragma unroll
                        for (int f = 0; f < kPack; ++f)
                            pack.value[f] = kChannelsLast ? sum[i + e][j + f] : sum[i + f][j + e];
                        const int at = kChannelsLast ? Tile::row(i + e) * kPart + column + j
                                                     : (column + j + e) * kM + Tile::row(i);
                        store_vector(maps + at, pack);
                    }
        }
        __syncthreads();
        for (int item = thread; item < count * kPart; item += kTileThreads) {
            const int outer = kChannelsLast ? item / kPart : inner.divide(item);
            const int rest = item - outer * (kChannelsLast ? kPart : count);
            const int window = kChannelsLast ? outer : rest, c = kChannelsLast ? rest : outer;
            const int row = pool.tile_width.divide(window);
            const int oy = first_y + row, ox = first_x + window - row * pool.x.tile;
            if (oy >= pool.y.count || ox >= pool.x.count || first_column + part + c >= p.columns)
                continue;
            V best = V(0);
            int where = -1;
            for (int i = 0; i < pool.y.kernel; ++i) {
                const int y = oy * pool.y.stride - pool.y.padding + i * pool.y.dilation;
                if (y < 0 || y >= pool.y.size) continue;
                for (int j = 0; j < pool.x.kernel; ++j) {
                    const int x = ox * pool.x.stride - pool.x.padding + j * pool.x.dilation;
                    if (x < 0 || x >= pool.x.size) continue;
                    const int pixel = (y - top) * pool.x.box + x - left;
                    const V value = maps[kChannelsLast ? pixel * kPart + c : c * kM + pixel];
                    const bool more = value > best || value != value;
                    if (more || where < 0) where = i * pool.x.kernel + j;
                    if (more) best = value;
                }
            }
            const std::int64_t to = pool.output.offset(n, first_channel + part + c, oy, ox);
            output[to] = static_cast<T>(best);
            switches[to] = static_cast<std::uint8_t>(where);
        }
        __syncthreads();
    }
}

// The largest box that any tile's product has as its rows, by dtype and columns.
int box_pixels(const ConvShape& s, Dtype dtype) {
    return dtype == Dtype::float64 ? 64 : narrow(s.out_per_group(), dtype) ? 256 : 128;
}

// For windows that fit no block: the maps of one image at a time, behind the packed weights.
void by_image(ConvShape s, PoolShape pool, Dtype dtype, Address image, Address weight, Address bias,
              Address output, Address switches, Address workspace, const Exec& exec) {
    const std::int64_t images = s.batch, bytes = element_bytes(dtype);
    const Address maps{workspace.as<char>() + packed_weights<false>(s, dtype)};
    s.batch = pool.batch = 1;
    for (std::int64_t n = 0; n < images; ++n) {
        const std::int64_t to = n * pool.output().step_image();
        const Address from{image.as<char>() + n * s.image().step_image() * bytes};
        conv2d(s, dtype, Gate::none, from, weight, bias, Address{}, maps, workspace, exec);
        max_pool2d(pool, dtype, true, maps, Address{output.as<char>() + to * bytes},
                   Address{switches.as<char>() + to}, exec);
    }
}

}  // namespace

std::int64_t conv2d_relu_max_pool2d_workspace(const ConvShape& s, const PoolShape& pool,
                                              Dtype dtype, const Exec&) {
    const std::int64_t packed = packed_weights<false>(s, dtype);
    if (PoolPlan(pool).choose(box_pixels(s, dtype))) return packed;
    return packed + s.maps().step_image() * element_bytes(dtype);
}

void conv2d_relu_max_pool2d(const ConvShape& s, const PoolShape& pool, Dtype dtype, Address image,
                            Address weight, Address bias, Address output, Address switches,
                            Address workspace, const Exec& exec) {
    PoolPlan plan(pool);
    if (!plan.choose(box_pixels(s, dtype)))
        return by_image(s, pool, dtype, image, weight, bias, output, switches, workspace, exec);
    pack_weights<false>(s, dtype, Way::fma, weight, workspace, exec);
    TapPlan p = tap_plan<false>(s, dtype, Way::fma, Gate::none);
    const bool channels_last = s.channels_last != 0;
    const bool vector = channels_last && p.channels % 4 == 0 && aligned(image);
    with_variant(p, dtype, channels_last, vector, [&](auto variant) {
        using Variant = decltype(variant);
        using T = typename Variant::T;
        using Tile = typename Variant::Tile;
        p.column_tiles = p.padded_columns / Tile::kN;
        const dim3 grid = tap_grid(std::int64_t(p.column_tiles) * plan.x.tiles * plan.y.tiles *
                                   p.groups * s.batch);
        launch(conv2d_relu_max_pool2d_kernel<T, Tile, Variant::kChannelsLast, Variant::kVector>,
               grid, dim3(kTileThreads), 0, exec, p, plan,
               TensorSource<T>{image.as<const T>(), nullptr}, workspace.as<const Sum<T>>(),
               bias.as<const T>(), output.as<T>(), switches.as<std::uint8_t>());
    });
}

}  // namespace zfcuda
