// The product of two tiles in shared memory on the tensor cores, the inner loop of tap_mma.cuh.
//
//   accumulator[row][column] += sum over k of left[row][k] * right[k][column]
//
// Both tiles are made of pieces, the 16 bytes of four floats (or eight halves) that follow each
// other in k. A row of a tile has kPieces of them; piece k of row r lies in slot
//
//   k * rows + (r ^ 2k)             k    row 0 1 2 3 4 5 6 7       a line: 128 bytes, all banks
//                                   0    [0 1 2 3 4 5 6 7] 8 …
//                                   1    [2 3 0 1 6 7 4 5] …
//                                   2    [4 5 6 7 0 1 2 3] …
//                                   3    [6 7 4 5 2 3 0 1] …
//
// No access meets a bank twice: ldmatrix reads eight rows of one piece, which fill one line in some
// order; copies run 8 lanes along two rows r, r + 1 (r even) of four pieces, which go to places
// {r, r + 1} ^ {0, 2, 4, 6} of their lines, all different. Without the exclusive or, the four
// pieces of a row would go to the same banks.
//
// Whatever the type, ldmatrix gives a lane four bytes of a piece, and one instruction multiplies
// two pieces: the fragments of m16n8k8 in tf32 and of m16n8k16 in halves are the same bytes. A warp
// multiplies kWarpM x kWarpN results; 64 x 64 take 32 products from eight ldmatrix.x4: 4 products a
// shared load.
#pragma once

#include "vector.cuh"

namespace zfcuda {

// Factors of a product: what is stored (T), the first architecture that multiplies it, and
// d += a b of two pairs of pieces.

// tf32, float32 with 10 bits of fraction. Nothing is converted here: the right factor was rounded
// when it was packed, the low bits of the left one are ignored, which truncates it.
struct Tf32 {
    using T = float;
    static constexpr int kSince = 80;
    struct Left {
        std::uint32_t bits[4];
    };
    __device__ static void prepare(Left&) {}
    __device__ static void multiply(float (&d)[4], const Left& a, const std::uint32_t (&b)[2]) {
        mma_tf32(d, a.bits, b);
    }
};

// float32 as big + small, both tf32: big is rounded to nearest, and so small has a sign of its own
// and at most 13 bits, of which truncation leaves 11; the error is at most 2^-21 of a factor,
// without a bias. small * small, less than 2^-22 of the product, is left out. The small products
// come first. The difference to an infinity is NaN: so are the sums it enters.
struct Tf32x3 {
    using T = float;
    static constexpr int kSince = 80;
    struct Left {
        std::uint32_t bits[4], small[4];
    };
    __device__ static std::uint32_t split(std::uint32_t& bits) {
        const std::uint32_t big = (bits + 0x1000u) & ~0x1fffu;
        const float small = __uint_as_float(bits) - __uint_as_float(big);
        bits = big;
        return __float_as_uint(small);
    }
    __device__ static void prepare(Left& a) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a.small[i] = split(a.bits[i]);
    }
    __device__ static void multiply(float (&d)[4], const Left& a, const std::uint32_t (&b)[2]) {
        std::uint32_t big[2] = {b[0], b[1]};
        const std::uint32_t small[2] = {split(big[0]), split(big[1])};
        mma_tf32(d, a.small, big);
        mma_tf32(d, a.bits, small);
        mma_tf32(d, a.bits, big);
    }
};

// float16 or bfloat16: products are exact and sums float32, so that a result is rounded once.
template <typename Half>
struct Halves {
    using T = Half;
    static constexpr int kSince = std::is_same_v<Half, __half> ? 75 : 80;
    struct Left {
        std::uint32_t bits[4];
    };
    __device__ static void prepare(Left&) {}
    __device__ static void multiply(float (&d)[4], const Left& a, const std::uint32_t (&b)[2]) {
        if constexpr (std::is_same_v<Half, __half>)
            mma_fp16(d, a.bits, b);
        else
            mma_bf16(d, a.bits, b);
    }
};

// Whether this architecture does: the kernels of others, which never run there, are empty.
template <typename Factors>
constexpr bool kMultiplies = kArch >= Factors::kSince;

using Piece = Vector<std::uint32_t, 4>;

// The sizes of a block's product; each warp has kWarpM x kWarpN of its kM x kN results.
template <int kBlockM, int kBlockN, int kRowsOfWarp, int kColumnsOfWarp>
struct MmaTile {
    static constexpr int kM = kBlockM, kN = kBlockN;
    static constexpr int kWarpM = kRowsOfWarp, kWarpN = kColumnsOfWarp;
    static constexpr int kThreads = kM / kWarpM * (kN / kWarpN) * 32;
    static constexpr int kResident = 2;  // blocks on a multiprocessor
    static constexpr int kPieces = 4;    // of a row at a time
    static constexpr int kStages = 3;
    static constexpr int kStagePieces = (kM + kN) * kPieces;
    static constexpr int kSharedBytes = kStages * kStagePieces * int(sizeof(Piece));

    using Accumulator = float[kWarpM / 16][kWarpN / 8][4];

    template <int kRows>
    __device__ static int slot(int piece, int row) {
        return piece * kRows + (row ^ piece * 2);
    }
    __device__ static int first_row() { return threadIdx.x / 32 / (kN / kWarpN) * kWarpM; }
    __device__ static int first_column() { return threadIdx.x / 32 % (kN / kWarpN) * kWarpN; }

    // What a lane gives to ldmatrix.x4 for a pair of pieces. On the left its matrices are rows 0,
    // 8, 0, 8 of pieces 0, 0, 1, 1, and the next 16 rows follow; on the right columns 0, 0, 8, 8 of
    // pieces 0, 1, 0, 1, and the next 16 columns are 16 slots further on.
    using Slots = int[kPieces / 2];

    __device__ static int left_row() { return first_row() + threadIdx.x % 16; }
    __device__ static int left_piece() { return threadIdx.x % 32 / 16; }
    __device__ static void left_slots(Slots& slots) {
#pragma unroll
        for (int k = 0; k < kPieces / 2; ++k)
            slots[k] = kept(slot<kM>(2 * k + left_piece(), left_row()));
    }
    __device__ static void right_slots(Slots& slots) {
        const int number = threadIdx.x % 32;
        const int column = first_column() + number / 16 * 8 + number % 8;
#pragma unroll
        for (int k = 0; k < kPieces / 2; ++k)
            slots[k] = kept(slot<kN>(2 * k + number / 8 % 2, column));
    }

    // Copies pieces of the packed weights, `bytes` of each, to a stage of the right factor: a
    // thread brings one piece of every kStep-th column.
    static constexpr int kStep = kThreads / kPieces;
    template <bool kThroughL1, typename T>
    __device__ static void bring_right(Piece* to, const T* from, int bytes) {
        static_assert(kStep % 8 == 0, "the places of a thread's columns differ by kStep");
        constexpr int kElements = Pack<T>::size, kColumns = (kN + kStep - 1) / kStep;
        if (kN % kStep == 0 || threadIdx.x / kPieces < kN)
#pragma unroll
            for (int j = 0; j < kColumns; ++j)
                cp_async<16, kThroughL1>(to + j * kStep, from + j * kStep * kElements, bytes);
    }

    // The product of a chunk: left(k, i, bits) gives the lane's fragment of pair k for the i-th 16
    // rows of its warp.
    template <typename Factors, typename Left>
    __device__ __forceinline__ static void multiply(Left&& left, const Piece* right,
                                                    const Slots& slots, Accumulator& sum) {
#pragma unroll
        for (int k = 0; k < kPieces / 2; ++k) {
            typename Factors::Left a[kWarpM / 16];
#pragma unroll
            for (int i = 0; i < kWarpM / 16; ++i) {
                left(k, i, a[i].bits);
                Factors::prepare(a[i]);
            }
#pragma unroll
            for (int j = 0; j < kWarpN / 8; j += 2) {
                std::uint32_t b[4];
                load_matrices<false>(b, right + slots[k] + 8 * j);
#pragma unroll
                for (int i = 0; i < kWarpM / 16; ++i) {
                    Factors::multiply(sum[i][j], a[i], {b[0], b[1]});
                    Factors::multiply(sum[i][j + 1], a[i], {b[2], b[3]});
                }
            }
        }
    }

    // A thread's results: kRows rows by kQuads quads of neighbouring columns. Number 2h + e of a
    // quad is result e of product h, see mma_slot.
    static constexpr int kRows = kWarpM / 8, kQuads = kWarpN / 16;

    __device__ static int row(int i) { return first_row() + 8 * i + threadIdx.x % 32 / 4; }
    __device__ static int column(int j) { return first_column() + 16 * j + threadIdx.x % 4 * 4; }
    __device__ static float result(const Accumulator& sum, int i, int j, int e) {
        return sum[i / 2][2 * j + e / 2][i % 2 * 2 + e % 2];
    }
};

using WideMmaTile = MmaTile<128, 128, 64, 64>;
using MediumMmaTile = MmaTile<128, 64, 64, 32>;
using ThirdsMmaTile = MmaTile<128, 96, 64, 48>;  // see tap_plan.cuh
using NarrowMmaTile = MmaTile<128, 16, 32, 16>;

}  // namespace zfcuda
