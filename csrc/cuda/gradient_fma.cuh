// The weight gradient by FMA; conv2d_weight_gradient.cu has the equation.
//
//                         columns j = (i, tap) in NCHW, (tap, i) in NHWC
//                        +-----------+
//   k = pixels (n,y,x)   | image     |
//   of one split         | under tap |
//   +--------------------+-----------+
//   | signal             | gradient  |   rows o; 64 x 64 results a block, 4 x 4 a thread
//   +--------------------+-----------+
//
// Lanes run along pixels in NCHW and along channels in NHWC (by four where they are a multiple of
// four): neighbours in memory either way. Static: at most 128 registers a thread in float32, 17 KiB
// of shared memory; FFMA are 34 % of the main loop in NCHW, 26 % in NHWC and 54 % by four channels
// (sm_90): addresses cost most here.
// Tried: the column's place in the image from shared memory in NHWC, too (four passes of the banks
// a load); gathered signals unrolled (5000 instructions a loop, of which FFMA were 5 %; rolled
// 15 %).
#pragma once

#include "gradient_plan.cuh"
#include "tile.cuh"
#include "unpooled_source.cuh"

namespace zfcuda {

constexpr int kFmaSide = 64;  // of the tile of results

template <typename T, bool kChannelsLast, int kVector, typename Source>
__global__ void __launch_bounds__(kTileThreads, kResidentBlocks<Sum<T>>)
    weight_gradient_kernel(GradientPlan p, const T* image, Source source, Sum<T>* partial) {
    using V = Sum<T>;
    using Product = Tile<V, kFmaSide, kFmaSide>;
    constexpr int kDepth = Product::kDepth, kPack = Pack<V>::size;
    ZF_SHARED(Pack<V>, left_tiles, 2 * kDepth * kFmaSide / kPack);
    ZF_SHARED(Pack<V>, right_tiles, 2 * kDepth * kFmaSide / kPack);
    ZF_SHARED(Column, columns, kChannelsLast ? 1 : kFmaSide);
    V* const left = reinterpret_cast<V*>(left_tiles);
    V* const right = reinterpret_cast<V*>(right_tiles);
    const ConvShape& s = p.s;
    Layout from = s.image();
    TapSteps steps = p.steps;
    from.channels_last = kChannelsLast;  // known to the compiler
    if (kChannelsLast) steps.channel = 1;
    const int thread = threadIdx.x;
    const auto block = GradientBlock::find<kFmaSide, kDepth>(p);

    // A thread brings kLoads packs of each tile: NCHW at one pixel (lanes along pixels), NHWC at
    // one column (lanes along columns).
    constexpr int kLanes = kChannelsLast ? kFmaSide / kVector : kDepth;
    constexpr int kStep = kTileThreads / kLanes;
    constexpr int kLoads = kFmaSide * kDepth / (kTileThreads * kVector);
    const int load_k = kChannelsLast ? thread / kLanes : thread % kLanes;
    const int load_column = kChannelsLast ? thread % kLanes * kVector : thread / kLanes;
    const int width = static_cast<int>(s.out_width), height = static_cast<int>(s.out_height);
    const Odometer depth(kDepth, width, height), step(kStep, width, height);
    Odometer pixel(block.split * p.split_pixels + load_k, width, height);

    // What its columns read: in NHWC one of its own, in NCHW those of all lanes.
    const Column own(p, from, block.group, block.first_column + load_column);
    if (!kChannelsLast) {
        if (thread < kFmaSide)
            columns[thread] = Column(p, from, block.group, block.first_column + thread);
        __syncthreads();
    }

    using Left = Vector<typename Source::Value, kVector>;
    Left staged_left[kLoads];
    Vector<T, kVector> staged_right[kLoads];
    auto fetch_left = [&](const Odometer& at, int column) -> Left {
        const std::int64_t row = block.first_row + column;
        if (at.high >= s.batch || row >= p.rows) return {};
        return source.template load<kVector>(
            steps.offset(at.high, block.group * p.rows + row, at.middle, at.low), at.middle,
            at.low);
    };
    auto fetch_right = [&](const Odometer& at, int column) -> Vector<T, kVector> {
        const Column tap = kChannelsLast ? own : columns[column];
        const std::int64_t y = at.middle * s.stride_h, x = at.low * s.stride_w;
        const bool inside = at.high < s.batch && y + tap.y >= 0 && y + tap.y < from.height &&
                            x + tap.x >= 0 && x + tap.x < from.width;
        if (!inside) return {};
        return load_vector<T, kVector>(image + from.offset(at.high, 0, y, x) + tap.offset);
    };
    // The column of load i, and where that goes.
    const auto column_of = [&](int i) {
        return kChannelsLast ? load_column : load_column + i * kStep;
    };
    const auto slot = [&](int buffer, int i) {
        const int k = kChannelsLast ? load_k + i * kStep : load_k;
        return buffer * kDepth * kFmaSide + tile_slot<kFmaSide>(k, column_of(i));
    };
    const auto put_left = [&](int buffer, int i, const Left& loaded) {
        auto values = convert<V>(loaded);
        if (p.rectify) rectify_all(values);
        store_vector(left + slot(buffer, i), values);
    };
    // What is gathered goes to the free buffer at once, in a loop: unrolled it would be long.
    constexpr bool kAtOnce = kGathers<Source>;
    auto fetch = [&](int buffer) {
        Odometer at = pixel;
        if constexpr (kAtOnce)
#pragma unroll 1
            for (int i = 0; i < kLoads; ++i) {
                put_left(buffer, i, fetch_left(at, column_of(i)));
                if (kChannelsLast) at.advance(step, width, height);
            }
        at = pixel;
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            if constexpr (!kAtOnce) staged_left[i] = fetch_left(at, column_of(i));
            staged_right[i] = fetch_right(at, column_of(i));
            if (kChannelsLast) at.advance(step, width, height);
        }
        pixel.advance(depth, width, height);
    };
    auto stash = [&](int buffer) {
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            if constexpr (!kAtOnce) put_left(buffer, i, staged_left[i]);
            store_vector(right + slot(buffer, i), convert<V>(staged_right[i]));
        }
    };

    typename Product::Accumulator sum = {};
    const auto first = Product::first();
    fetch(0);
    stash(0);
    __syncthreads();
    for (std::int64_t chunk = 0; chunk < block.chunks; ++chunk) {
        const bool more = chunk + 1 < block.chunks;
        const int buffer = static_cast<int>(chunk % 2), tile = buffer * kDepth * kFmaSide;
        if (more) fetch(1 - buffer);
        Product::multiply(first, left + tile, right + tile, sum);
        if (more) stash(1 - buffer);
        __syncthreads();
    }

#pragma unroll
    for (int i = 0; i < Product::kRows; ++i) {
        const std::int64_t row = block.first_row + Product::row(i);
        if (row >= p.rows) continue;
        V* const to = partial + block.target(p, row);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const std::int64_t column = block.first_column + Product::column() + j;
            if (column < p.columns) to[column] = sum[i][j];
        }
    }
}

}  // namespace zfcuda
