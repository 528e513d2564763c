// What a block of a fused convolution and pool does around the product: which windows are its own,
// which pixels of the maps they read, and how it looks through them.
// conv2d_relu_max_pool2d.cu has the sketch.
#pragma once

#include "halo.cuh"
#include "patch_mma.cuh"
#include "places.cuh"

namespace zfcuda {

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

    // Chooses the tile whose box has at most `pixels` and is right by fits(height, width); false if
    // there is none.
    template <typename Fits>
    bool choose(int pixels, Fits&& fits) {
        std::int64_t fewest = std::numeric_limits<std::int64_t>::max();
        int rows = 0, columns = 0;
        for (int tall = 1; tall <= y.count && y.box_of(tall) * x.box_of(1) <= pixels; ++tall)
            for (int wide = 1; wide <= x.count; ++wide) {
                const std::int64_t height = y.box_of(tall), width = x.box_of(wide);
                if (height * width > pixels) break;
                const std::int64_t blocks =
                    std::int64_t((y.count + tall - 1) / tall) * ((x.count + wide - 1) / wide);
                if (blocks < fewest && fits(height, width))
                    fewest = blocks, rows = tall, columns = wide;
            }
        if (rows == 0) return false;
        y.set(rows), x.set(columns);
        box_width = Divisor(x.box), tile_width = Divisor(columns),
        windows = Divisor(rows * columns);
        return true;
    }
    bool choose(int pixels) {
        return choose(pixels, [](std::int64_t, std::int64_t) { return true; });
    }
};

// A block: windows of one image, the box of pixels that they read, channels of one group.
struct PoolBlock {
    int first_column, group;
    int first_y, first_x;  // of its windows
    int top, left;         // of its box
    std::int64_t n;
    PhaseTaps rows, columns;

    // What a pixel of the box reads, row by row.
    __device__ TapPixel pixel(const TapPlan& p, const PoolPlan& pool, int number) const {
        const int row = pool.box_width.divide(number);
        const int y = top + row, x = left + number - row * pool.x.box;
        const bool inside =
            row < pool.y.box && y >= 0 && y < pool.y.size && x >= 0 && x < pool.x.size;
        const int from_y = y * p.y.pixel_step + rows.offset;
        const int from_x = x * p.x.pixel_step + columns.offset;
        return {p.steps.offset(n, std::int64_t(group) * p.channels, from_y, from_x),
                inside ? from_y : kOutside, from_x};
    }

    // The slot of a pixel of the box in its halo, and what a slot reads: see halo.cuh.
    __device__ int halo_slot(const PoolPlan& pool, const HaloPlan& h, int number) const {
        const int row = pool.box_width.divide(number);
        return row < pool.y.box ? row * h.pitch + number - row * pool.x.box : 0;
    }
    __device__ TapPixel halo_pixel(const TapPlan& p, const PoolPlan& pool, const HaloPlan& h,
                                   int slot) const {
        const int row = slot / h.pitch, column = slot - row * h.pitch;
        const int y = (top + row) * p.y.pixel_step, x = (left + column) * p.x.pixel_step;
        return {p.steps.offset(n, std::int64_t(group) * p.channels, y, x),
                column < pool.x.box + h.x.span ? y : kUnread, x};
    }

    // The element where a pixel's runs begin in its patch, and where a row of the patch begins: see
    // patch_mma.cuh.
    __device__ int patch_base(const TapPlan& p, const PoolPlan& pool, const PatchPlan& h,
                              int number) const {
        const int row = pool.box_width.divide(number);
        if (row >= pool.y.box) return 0;
        const int column = number - row * pool.x.box;
        return row * p.y.stride * h.pitch + column * p.x.stride * p.pixel;
    }
    __device__ TapPixel patch_row(const TapPlan& p, int row) const {
        const int y = top * p.y.stride - p.y.padding + row;
        const int x = left * p.x.stride - p.x.padding;
        return {p.steps.offset(n, 0, y, x), y, x};
    }

    // The maximum of each window and its switch, for kPart channels from `part` of the block on,
    // of maps that lie in shared memory: channel c of pixel r at at(r, c). Lanes run along
    // channels in NHWC, along windows in NCHW.
    template <typename T, int kPart, int kThreads, bool kChannelsLast, typename At>
    __device__ void look_through(const TapPlan& p, const PoolPlan& pool, int part,
                                 const Sum<T>* maps, At&& at, T* output,
                                 std::uint8_t* switches) const {
        using V = Sum<T>;
        const int count = static_cast<int>(pool.windows.divisor);
        const std::int64_t first_channel = std::int64_t(group) * p.columns + first_column + part;
        for (int item = threadIdx.x; item < count * kPart; item += kThreads) {
            const int outer = kChannelsLast ? item / kPart : pool.windows.divide(item);
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
                    const V value = maps[at((y - top) * pool.x.box + x - left, c)];
                    const bool more = value > best || value != value;
                    if (more || where < 0) where = i * pool.x.kernel + j;
                    if (more) best = value;
                }
            }
            const std::int64_t to = pool.output.offset(n, first_channel + c, oy, ox);
            output[to] = static_cast<T>(best);
            switches[to] = static_cast<std::uint8_t>(where);
        }
    }
};

// That of this block, for tiles of kN columns.
template <int kN>
__device__ PoolBlock pool_block(const TapPlan& p, const PoolPlan& pool) {
    PoolBlock b;
    unsigned block = blockIdx.x;
    b.first_column = static_cast<int>(block % p.column_tiles) * kN;
    block /= p.column_tiles;
    b.first_x = static_cast<int>(block % pool.x.tiles) * pool.x.tile;
    block /= pool.x.tiles;
    b.first_y = static_cast<int>(block % pool.y.tiles) * pool.y.tile;
    block /= pool.y.tiles;
    b.group = static_cast<int>(block % p.groups);
    b.n = block / p.groups;
    b.top = b.first_y * pool.y.stride - pool.y.padding;
    b.left = b.first_x * pool.x.stride - pool.x.padding;
    b.rows = phase_taps<false>(p.y, 0);
    b.columns = phase_taps<false>(p.x, 0);
    return b;
}

}  // namespace zfcuda
