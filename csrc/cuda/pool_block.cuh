// What a block of a fused convolution and pool does around the product: which windows are its own,
// which pixels of the maps they read, and how it looks through them.
// conv2d_relu_max_pool2d.cu has the sketch.
#pragma once

#include "local_response_norm.cuh"
#include "patch.cuh"
#include "strongest.cuh"

namespace zfcuda {

// One dimension of the pool: `tile` windows a block, which read `box` positions of the maps. Blocks
// that look for the maximum of whole maps go on behind the last window, to `reach` windows, for the
// positions from `covered` on.
struct PoolAxis {
    int size, count;  // positions, windows
    int covered, reach;
    int kernel, stride, padding, dilation;
    int tile, box, tiles;

    PoolAxis(std::int64_t positions, std::int64_t windows, std::int64_t covered_positions,
             bool whole, std::int64_t kernel_size, std::int64_t stride_size,
             std::int64_t padding_size, std::int64_t dilation_size)
        : size(static_cast<int>(positions)),
          count(static_cast<int>(windows)),
          covered(static_cast<int>(covered_positions)),
          reach(static_cast<int>(
              windows +
              (whole ? (positions - covered_positions + stride_size - 1) / stride_size : 0))),
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
        tiles = (reach + tile - 1) / tile;
    }
};

struct PoolPlan {
    PoolAxis y, x;
    Divisor box_width, tile_width;  // of a block
    Layout output;

    PoolPlan(const PoolShape& s, bool maximum)
        : y(s.in_height, s.out_height, s.covered_height(), maximum, s.kernel_h, s.stride_h,
            s.padding_h, s.dilation_h),
          x(s.in_width, s.out_width, s.covered_width(), maximum, s.kernel_w, s.stride_w,
            s.padding_w, s.dilation_w),
          output(s.output()) {}

    // Chooses the tile whose box has at most `pixels` and is right by fits(height, width); false if
    // there is none.
    template <typename Fits>
    bool choose(int pixels, Fits&& fits) {
        std::int64_t fewest = std::numeric_limits<std::int64_t>::max();
        int rows = 0, columns = 0;
        for (int tall = 1; tall <= y.reach && y.box_of(tall) * x.box_of(1) <= pixels; ++tall)
            for (int wide = 1; wide <= x.reach; ++wide) {
                const std::int64_t height = y.box_of(tall), width = x.box_of(wide);
                if (height * width > pixels) break;
                const std::int64_t blocks =
                    std::int64_t((y.reach + tall - 1) / tall) * ((x.reach + wide - 1) / wide);
                if (blocks < fewest && fits(height, width))
                    fewest = blocks, rows = tall, columns = wide;
            }
        if (rows == 0) return false;
        y.set(rows), x.set(columns);
        box_width = Divisor(x.box), tile_width = Divisor(columns);
        return true;
    }
    bool choose(int pixels) {
        return choose(pixels, [](std::int64_t, std::int64_t) { return true; });
    }
    ZF_HD int tiles() const { return y.tiles * x.tiles; }
    ZF_HD int windows() const { return y.tile * x.tile; }  // of a block
};

// What blocks leave of the maps.
template <typename T>
struct PoolResults {
    T* pooled;  // perhaps null beside `normalized`
    std::uint8_t* switches;
    // What is strongest in the windows of each block: [image][tile][channel]. Null where nobody
    // asks.
    Strongest<Sum<T>>* strongest;
    // The pooled maps after normalisation across channels, by blocks that have all of them. Null
    // where nobody asks.
    T* normalized;
    WarpNorm<Sum<T>> norm;
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

    // body(y, x, tap) for the positions of a window that lie inside the map, in row-major order.
    template <typename Body>
    __device__ static void for_taps(const PoolPlan& pool, int oy, int ox, Body&& body) {
        for (int i = 0; i < pool.y.kernel; ++i) {
            const int y = oy * pool.y.stride - pool.y.padding + i * pool.y.dilation;
            if (y < 0 || y >= pool.y.size) continue;
            for (int j = 0; j < pool.x.kernel; ++j) {
                const int x = ox * pool.x.stride - pool.x.padding + j * pool.x.dilation;
                if (x >= 0 && x < pool.x.size) body(y, x, i * pool.x.kernel + j);
            }
        }
    }

    // The maximum of each window and its switch, for kPart channels from `part` of the block on,
    // of maps that lie in shared memory: channel c of pixel r at at(r, c). Lanes run along
    // channels in NHWC, along windows in NCHW; a thread stays with one channel of each kSide. If
    // the strongest are asked for, it also keeps those of its windows, whose values and positions
    // are at hand, and the team's threads meet where the maps were. kWhole: the maps of all
    // channels are there, so that a warp can normalise its windows, from register to register.
    template <typename T, int kPart, int kThreads, bool kChannelsLast, bool kWhole, typename Map,
              typename At>
    __device__ void look_through(const TapPlan& p, const PoolPlan& pool, int part, Map* maps,
                                 At&& at, const PoolResults<T>& to) const {
        using V = Sum<T>;
        constexpr int kSide = kPart < 32 ? kPart : 32, kGroup = kThreads / kSide;
        constexpr int kSides = kPart / kSide;
        const unsigned thread = kept(threadIdx.x);
        const int side = static_cast<int>(kChannelsLast ? thread % kSide : thread / kGroup);
        const int first = static_cast<int>(kChannelsLast ? thread / kSide : thread % kGroup);
        const int channels = p.columns - first_column - part;  // or more
        const std::int64_t first_channel = std::int64_t(group) * p.columns + first_column + part;
        Strongest<V> found[kSides];
        for (int base = 0; base < pool.windows(); base += kGroup) {
            const int window = base + first, row = pool.tile_width.divide(window);
            const int oy = first_y + row, ox = first_x + window - row * pool.x.tile;
            const bool reached = window < pool.windows() && oy < pool.y.reach && ox < pool.x.reach;
            const bool pools = reached && oy < pool.y.count && ox < pool.x.count;
            const auto map = [&](int s, int y, int x) {
                return static_cast<V>(
                    maps[at((y - top) * pool.x.box + x - left, s * kSide + side)]);
            };
            const auto place = [&](int s) {
                return pool.output.offset(n, first_channel + s * kSide + side, oy, ox);
            };
            V best[kSides] = {};
            if (pools) {
                int where[kSides], position[kSides];
                look(pool, oy, ox, map, best, where, position);
#pragma unroll
                for (int s = 0; s < kSides; ++s) {
                    if (s * kSide + side >= channels) {
                        best[s] = V(0);  // a padding column, which may be NaN
                        continue;
                    }
                    if (!kWhole || to.pooled != nullptr)
                        to.pooled[place(s)] = static_cast<T>(best[s]);
                    to.switches[place(s)] = static_cast<std::uint8_t>(where[s]);
                    if (to.strongest != nullptr) found[s].offer(best[s], position[s]);
                }
            } else if (reached) {
                look_behind(pool, oy, ox, map, found);
            }
            if constexpr (kWhole) {
                if (to.normalized == nullptr) continue;
                V quotients[kSides];
                to.norm.template divide<kSide>(side, best, quotients);
#pragma unroll
                for (int s = 0; s < kSides; ++s)
                    if (pools && s * kSide + side < channels)
                        to.normalized[place(s)] = static_cast<T>(quotients[s]);
            }
        }
        if (to.strongest == nullptr) return;

        // Lanes along windows meet on banks of their own.
        constexpr int kPitch = kChannelsLast ? kPart : kPart + 16 / kGroup;
        auto* const met = reinterpret_cast<Strongest<V>*>(maps);
        sync_team<kThreads>();
#pragma unroll
        for (int s = 0; s < kSides; ++s) met[first * kPitch + s * kSide + side] = found[s];
        sync_team<kThreads>();
        const int c = threadIdx.x;
        if (c >= kPart || c >= channels) return;
        Strongest<V> own;
        for (int g = 0; g < kGroup; ++g) own.offer(met[g * kPitch + c]);
        const int tile = first_y / pool.y.tile * pool.x.tiles + first_x / pool.x.tile;
        to.strongest[(n * pool.tiles() + tile) * pool.output.channels + first_channel + c] = own;
    }

    // The maxima of a window's channels, their switches and positions in the map.
    template <int kSides, typename V, typename Map>
    __device__ static void look(const PoolPlan& pool, int oy, int ox, Map&& map, V (&best)[kSides],
                                int (&where)[kSides], int (&position)[kSides]) {
#pragma unroll
        for (int s = 0; s < kSides; ++s) where[s] = -1;
        for_taps(pool, oy, ox, [&](int y, int x, int tap) {
#pragma unroll
            for (int s = 0; s < kSides; ++s) {
                const V value = map(s, y, x);
                const bool more = value > best[s] || value != value;
                if (more || where[s] < 0) where[s] = tap, position[s] = y * pool.x.size + x;
                if (more) best[s] = value;
            }
        });
    }

    // Offers what no window covers of the map, where a window (oy, ox) would be that the pool does
    // not have.
    template <int kSides, typename Map, typename V>
    __device__ static void look_behind(const PoolPlan& pool, int oy, int ox, Map&& map,
                                       Strongest<V> (&found)[kSides]) {
        for_taps(pool, oy, ox, [&](int y, int x, int) {
            if (y < pool.y.covered && x < pool.x.covered) return;
#pragma unroll
            for (int s = 0; s < kSides; ++s)
                found[s].offer(rectify(map(s, y, x)), y * pool.x.size + x);
        });
    }
};

// That of a number, for tiles of kN columns.
template <int kN>
__device__ PoolBlock pool_block(const TapPlan& p, const PoolPlan& pool, unsigned block) {
    PoolBlock b;
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
