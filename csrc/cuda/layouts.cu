// A tensor from NCHW to NHWC, or back: a transposition of a matrix for each image.
//
//   to[n][column][row] = from[n][row][column]     rows are channels and columns pixels, or back
//
//   from              tile             to         A block reads a tile along its rows and writes it
//   +-----+ tall      +-----+          +--+       along its columns, through shared memory whose
//   | --> | rows      | --> |   -->    || |       rows are so far apart that words of a column lie
//   +-----+           +-----+          |v | wide  in different banks.
//    wide columns                      +--+
//
// Of a side of at most 32, as the channels of an image are, the tile has all of it, so that what it
// writes (or reads) is one piece: 3 x 341 of an image of three colours. Otherwise 32 x 32.
// Least bytes: the tensor, read once and written once.
// Measured: not yet, for want of a GPU; `make bench` on one fills this line.
#include "layouts.cuh"
#include "places.cuh"
#include "tap_block.cuh"

namespace zfcuda {
namespace {

constexpr int kTile = 1024, kPadded = 2048;  // elements of a tile, and with what keeps rows apart

struct Transposition {
    std::int64_t rows, columns;
    int tall, wide, pitch;
    Divisor by_tall, by_wide;
    unsigned row_tiles, column_tiles;

    Transposition(std::int64_t all_rows, std::int64_t all_columns)
        : rows(all_rows), columns(all_columns), tall(32), wide(32) {
        if (rows <= 32)
            tall = static_cast<int>(rows), wide = kTile / tall;
        else if (columns <= 32)
            wide = static_cast<int>(columns), tall = kTile / wide;
        const int apart = (32 + tall - 1) / tall;  // banks, of which that many columns lie in one
        pitch = tall > 32 ? wide | 1 : wide + (apart + 32 - wide % 32) % 32;
        by_tall = Divisor(tall), by_wide = Divisor(wide);
        row_tiles = static_cast<unsigned>((rows + tall - 1) / tall);
        column_tiles = static_cast<unsigned>((columns + wide - 1) / wide);
    }
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    copy_layout_kernel(Transposition p, const T* from, T* to) {
    ZF_SHARED(T, tile, kPadded);
    const unsigned line = blockIdx.x / p.column_tiles;
    const std::int64_t first_column = std::int64_t(blockIdx.x % p.column_tiles) * p.wide;
    const std::int64_t first_row = std::int64_t(line % p.row_tiles) * p.tall;
    const std::int64_t n = line / p.row_tiles;
    const int rows = static_cast<int>(min(std::int64_t(p.tall), p.rows - first_row));
    const int columns = static_cast<int>(min(std::int64_t(p.wide), p.columns - first_column));
    from += (n * p.rows + first_row) * p.columns + first_column;
    to += (n * p.columns + first_column) * p.rows + first_row;
#pragma unroll
    for (int i = threadIdx.x; i < kTile; i += kThreads) {
        const int row = p.by_wide.divide(i), column = i - row * p.wide;
        if (row < rows && column < columns)
            tile[row * p.pitch + column] = from[row * p.columns + column];
    }
    __syncthreads();
#pragma unroll
    for (int i = threadIdx.x; i < kTile; i += kThreads) {
        const int column = p.by_tall.divide(i), row = i - column * p.tall;
        if (row < rows && column < columns)
            to[column * p.rows + row] = tile[row * p.pitch + column];
    }
}

}  // namespace

void copy_layout(const Layout& from_layout, std::int64_t batch, std::int64_t bytes, Address from,
                 Address to, const Exec& exec) {
    const std::int64_t pixels = from_layout.height * from_layout.width;
    const std::int64_t channels = from_layout.channels;
    if (batch * pixels * channels == 0) return;
    const bool last = from_layout.channels_last;
    const Transposition p(last ? pixels : channels, last ? channels : pixels);
    const dim3 grid = tap_grid(batch * p.row_tiles * p.column_tiles);
    const auto copy = [&](auto zero) {
        using T = decltype(zero);
        launch(copy_layout_kernel<T>, grid, dim3(kThreads), 0, exec, p, from.as<const T>(),
               to.as<T>());
    };
    bytes == 1 ? copy(std::uint8_t{}) : bytes == 2 ? copy(std::uint16_t{}) : copy(std::uint32_t{});
}

}  // namespace zfcuda
