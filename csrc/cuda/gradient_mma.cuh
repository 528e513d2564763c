// The weight gradient on the tensor cores, for NHWC; conv2d_weight_gradient.cu has the equation.
//
//                         rows: output channels of a group
//                        +-----------+
//   k = pixels (n,y,x)   | signal    |
//   of one split         | (gated)   |
//   +--------------------+-----------+   a block: 128 x 128 results, four warps of 64 x 64
//   | image              | gradient  |            64 x 64 results, two warps of 32 x 64
//   | under a tap        |           |
//   +--------------------+-----------+
//   columns: (tap, channel)
//
// A chunk of 16 pixels (halves 32) fills one of three buffers; copies fill two while the third is
// multiplied, with one barrier a chunk. Channels are whole pieces of 16 bytes, so a piece of the
// image lies under one tap, inside or zero as a whole: cp.async brings it. A thread's column is its
// own for good, and a pixel's place in the image is found once for all columns, a chunk ahead. The
// signal goes through registers, where it is gated, gathered from a pooled one, or rounded;
// gradient_tiles.cuh has how either is stored. An image of few channels is copied first, in whole
// pieces (folded_image.cuh).
//
// Floor: 2 * pixels * weights operations; a block of 128 x 128 reads 256 k numbers for 128 * 128 k
// products, 32 FLOP a byte in float32 and 64 in halves, from L2, where blocks that run together
// share their pixels. Beside it the partial gradients of all splits are written and read once: four
// blocks of 64 KiB for each multiprocessor, 69 MB in all on an H100.
//
// tf32, error: the image is truncated to 10 bits of fraction, less than 2^-10 of a factor and
// always towards zero, as in tap_mma.cuh; the signal is rounded by kNudge, at most 0.73 * 2^-10
// without a bias. So a sum is off by less than 2^-9 * sum |signal| |image|, and by 2^-11.5 of
// itself on average. tf32x3 and halves: mma_tile.cuh.
//
// Static (128 x 128, a signal in memory; sm_80): at most 242 registers, 49 KiB of shared memory,
// two blocks on an SM of any architecture. A chunk is 64 products in 405 instructions (tf32;
// float16 370), but these have the signal's loads with a mask and without, the rectifier, and the
// search for places, which is a quarter of the threads': some 300 are issued. 16 loads of 8 bytes
// and 8 ldmatrix (halves 16 ldmatrix) feed the products, 4 of 16 bytes tell the places. No
// conversion in tf32. bfloat16 before sm_90 has no comparison of pairs, and takes 570.
//
// Tried: fragments of tf32 by loads of 16 bytes, four tiles' columns at once (8 loads fewer, but
// 140 moves more: an instruction wants its registers together); the signal on the left (likewise);
// two counters of pixels a thread in place of the search (60 instructions more); gathered signals
// unrolled (1900 instructions a loop; rolled they take 630); halves gated one by one (200 more).
// Rejected on paper: cp.async for signals without a gate, which only second derivatives have;
// copies of four bytes for images of few channels (128 of them a chunk and warp for 12 products
// each); cvt.rna, three instructions on sm_80, in the place of kNudge.
//
// Measured: not yet, for want of a GPU; `make bench` on one fills this line.
#pragma once

#include "gradient_plan.cuh"
#include "gradient_tiles.cuh"
#include "unpooled_source.cuh"

namespace zfcuda {

// tf32: x * kNudge truncated to 10 bits of fraction, in place of x rounded to them. Truncation
// takes half a unit of the last bit on average, and this gives 0.36 to 0.72 of one, as much on
// average over numbers of every size; what has no more bits stays itself, and so do NaN and
// infinities.
constexpr float kNudge = 1 + 1.442695f / 4096;

// The image's part in a block: a thread brings one column, one piece, of kLoads pixels of a chunk.
template <typename T, typename Tile>
struct ImageLoads {
    using Tiles = PixelTiles<T, Tile>;
    static constexpr int kDepth = Tiles::kDepth, kLine = Tiles::kLine;
    static constexpr int kStep = Tile::kThreads / kLine;  // pixels that the block brings at once
    static constexpr int kLoads = kDepth / kStep;
    static constexpr int kPeriod = kStep < 8 ? 8 / kStep : 1;  // of the slots

    const T* image;
    Layout from;
    Column column;
    int stride_y, stride_x, width, height, first;
    std::int64_t batch;
    int slots[kPeriod];
    Odometer pixel, depth;
    Piece* places;  // of the pixels of two chunks: offset by two words, row, column

    __device__ ImageLoads(const GradientPlan& p, const GradientBlock& block, const T* values,
                          Piece* shared)
        : image(values),
          from(p.s.image()),
          stride_y(static_cast<int>(p.s.stride_h)),
          stride_x(static_cast<int>(p.s.stride_w)),
          width(static_cast<int>(p.s.out_width)),
          height(static_cast<int>(p.s.out_height)),
          first(threadIdx.x / kLine),
          batch(p.s.batch),
          pixel(block.split * p.split_pixels + threadIdx.x, width, height),
          depth(kDepth, width, height),
          places(shared) {
        from.channels_last = true;  // known to the compiler
        const int piece = threadIdx.x % kLine;
        column = Column(p, from, block.group, block.first_column + piece * Pack<T>::size);
#pragma unroll
        for (int i = 0; i < kPeriod; ++i)
            slots[i] = kept(pixel_slot<T, Tile::kM>(first + i * kStep, piece));
    }

    // Some threads find where the pixels of a chunk lie; after a barrier all may use it.
    __device__ void find_places(int chunk) {
        if (threadIdx.x >= kDepth) return;
        const int y = pixel.middle * stride_y, x = pixel.low * stride_x;
        const std::int64_t offset = from.offset(pixel.high, 0, y, x);
        places[chunk % 2 * kDepth + threadIdx.x] = {
            static_cast<std::uint32_t>(offset), static_cast<std::uint32_t>(offset >> 32),
            static_cast<std::uint32_t>(pixel.high < batch ? y : kOutside),
            static_cast<std::uint32_t>(x)};
        pixel.advance(depth, width, height);
    }
    __device__ void bring(int chunk, Piece* tile) {
        const T* values[kLoads];
        int bytes[kLoads];
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            const Piece at = places[chunk % 2 * kDepth + first + i * kStep];
            const std::uint64_t offset = std::uint64_t(at.value[1]) << 32 | at.value[0];
            values[i] = image + static_cast<std::int64_t>(offset) + column.offset;
            const bool inside = at.value[2] + column.y < static_cast<unsigned>(from.height) &&
                                at.value[3] + column.x < static_cast<unsigned>(from.width);
            bytes[i] = inside ? 16 : 0;
        }
#pragma unroll
        for (int i = 0; i < kLoads; ++i)
            cp_async<16>(tile + slots[i % kPeriod] + i / kPeriod * 8 * kLine, values[i], bytes[i]);
    }
};

// The signal's part: a thread brings one piece of four pixels. In memory a signal is dense, its
// pixels as far apart everywhere; of one that is gathered their rows and columns count.
template <typename Factors, typename Tile, typename Source>
struct SignalLoads {
    using T = typename Factors::T;
    using Tiles = PixelTiles<T, Tile>;
    using Staged = Vector<T, Pack<T>::size>;
    static constexpr int kDepth = Tiles::kDepth, kBetween = Tiles::kBetween;
    static constexpr int kGroups = kDepth / 4;  // of four pixels
    static_assert(Tile::kM == Tile::kN && Tile::kThreads == kGroups * Tiles::kLine,
                  "a thread brings four pieces of each tile");

    const Source& source;
    TapSteps steps;
    bool rectified;
    int width, height, group, piece;
    std::int64_t channel, channels, signal;
    int rest;  // pixels from the thread's first of this chunk on
    Odometer map, between, beyond;
    Staged staged[4];

    __device__ SignalLoads(const GradientPlan& p, const GradientBlock& block, const Source& from)
        : source(from),
          steps(p.steps),
          rectified(p.rectify),
          width(static_cast<int>(p.s.out_width)),
          height(static_cast<int>(p.s.out_height)),
          group(threadIdx.x % kGroups),
          piece(threadIdx.x / kGroups),
          channels(p.s.out_channels),
          between(kBetween, width, height),
          beyond(kDepth - 4 * kBetween, width, height) {
        const std::int64_t row = block.first_row + piece * Pack<T>::size;
        const std::int64_t pixel = block.split * p.split_pixels + Tiles::pixel(group, 0);
        const std::int64_t pixels = p.s.batch * p.s.out_height * p.s.out_width;
        rest = row < p.rows ? static_cast<int>(pixels - pixel) : 0;
        channel = block.group * p.rows + row;
        signal = pixel * channels + channel;
        map = Odometer(pixel, width, height);
    }

    // The next chunk's.
    __device__ void bring() {
        if constexpr (kGathers<Source>) {
#pragma unroll 1  // they are much code, and wait for what they load in any case
            for (int i = 0; i < 4; ++i) {
                staged[0] = staged[1], staged[1] = staged[2], staged[2] = staged[3];
                staged[3] = {};
                if (i * kBetween < rest)
                    staged[3] = convert<T>(source.template load<Staged::size>(
                        steps.offset(map.high, channel, 0, 0), map.middle, map.low));
                map.advance(between, width, height);
            }
            map.advance(beyond, width, height);
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                staged[i] = {};
                if (i * kBetween < rest)
                    staged[i] =
                        source.template load<Staged::size>(signal + i * kBetween * channels, 0, 0);
            }
        }
        signal += kDepth * channels;
        rest -= kDepth;
    }
    __device__ void store(Piece* tile) {
        if (rectified)
#pragma unroll
            for (Staged& vector : staged) rectify_all(vector);
        if constexpr (std::is_same_v<Factors, Tf32>)
#pragma unroll
            for (Staged& vector : staged)
#pragma unroll
                for (T& value : vector.value) value *= kNudge;
        Tiles::store_signal(reinterpret_cast<Staged*>(tile), group, piece, staged);
    }
};

// The stages, and the places of two chunks' pixels.
template <typename T, typename Tile>
constexpr int gradient_shared_bytes =
    Tile::kSharedBytes + 2 * PixelTiles<T, Tile>::kDepth * int(sizeof(Piece));

template <typename Factors, typename Tile, typename Source>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kResident)
    weight_gradient_mma_kernel(GradientPlan p, const typename Factors::T* image_values,
                               Source source, float* partial) {
    using T = typename Factors::T;
    using Tiles = PixelTiles<T, Tile>;
    constexpr int kStages = Tile::kStages, kAhead = kStages - 1;
    if constexpr (!kMultiplies<Factors>) return never_launched();
    ZF_DYNAMIC_SHARED(Piece, stages);
    const auto block = GradientBlock::find<Tile::kM, Tiles::kDepth>(p);
    const int chunks = static_cast<int>(block.chunks);
    ImageLoads<T, Tile> image(p, block, image_values, stages + kStages * Tile::kStagePieces);
    SignalLoads<Factors, Tile, Source> signal(p, block, source);

    const auto bring = [&](int chunk, int buffer) {
        if (chunk < chunks) {
            image.bring(chunk, stages + buffer * Tile::kStagePieces);
            signal.bring();
        }
        cp_async_commit();  // perhaps an empty group, so that the newest two are always the same
        image.find_places(chunk + 1);
    };
    const auto finish = [&](int chunk, int buffer) {
        if (chunk < chunks) signal.store(stages + buffer * Tile::kStagePieces + Tiles::kRight);
    };

    image.find_places(0);
#pragma unroll
    for (int chunk = 0; chunk < kAhead; ++chunk) {
        __syncthreads();
        bring(chunk, chunk);
        finish(chunk, chunk);
    }
    typename Tile::Accumulator sum = {};
    const auto lane = Tiles::lane();
    int full = 0, empty = kAhead;  // buffers
    for (int chunk = 0; chunk < chunks; ++chunk) {
        // Everybody's copies of this chunk have come, and nobody reads the chunk before it any
        // more.
        cp_async_wait<kStages - 2>();
        __syncthreads();
        bring(chunk + kAhead, empty);
        multiply_pixels<Factors, Tile>(lane, stages + full * Tile::kStagePieces, sum);
        finish(chunk + kAhead, empty);
        empty = full;
        full = full + 1 < kStages ? full + 1 : 0;
    }
    cp_async_wait<0>();

#pragma unroll
    for (int j = 0; j < Tile::kWarpN / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const std::int64_t row = block.first_row + Tiles::row(j, e);
            if (row >= p.rows) continue;
            float* const to = partial + block.target(p, row);
#pragma unroll
            for (int i = 0; i < Tile::kWarpM / 16; ++i)
#pragma unroll
                for (int h = 0; h < 2; h += Tiles::kRun) {
                    const std::int64_t column = block.first_column + Tiles::column(i, h);
                    Vector<float, Tiles::kRun> run;
#pragma unroll
                    for (int r = 0; r < Tiles::kRun; ++r) run.value[r] = sum[i][j][2 * (h + r) + e];
                    if (column < p.columns) store_vector(to + column, run);
                }
        }
}

}  // namespace zfcuda
