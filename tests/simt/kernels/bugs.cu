// Mistakes that people make, which the emulator must name; Bug 0 is right. test_bugs.py has the
// list with the report that each must cause.
#include "call.h"
#include "port.cuh"

namespace zfcuda {
namespace {

constexpr int kTile = 8, kBugs = 26;

// out[x, y] = in[y, x] for a square matrix of `size`: each block walks along a row of tiles.
template <int Bug>
__global__ void transpose_kernel(int size, const float* in, float* out) {
    ZF_SHARED(float, tile, kTile*(kTile + 1));
    const int x = threadIdx.x, y = threadIdx.y;
    constexpr int stride = Bug == 4 ? kTile + 2 : kTile + 1;
    for (int left = 0; left < size; left += kTile) {
        const int row = blockIdx.x * kTile + y;
        if (Bug == 9) const_cast<float*>(in)[0] = 0;
        if (!(Bug == 8 && x == 3)) tile[y * stride + x] = in[row * size + left + x + (Bug == 3)];
        if (Bug == 10) {
            if (y < 4)
                __syncthreads();
            else
                __syncthreads();
        } else if (Bug == 11) {
            if (y == 7) return;
            __syncthreads();
        } else if (Bug != 1) {
            __syncthreads();
        }
        if (!(Bug == 7 && x == 1 && y == 1))
            out[(left + y) * size + (Bug == 17 ? 0 : blockIdx.x * kTile) + x] =
                tile[x * stride + y];
        if (Bug != 2) __syncthreads();
    }
}

// counts[v] = how often v stands in values, by one block; total = how many there are.
template <int Bug>
__global__ void histogram_kernel(int size, const int* values, int* counts, int* total) {
    ZF_SHARED(int, bins, 16);
    ZF_SHARED(int, sums, 2);
    const int thread = threadIdx.x, lane = thread % 32;
    if (thread < 16) bins[thread] = 0;
    __syncthreads();
    int mine = 0;
    for (int i = thread; i < size; i += blockDim.x) {
        ++mine;
        if (Bug == 6)
            bins[values[i]] += 1;
        else
            atomicAdd(&bins[values[i]], 1);
    }
    __syncthreads();
    if (thread < 4) {
        const int first = 4 * thread - (Bug == 5 && thread == 3 ? 2 : 0);
        const int4 four = *reinterpret_cast<const int4*>(&bins[first]);
        counts[4 * thread] = four.x;
        counts[4 * thread + 1] = four.y;
        counts[4 * thread + 2] = four.z;
        counts[4 * thread + 3] = four.w;
    }
    if (!(Bug == 12 && lane >= 16) && !(Bug == 15 && lane == 20)) {
        const unsigned mask = Bug == 13 && lane == 5 ? ~(1u << 5) : ~0u;
        for (int step = 16; step > 0; step /= 2) mine += __shfl_down_sync(mask, mine, step);
    } else if (Bug == 15) {
        mine += __shfl_down_sync(~0u, mine, 16);  // the same operation, but another place
    }
    if (lane == 0) sums[thread / 32] = mine;
    __syncthreads();
    if (thread == 1) *total = sums[0] + sums[1];
}

// out[i] = in[i ^ 1], through shared memory, within each warp.
template <int Bug>
__global__ void swap_kernel(const int* in, int* out) {
    ZF_SHARED(int, pair, 64);
    const int thread = threadIdx.x;
    pair[thread] = in[thread];
    if (Bug == 14)
        __shfl_sync(~0u, thread, 0);  // a shuffle orders no memory
    else if (Bug == 16)
        __syncwarp(0x0000ffffu << (thread & 16));  // each half by itself
    else
        __syncwarp();
    out[thread] = pair[thread ^ (Bug == 18 ? 32 : Bug == 16 ? 16 : 1)];
}

// out[turn][i] = in[turn][63 - i] + 63 - i: two teams take turns, of which the first has more.
template <int Bug>
__global__ void teams_kernel(const int* in, int* out) {
    ZF_SHARED(int, common, 64);
    ZF_SHARED(int, rows, 2 * 64);
    const int thread = threadIdx.x, team = threadIdx.y;
    if (team == 0) common[thread] = thread;
    if (Bug == 19)
        sync_team<64>();
    else
        __syncthreads();
    if (Bug == 23 && thread == 7) return;
    for (int turn = team; turn < 5; turn += 2) {
        rows[64 * team + thread] = in[64 * turn + thread];
        if (Bug == 20) {
            __syncwarp();
        } else if (Bug == 22 && thread < 32) {
            sync_team<64>();
        } else {
            sync_team<64>();
        }
        const int other = 63 - thread, from = Bug == 21 ? 1 - team : team;
        out[64 * turn + thread] = rows[64 * from + other] + common[other];
        if (Bug != 24) sync_team<Bug == 25 ? 128 : 64>();
    }
}

}  // namespace

ZF_EXPORT const char* transpose(int bug, int size, const float* in, float* out) {
    return message_of([&] {
        with_constant<kBugs>(bug, [&](auto b) {
            launch(transpose_kernel<decltype(b)::value>, dim3(size / kTile), dim3(kTile, kTile), 0,
                   Exec{}, size, in, out);
        });
    });
}

ZF_EXPORT const char* histogram(int bug, int size, const int* values, int* counts, int* total) {
    return message_of([&] {
        with_constant<kBugs>(bug, [&](auto b) {
            launch(histogram_kernel<decltype(b)::value>, dim3(1), dim3(64), 0, Exec{}, size, values,
                   counts, total);
        });
    });
}

ZF_EXPORT const char* teams(int bug, const int* in, int* out) {
    return message_of([&] {
        with_constant<kBugs>(bug, [&](auto b) {
            launch(teams_kernel<decltype(b)::value>, dim3(1), dim3(64, 2), 0, Exec{}, in, out);
        });
    });
}

ZF_EXPORT const char* swap(int bug, const int* in, int* out) {
    return message_of([&] {
        with_constant<kBugs>(bug, [&](auto b) {
            launch(swap_kernel<decltype(b)::value>, dim3(1), dim3(64), 0, Exec{}, in, out);
        });
    });
}

}  // namespace zfcuda
