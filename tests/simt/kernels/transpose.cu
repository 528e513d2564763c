// The injected bugs of ordinary kernels: each BUG is a mistake that people make, and the emulator
// must name it. BUG=0 is right. Two kernels: a tiled transpose and a histogram.
//
//    1 missing barrier after the fill        8 uninitialised shared read
//    2 missing barrier before the refill     9 write to an input
//    3 out of bounds by one                 10 divergent barrier
//    4 wrong stride of the tile             11 barrier after an exit
//    5 misaligned vector access             12 part of a warp in a shuffle
//    6 lost atomic                          13 lane outside its mask
//    7 one element forgotten                14 missing __syncwarp
#include "port.cuh"

#if !defined(BUG)
#define BUG 0
#endif

namespace zfcuda {
namespace {

constexpr int kTile = 8;

// out[x, y] = in[y, x] for a square matrix of `size`, one block walking along a row of tiles.
__global__ void transpose_kernel(int size, const float* in, float* out) {
    ZF_SHARED(float, tile, kTile * (kTile + 1));
    const int x = threadIdx.x, y = threadIdx.y;
    constexpr int stride = BUG == 4 ? kTile + 2 : kTile + 1;
    for (int left = 0; left < size; left += kTile) {
        const int row = blockIdx.x * kTile + y;
#if BUG == 9
        const_cast<float*>(in)[0] = 0;
#endif
        if (!(BUG == 8 && x == 3)) tile[y * stride + x] = in[row * size + left + x + (BUG == 3)];
#if BUG == 10
        if (y < 4)
            __syncthreads();
        else
            __syncthreads();
#elif BUG == 11
        if (y == 7) return;
        __syncthreads();
#elif BUG != 1
        __syncthreads();
#endif
        if (!(BUG == 7 && x == 1 && y == 1))
            out[(left + y) * size + blockIdx.x * kTile + x] = tile[x * stride + y];
#if BUG != 2
        __syncthreads();
#endif
    }
}

// counts[v] = how often v stands in values, by one block; total = how many there are.
__global__ void histogram_kernel(int size, const int* values, int* counts, int* total) {
    ZF_SHARED(int, bins, 16);
    const int thread = threadIdx.x;
    if (thread < 16) bins[thread] = 0;
    __syncthreads();
    int mine = 0;
    for (int i = thread; i < size; i += blockDim.x) {
        ++mine;
#if BUG == 6
        bins[values[i]] += 1;
#else
        atomicAdd(&bins[values[i]], 1);
#endif
    }
    __syncthreads();
    if (thread < 4) {
        const int4 four = *reinterpret_cast<const int4*>(&bins[BUG == 5 ? 4 * thread - 2 * (thread == 3) : 4 * thread]);
        counts[4 * thread] = four.x;
        counts[4 * thread + 1] = four.y;
        counts[4 * thread + 2] = four.z;
        counts[4 * thread + 3] = four.w;
    }
    ZF_SHARED(int, sums, 2);
#if BUG == 12
    if (thread % 32 < 16)
#endif
        for (int step = 16; step > 0; step /= 2)
            mine += __shfl_down_sync(BUG == 13 && thread == 5 ? ~(1u << 5) : ~0u, mine, step);
    if (thread % 32 == 0) sums[thread / 32] = mine;
#if BUG != 14
    __syncthreads();
#endif
    if (thread == 1) *total = sums[0] + sums[1];
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const char* transpose(int size, const float* in,
                                                                        float* out) try {
    launch(transpose_kernel, dim3(size / kTile), dim3(kTile, kTile), 0, Exec{}, size, in, out);
    return nullptr;
} catch (const std::exception& error) {
    static std::string message;
    return (message = error.what()).c_str();
}

extern "C" __attribute__((visibility("default"))) const char* histogram(int size, const int* values,
                                                                        int* counts,
                                                                        int* total) try {
    launch(histogram_kernel, dim3(1), dim3(64), 0, Exec{}, size, values, counts, total);
    return nullptr;
} catch (const std::exception& error) {
    static std::string message;
    return (message = error.what()).c_str();
}

}  // namespace zfcuda
