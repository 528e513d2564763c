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
#include <cmath>

#include "places.cuh"

namespace zfcuda {
namespace {

template <typename T>
struct Best {
    T value;
    int position;

    // NaN is never offered: it is not >= anything.
    __device__ void offer(T other, int at) {
        if (other > value || (other == value && at < position)) {
            value = other;
            position = at;
        }
    }
};

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
        : Maximum(shape,
                  from_pool ? covered(shape.out_height, shape.in_height, shape.stride_h,
                                      shape.padding_h, shape.kernel_h)
                            : 0,
                  covered(shape.out_width, shape.in_width, shape.stride_w, shape.padding_w,
                          shape.kernel_w)) {
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

    static std::int64_t covered(std::int64_t windows, std::int64_t size, std::int64_t stride,
                                std::int64_t padding, std::int64_t kernel) {
        const std::int64_t end = (windows - 1) * stride - padding + kernel;
        return end < size ? end : size;
    }
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
    ZF_SHARED(Best<Sum<T>>, met, kThreads);
    const PoolShape& s = m.s;
    const int thread = threadIdx.x, step = kThreads / m.maps, first = thread / m.maps;
    const std::int64_t groups = (s.channels + m.maps - 1) / m.maps;
    const std::int64_t n = blockIdx.x / groups;
    const std::int64_t c = blockIdx.x % groups * m.maps + thread % m.maps;

    Best<Sum<T>> best = {Sum<T>(-INFINITY), 0};
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

    met[thread] = best;
    for (int half = kThreads / 2; half >= m.maps; half /= 2) {
        __syncthreads();
        if (thread < half) met[thread].offer(met[thread + half].value, met[thread + half].position);
    }
    if (first == 0 && c < s.channels) {
        values[n * s.channels + c] = static_cast<T>(met[thread].value);
        positions[n * s.channels + c] = met[thread].position;
    }
}

}  // namespace

void map_maximum(const PoolShape& s, Dtype dtype, Address input, Address pooled, Address switches,
                 Address values, Address positions, const Exec& exec) {
    const Maximum maximum(s, bool(pooled));
    const std::int64_t blocks = s.batch * ((s.channels + maximum.maps - 1) / maximum.maps);
    if (blocks == 0) return;
    if (blocks > std::numeric_limits<int>::max())
        throw std::runtime_error("zfcuda: map_maximum of over 2^31 maps");
    with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        launch(map_maximum_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, exec,
               maximum, input.as<const T>(), pooled.as<const T>(),
               switches.as<const std::uint8_t>(), values.as<T>(), positions.as<std::int64_t>());
    });
}

}  // namespace zfcuda
