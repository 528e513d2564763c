// The matrix product under the convolutions: tile[i][j] (+)= sum over k of a(i, k) * b(k, j) on
// packed operands that lie in the cache.
//
//              panel of b: `width` columns, k-major        rows 12 x 2 vectors (AVX-512)
//              +-----------+                               rows  6 x 2 vectors (AVX2, SSE, NEON)
//              | k  ->  .. |  loaded as vectors
//   panel of a +-----------+
//   rows  +--+ |  tile in  |  One panel of a: each a(i, k) is broadcast and multiplied with the
//         |  | | registers |  vectors of b(k, ·). Per k: 2 loads, 12 broadcasts (folded into the
//         +--+ +-----------+  multiply-adds), 24 multiply-adds; so the product is bound by them.
//
// The micro-kernel is written with GCC's vector extensions, so the same lines give SSE, AVX2,
// AVX-512 and NEON; its shape follows from the instruction set that this file is compiled for.
// The sum over one block of k is kept in registers from zero and then added to the tile: a sum of
// n terms has an error of order sqrt(block) + sqrt(n / block) roundings rather than sqrt(n).
#pragma once

#include <cstdint>

#include "lanes.h"

namespace zfcuda::gemm {

constexpr int kRows = kVectorBytes == 64 ? 12 : 6;

// A block of k: 256 rows of a panel of b fill at most the L1 cache. The rows of a are padded, so
// that they do not fall on the same sets of it.
constexpr std::int64_t kDepth = 256, kRowStride = kDepth + 16;
// The last panel of a is cut to a multiple of this many rows.
constexpr int kRowStep = kRows / 3;

template <typename T>
constexpr int kVector = kVectorBytes / sizeof(Sum<T>);
template <typename T>
constexpr int kColumns = 2 * kVector<T>;

constexpr std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
constexpr std::int64_t round_up(std::int64_t a, std::int64_t b) { return divide_up(a, b) * b; }

// Rows and columns of a packed block, padding included.
constexpr std::int64_t padded_rows(std::int64_t rows) { return round_up(rows, kRowStep); }
template <typename T>
constexpr std::int64_t padded_columns(std::int64_t columns) {
    return round_up(columns, kVector<T>);
}

// body(start, width) for each panel of `count` rows or columns: full ones, then one cut to a
// multiple of `step`.
template <typename Body>
inline void for_panels(std::int64_t count, std::int64_t full, std::int64_t step, Body&& body) {
    for (std::int64_t start = 0; start < count; start += full) {
        const std::int64_t left = round_up(count - start, step);
        body(start, left < full ? left : full);
    }
}
template <typename Body>
inline void for_row_panels(std::int64_t rows, Body&& body) {
    for_panels(rows, kRows, kRowStep, body);
}
template <typename T, typename Body>
inline void for_column_panels(std::int64_t columns, Body&& body) {
    for_panels(columns, kColumns<T>, kVector<T>, body);
}

// How a panel of a is stored: row by row, kRowStride apart, or k by k.
enum class Rows { row_major, k_major };

template <typename T, Rows order, int rows, int vectors>
void micro_kernel(const T* a, const T* b, std::int64_t depth, T* tile, bool accumulate) {
    typedef T Vector __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
    constexpr std::int64_t row_step = order == Rows::row_major ? kRowStride : 1;
    constexpr std::int64_t k_step = order == Rows::row_major ? 1 : rows;
    Vector sum[rows][vectors] = {};
    for (std::int64_t k = 0; k < depth; ++k) {
        Vector columns[vectors];
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v)
            columns[v] = reinterpret_cast<const Vector*>(b)[k * vectors + v];
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
            for (int v = 0; v < vectors; ++v)
                sum[r][v] += a[r * row_step + k * k_step] * columns[v];
    }
    Vector* result = reinterpret_cast<Vector*>(tile);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v) {
            Vector& target = result[r * vectors + v];
            target = accumulate ? target + sum[r][v] : sum[r][v];
        }
}

// The products of all panels of a with all panels of b. Tile (i, j) of panels that start at row i
// and column j lies at tiles + tile_offset(i, j).
template <typename T>
inline std::int64_t tile_offset(std::int64_t rows, std::int64_t i, std::int64_t j,
                                std::int64_t width) {
    return j * padded_rows(rows) + i * width;
}

template <typename T, Rows order>
void multiply(const T* a, const T* b, std::int64_t rows, std::int64_t columns, std::int64_t depth,
              T* tiles, bool accumulate) {
    using Kernel = void (*)(const T*, const T*, std::int64_t, T*, bool);
    constexpr int step = kRowStep;
    constexpr Kernel kernels[3][2] = {
        {micro_kernel<T, order, step, 1>, micro_kernel<T, order, step, 2>},
        {micro_kernel<T, order, 2 * step, 1>, micro_kernel<T, order, 2 * step, 2>},
        {micro_kernel<T, order, 3 * step, 1>, micro_kernel<T, order, 3 * step, 2>}};
    const std::int64_t a_step = order == Rows::row_major ? kRowStride : depth;
    for_column_panels<T>(columns, [&](std::int64_t j, std::int64_t width) {
        for_row_panels(rows, [&](std::int64_t i, std::int64_t height) {
            kernels[height / step - 1][width / kVector<T> - 1](
                a + i * a_step, b + j * depth, depth, tiles + tile_offset<T>(rows, i, j, width),
                accumulate);
        });
    });
}

}  // namespace zfcuda::gemm
