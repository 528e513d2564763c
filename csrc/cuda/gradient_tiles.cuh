// The two tiles of gradient_mma.cuh in shared memory, and their product on the tensor cores.
//
//   sum[column][row] += sum over pixels k of image[k][column] * signal[k][row]
//
// Both come pixel by pixel, while an instruction wants its factors' k together:
//
//   m16n8k8    left: columns g, g + 8 of pixels t, t + 4     right: row g of pixels t, t + 4
//   m16n8k16   the same with pairs of pixels 2t, 2t + 1      for lane 4g + t
//
//              piece 0  1  2  3  4  5  6  7   slots of a tile of whole pixels: each pixel's
//   pixel 0         [0  1  2  3  4  5  6  7]  pieces (16 bytes) are permuted by an exclusive or
//         1         [2  3  0  1  6  7  4  5]  with 0 2 4 6 1 3 5 7, so that neither the eight
//         2         [4  5  6  7  0  1  2  3]  pixels of one piece, which ldmatrix reads, nor
//         3         [6  7  4  5  2  3  0  1]  pieces 2i, 2i + 1 of four pixels, which a half-warp
//         4         [1  0  3  2  5  4  7  6]  of tf32 reads, meet a bank twice; copies run along
//         …          …                        a pixel, or along eight pixels
#pragma once

#include "mma_tile.cuh"

namespace zfcuda {

using MediumGradientTile = MmaTile<64, 64, 32, 64>;

// Piece `piece` of pixel k, a few neighbouring channels, in a tile of whole pixels.
template <typename T, int kSide>
ZF_HD int pixel_slot(int k, int piece) {
    return k * (kSide / Pack<T>::size) + (piece ^ (2 * k % 8 + k / 4 % 2));
}

// The two tiles of a stage, by the type of the factors: how the signal is stored, what a thread
// reads, which results it has. One instruction multiplies kStep pixels. Of the signal a thread
// brings piece `piece` of four pixels, those of its number pixel(group, i).
//
// Halves: both tiles are whole pixels, and ldmatrix transposes them. Of an instruction on the left
// the second matrix is eight columns on and the third eight pixels on; of one on the right it is
// the other way round.
template <typename T, typename Tile>
struct PixelTiles {
    static constexpr int kStep = 16, kDepth = 2 * kStep;  // pixels of an instruction, of a chunk
    static constexpr int kLine = Tile::kM / 8;            // pieces of a pixel
    static constexpr int kRight = Tile::kM * 4;           // where the signal's tile begins
    static constexpr int kBetween = 8;  // from one pixel of a thread's signal to the next

    __device__ static int pixel(int group, int i) { return group + kBetween * i; }
    __device__ static void store_signal(Vector<T, 8>* tile, int group, int piece,
                                        const Vector<T, 8> (&pixels)[4]) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            tile[pixel_slot<T, Tile::kN>(pixel(group, i), piece)] = pixels[i];
    }

    struct Lane {
        int left[Tile::kWarpM / 16], right[Tile::kWarpN / 16];
    };
    __device__ static Lane lane() {
        const int k = threadIdx.x % 8, low = threadIdx.x / 8 % 2, high = threadIdx.x / 16 % 2;
        Lane lane;
#pragma unroll
        for (int i = 0; i < Tile::kWarpM / 16; ++i)
            lane.left[i] =
                kept(pixel_slot<T, Tile::kM>(k + 8 * high, Tile::first_row() / 8 + 2 * i + low));
#pragma unroll
        for (int j = 0; j < Tile::kWarpN / 16; ++j)
            lane.right[j] =
                kept(kRight +
                     pixel_slot<T, Tile::kN>(k + 8 * low, Tile::first_column() / 8 + 2 * j + high));
        return lane;
    }
    __device__ static void left(const Lane& lane, const Piece* stage, int step, int i,
                                std::uint32_t (&a)[4]) {
        load_matrices<true>(a, stage + lane.left[i] + step * kStep * kLine);
    }
    __device__ static void right(const Lane& lane, const Piece* stage, int step, int j,
                                 std::uint32_t (&b)[4]) {
        load_matrices<true>(b, stage + lane.right[j] + step * kStep * kLine);
    }

    // The place of results sum[i][j][2h + e]; kRun of them, by h, are neighbours.
    static constexpr int kRun = 1;
    __device__ static int row(int j, int e) {
        return Tile::first_column() + 8 * j + threadIdx.x % 4 * 2 + e;
    }
    __device__ static int column(int i, int h) {
        return Tile::first_row() + 16 * i + 8 * h + threadIdx.x % 32 / 4;
    }
};

// tf32 has no ldmatrix that transposes. Its left fragment is two columns of one pixel and the same
// of another, two loads of 8 bytes from whole pixels: the eight columns in between that the
// instruction has them apart are nobody's concern but the epilogue's. Its right fragment is one
// column of two pixels; so the signal, which is in registers anyway, is stored with four pixels of
// a channel in a piece, for an ldmatrix that does not transpose. Piece q of row r is in slot
// q * rows + (r ^ q).
template <typename Tile>
struct PixelTiles<float, Tile> {
    static constexpr int kStep = 8, kDepth = 2 * kStep;
    static constexpr int kLine = Tile::kM / 4;
    static constexpr int kRight = Tile::kM * 4;
    static constexpr int kBetween = 1;

    __device__ static int slot(int quad, int row) { return quad * Tile::kN + (row ^ quad); }
    __device__ static int pixel(int group, int i) { return 4 * group + i; }
    __device__ static void store_signal(Vector<float, 4>* tile, int group, int piece,
                                        const Vector<float, 4> (&pixels)[4]) {
#pragma unroll
        for (int e = 0; e < 4; ++e)
            tile[slot(group, 4 * piece + e)] = {pixels[0].value[e], pixels[1].value[e],
                                                pixels[2].value[e], pixels[3].value[e]};
    }

    // Left: halves of pieces, for pixels t and t + 4, and columns 0 and 16. Right: pieces.
    struct Lane {
        int left[2][2], right[2];
    };
    __device__ static Lane lane() {
        const int number = threadIdx.x % 32, g = number / 4, t = number % 4;
        Lane lane;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
            for (int i = 0; i < 2; ++i)
                lane.left[h][i] = kept(2 * pixel_slot<float, Tile::kM>(
                                               t + 4 * h, Tile::first_row() / 4 + 4 * i + g / 2) +
                                       g % 2);
            lane.right[h] =
                kept(kRight + slot(2 * h + number / 8 % 2,
                                   Tile::first_column() + number / 16 * 8 + number % 8));
        }
        return lane;
    }
    __device__ static void left(const Lane& lane, const Piece* stage, int step, int i,
                                std::uint32_t (&a)[4]) {
        const auto* const pairs = reinterpret_cast<const Vector<std::uint32_t, 2>*>(stage);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const auto pair = pairs[lane.left[h][i % 2] + 2 * (i / 2 * 8 + step * kStep * kLine)];
            a[2 * h] = pair.value[0];
            a[2 * h + 1] = pair.value[1];
        }
    }
    __device__ static void right(const Lane& lane, const Piece* stage, int step, int j,
                                 std::uint32_t (&b)[4]) {
        load_matrices<false>(b, stage + lane.right[step] + 16 * j);
    }

    static constexpr int kRun = 2;
    __device__ static int row(int j, int e) {
        return Tile::first_column() + 8 * j + threadIdx.x % 4 * 2 + e;
    }
    __device__ static int column(int i, int) {
        return Tile::first_row() + 16 * i + threadIdx.x % 32 / 4 * 2;
    }
};

template <typename Factors, typename Tile>
__device__ __forceinline__ void multiply_pixels(
    const typename PixelTiles<typename Factors::T, Tile>::Lane& lane, const Piece* stage,
    typename Tile::Accumulator& sum) {
    using T = typename Factors::T;
    using Tiles = PixelTiles<T, Tile>;
#pragma unroll
    for (int step = 0; step < 2; ++step) {
        typename Factors::Left a[Tile::kWarpM / 16];
#pragma unroll
        for (int i = 0; i < Tile::kWarpM / 16; ++i) {
            Tiles::left(lane, stage, step, i, a[i].bits);
            Factors::prepare(a[i]);
        }
#pragma unroll
        for (int j = 0; j < Tile::kWarpN / 16; ++j) {
            std::uint32_t b[4];
            Tiles::right(lane, stage, step, j, b);
#pragma unroll
            for (int i = 0; i < Tile::kWarpM / 16; ++i) {
                Factors::multiply(sum[i][2 * j], a[i], {b[0], b[1]});
                Factors::multiply(sum[i][2 * j + 1], a[i], {b[2], b[3]});
            }
        }
    }
}

}  // namespace zfcuda
