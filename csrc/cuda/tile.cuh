// The product of two tiles in shared memory, the inner loop of every convolution here.
//
//   accumulator[row][column] += sum over k of a[k][row] * b[k][column]
//
// Both tiles lie k-major, so that a thread reads its rows and columns as 16-byte packs:
//
//   warp = 8 x 4 threads           a thread = kRows x kColumns results, in quads of each: quad 0
//                                  in the first half of the tile, quad 1 in the second
//
// A pack read by a warp is then at most 8 different addresses in a row: one pass of the 32 banks.
// Whoever fills a tile may run its lanes along k or along the columns: column c of row k lies at
// c ^ swizzle(k), which spreads four k quads over the banks and keeps every quad of columns whole.
#pragma once

#include "odometer.cuh"
#include "vector.cuh"

namespace zfcuda {

constexpr int kTileThreads = 256;

// Blocks that an SM is to hold: 128 registers a thread of floats, 255 of doubles.
template <typename T>
constexpr int kResidentBlocks = sizeof(T) == 4 ? 2 : 1;

template <int kWidth>
ZF_HD int tile_slot(int k, int column) {
    return k * kWidth + (column ^ (((k & 12) << 1 | (k & 1) << 2) & (kWidth - 1)));
}

// The sizes of a block's product: kM x kN results, kRows x kColumns a thread, kDepth products at a
// time.
template <typename T, int kBlockM, int kBlockN, int kColumnsOfThread = 4,
          int kThreadsOfBlock = kTileThreads>
struct Tile {
    static constexpr int kM = kBlockM, kN = kBlockN, kDepth = 64 / sizeof(T);
    static constexpr int kColumns = kColumnsOfThread, kThreads = kThreadsOfBlock;
    static constexpr int kResident = kResidentBlocks<T>;
    static constexpr int kRows = kM * kN / (kColumns * kThreads);
    static constexpr int kRowThreads = kM / kRows, kColumnThreads = kN / kColumns;

    using Accumulator = T[kRows][kColumns];

    // Threads of 16 x 8 results have no registers for the addresses of tile_slot. There eight
    // columns of padding behind every four k put the quads of k on other banks, and all places
    // that a thread reads are at fixed distances from its first.
    static constexpr int kPadding = kColumns == 8 ? 8 : 0;
    static constexpr int kLeftSize = kDepth * kM + kDepth / 4 * kPadding;
    static constexpr int kRightSize = kDepth * kN + kDepth / 4 * kPadding;

    template <int kWidth>
    ZF_HD static int slot(int k, int column) {
        return kPadding ? k * kWidth + k / 4 * kPadding + column : tile_slot<kWidth>(k, column);
    }

    __device__ static int row_thread() {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        return warp % (kRowThreads / 8) * 8 + lane % 8;
    }
    // The tile's row of a thread's row i; four at a time are neighbours.
    __device__ static int row(int i) {
        return i / 4 * (4 * kRowThreads) + row_thread() * 4 + i % 4;
    }
    // The tile's column of a thread's column j, a multiple of four: the first of four neighbours.
    __device__ static int column(int j = 0) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        return j * kColumnThreads + (warp / (kRowThreads / 8) * 4 + lane / 8) * 4;
    }

    // A thread's first row and column.
    struct First {
        int row, column;
    };
    __device__ static First first() { return {kept(row(0)), kept(column())}; }

    __device__ static void multiply(const First& first, const T* a, const T* b,
                                    Accumulator& accumulator) {
#pragma unroll
        for (int k = 0; k < kDepth; ++k) {
            T left[kRows], right[kColumns];
#pragma unroll
            for (int i = 0; i < kRows; i += 4)
                read_quad(a + slot<kM>(k, i * kRowThreads + first.row), left + i);
#pragma unroll
            for (int j = 0; j < kColumns; j += 4)
                read_quad(b + slot<kN>(k, j * kColumnThreads + first.column), right + j);
#pragma unroll
            for (int i = 0; i < kRows; ++i)
#pragma unroll
                for (int j = 0; j < kColumns; ++j) accumulator[i][j] += left[i] * right[j];
        }
    }

  private:
    __device__ static void read_quad(const T* from, T* to) {
#pragma unroll
        for (int i = 0; i < 4; i += Pack<T>::size) {
            const Pack<T> pack = load_vector<T, Pack<T>::size>(from + i);
#pragma unroll
            for (int j = 0; j < Pack<T>::size; ++j) to[i + j] = pack.value[j];
        }
    }
};

}  // namespace zfcuda
