// The maximum of each map and its first position, from its pool where there is one.
//
//   values[n, c] = max of input[n, c]; positions[n, c] = the first y * width + x where it is
//
//     covered by the pool   |     A window's first maximum is the map's where the map's lies in it,
//   +-----------------------+--+  so the pool and its switches say what the map would. What a pool
//   | pooled values         |  |  that does not pad to the right leaves over is read from the map:
//   |                       |  |  the strip beside its windows, the rows below them.
//   +-----------------------+  |
//   | rows below               |  A block: NCHW one map, its threads along positions; NHWC 32 maps
//   +--------------------------+  of one image, lanes along channels, warps along positions.
//
// A thread keeps the best of its positions, then the block's threads of each map meet in shared
// memory, halving: larger value first, then smaller position, so the order of the threads does not
// matter. A switch is read only where the value reaches the thread's best so far.
// Least bytes: pooled + a few switches (or the input, without a pool) + the border.
// Measured: not yet, for want of a GPU; `make bench` on one fills this line.
#include "strongest.cuh"

namespace zfcuda {
namespace {

// A rectangle of a map, its positions counted in row-major order.
struct Region {
    int top, left, count;
    Divisor width;

    Region(std::int64_t first_row, std::int64_t first_column, std::int64_t height,
           std::int64_t breadth)
        : top(static_cast<int>(first_row)),
          left(static_cast<int>(first_column)),
          count(height > 0 && breadth > 0 ? static_cast<int>(height * breadth) : 0),
          width(breadth > 0 ? breadth : 1) {}
};

struct Maximum {
    PoolShape s;
    Divisor plane;  // throws where a position would not fit an int
    Region pooled, beside, below;
    int maps;  // of a block

    Maximum(const PoolShape& shape, bool from_pool)
        : Maximum(shape, from_pool ? shape.covered_height() : 0, shape.covered_width()) {
        pooled = Region(0, 0, from_pool ? shape.out_height : 0, shape.out_width);
    }

  private:
    // `rows` and `columns` of the input are covered by windows.
    Maximum(const PoolShape& shape, std::int64_t rows, std::int64_t columns)
        : s(shape),
          plane(shape.in_height * shape.in_width),
          pooled(0, 0, 0, 0),
          beside(0, columns, rows, shape.in_width - columns),
          below(rows, 0, shape.in_height - rows, shape.in_width),
          maps(shape.channels_last ? 32 : 1) {}
};

// body(row, column) for each position of a region that this thread looks at.
template <typename Body>
__device__ void for_each_position(const Region& region, int first, int step, Body&& body) {
    for (int i = first; i < region.count; i += step) {
        const int row = region.width.divide(i);
        body(region.top + row, region.left + i - row * static_cast<int>(region.width.divisor));
    }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    map_maximum_kernel(Maximum m, const T* input, const T* pooled, const std::uint8_t* switches,
                       T* values, std::int64_t* positions) {
    ZF_SHARED(Strongest<Sum<T>>, met, kThreads);
    const PoolShape& s = m.s;
    const int thread = threadIdx.x, step = kThreads / m.maps, first = thread / m.maps;
    const std::int64_t groups = (s.channels + m.maps - 1) / m.maps;
    const std::int64_t n = blockIdx.x / groups;
    const std::int64_t c = blockIdx.x % groups * m.maps + thread % m.maps;

    Strongest<Sum<T>> best;
    if (c < s.channels) {
        const int width = static_cast<int>(s.in_width);
        for_each_position(m.pooled, first, step, [&](int y, int x) {
            const std::int64_t at = s.output().offset(n, c, y, x);
            const Sum<T> value = pooled[at];
            if (!(value >= best.value)) return;
            const int tap = switches[at], kernel = static_cast<int>(s.kernel_w);
            const std::int64_t row = y * s.stride_h - s.padding_h + tap / kernel;
            const std::int64_t column = x * s.stride_w - s.padding_w + tap % kernel;
            best.offer(value, static_cast<int>(row * width + column));
        });
        const auto look = [&](int y, int x) {
            best.offer(input[s.input().offset(n, c, y, x)], y * width + x);
        };
        for_each_position(m.beside, first, step, look);
        for_each_position(m.below, first, step, look);
    }
    meet(best, met, m.maps, s.channels, n, c, values, positions);
}

}  // namespace

void map_maximum(const PoolShape& s, Dtype dtype, Address input, Address pooled, Address switches,
                 Address values, Address positions, const Exec& exec) {
    const Maximum maximum(s, pooled && !s.gaps());
    const dim3 blocks = maps_grid(s.batch, s.channels, maximum.maps);
    if (blocks.x == 0) return;
    with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        launch(map_maximum_kernel<T>, blocks, dim3(kThreads), 0, exec, maximum, input.as<const T>(),
               pooled.as<const T>(), switches.as<const std::uint8_t>(), values.as<T>(),
               positions.as<std::int64_t>());
    });
}

}  // namespace zfcuda
