// One step of a receptive-field-local projection for all windows at once: unpool, gate, transposed
// convolution, clip.
//
//   maps[i, y, x, o]  = (positive) sum of signal[i, w, o] over the windows w of the pool whose
//                       switch points to (y, x); without a pool signal[i, y, x, o]
//   image[i, y, x, c] = sum over o, ky, kx of weight[o, c, ky, kx] * gate(maps)[i, my, mx, o]
//                       with my * stride + ky * dilation = y, likewise mx;
//                       0 where origins[i] + (y, x) lies outside the whole map
//
//   signal         maps           image            the whole map below
//   +--+ unpool    +------+       +------------+   +-- - - -
//   |  | -------->  |  bits|  ---> |            |   |  the window's part outside is cleared
//   +--+           +------+ gemm  +------------+
//
// The product is deconv2d's, with the windows as its batch: rows of the product are pixels of all
// windows, so tiles are full however small a window is, and a weight is read once a tile, not once
// a window. Its gate rectifies while it loads. Unpooled or masked maps are written first, by
// gathering, for as many windows at a time as fit kMapsBytes, which an L2 of that size keeps.
// Then a warp a row clears what lies outside. Every order is fixed; no atomics.
// Work: 2 * windows * taps * map positions * in_channels * out_channels operations (a group's
// share of each). Least bytes: signal + switches + bits + weights + image; the maps, written and
// read once where there are any, come on top, from L2.
// The zeros that unpooling leaves are multiplied (at most one position in stride² is not zero, but
// which one differs between channels): to skip them needs lists, the fast form to come.
// Measured: not yet, for want of a GPU; `make bench` on one fills this line.
#include <algorithm>

#include "gate.cuh"
#include "pool_windows.cuh"

namespace zfcuda {
namespace {

constexpr std::int64_t kMapsBytes = 32 << 20;

template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads)
    window_maps_kernel(Windows w, const T* signal, const std::uint8_t* switches,
                       const std::uint8_t* positive, std::int64_t bit_bytes, T* maps) {
    for_each_place(w.unpooled, [&](std::int64_t index, const Place& place) {
        Vector<T, kVector> sum = {};
        for_each_window(w, place, [&](std::int64_t offset, int here) {
            const auto value = load_vector<T, kVector>(signal + offset);
            Vector<std::uint8_t, kVector> where = {};  // without a pool: the only position, 0
            if (switches != nullptr) where = load_vector<std::uint8_t, kVector>(switches + offset);
#pragma unroll
            for (int e = 0; e < kVector; ++e)
                if (where.value[e] == here) sum.value[e] += value.value[e];
        });
        if (positive != nullptr) {
            const std::int64_t pixel = (place.slab * w.height + place.y) * w.width + place.x;
            const int channel = place.inner * kVector;
            const int bits = positive[pixel * bit_bytes + channel / 8] >> channel % 8;
#pragma unroll
            for (int e = 0; e < kVector; ++e)
                if (!(bits >> e & 1)) sum.value[e] = T(0);
        }
        store_vector(maps + index * kVector, sum);
    });
}

// Zero outside the whole map: a warp a row, whose parts outside are runs of elements.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    clip_windows_kernel(WindowShape s, const std::int64_t* origins, T* image) {
    const std::int64_t row = std::int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
    if (row >= s.windows * s.in_height) return;
    const std::int64_t* const origin = origins + row / s.in_height * 2;
    const std::int64_t y = origin[0] + row % s.in_height;
    const auto clamp = [&](std::int64_t x) { return x < 0 ? 0 : x < s.in_width ? x : s.in_width; };
    const bool inside = y >= 0 && y < s.image_height;
    const std::int64_t first = inside ? clamp(-origin[1]) : s.in_width;
    const std::int64_t last = inside ? clamp(s.image_width - origin[1]) : s.in_width;
    T* const to = image + row * s.in_width * s.in_channels;
    const int lane = threadIdx.x % 32;
    for (std::int64_t i = lane; i < first * s.in_channels; i += 32) to[i] = T(0);
    for (std::int64_t i = last * s.in_channels + lane; i < s.in_width * s.in_channels; i += 32)
        to[i] = T(0);
}

// The weight packed for many calls is the weight: deconv2d packs nothing.
__global__ void __launch_bounds__(kThreads)
    copy_words_kernel(std::int64_t words, const std::uint32_t* from, std::uint32_t* to) {
    const std::int64_t i = std::int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (i < words) to[i] = from[i];
}

std::int64_t element_bytes(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 8; }

// Windows whose maps are in the workspace at a time.
std::int64_t chunk_windows(const WindowShape& s, Dtype dtype) {
    const std::int64_t bytes = s.out_height * s.out_width * s.out_channels * element_bytes(dtype);
    return std::clamp<std::int64_t>(kMapsBytes / bytes, 1, s.windows);
}

ConvShape convolution(const WindowShape& s, std::int64_t windows) {
    return {windows,
            s.in_channels,
            s.in_height,
            s.in_width,
            s.out_channels,
            s.out_height,
            s.out_width,
            s.kernel_h,
            s.kernel_w,
            s.stride_h,
            s.stride_w,
            0,
            0,
            s.dilation_h,
            s.dilation_w,
            s.groups,
            1};
}

// The pool of `windows` windows; without one, of single positions.
PoolShape pool(const WindowShape& s, std::int64_t windows) {
    PoolShape p = {windows,
                   s.out_channels,
                   s.out_height,
                   s.out_width,
                   s.out_height,
                   s.out_width,
                   1,
                   1,
                   1,
                   1,
                   0,
                   0,
                   1,
                   1,
                   1};
    if (s.pooled()) {
        p.out_height = s.pooled_height, p.out_width = s.pooled_width;
        p.kernel_h = s.pool_kernel_h, p.kernel_w = s.pool_kernel_w;
        p.stride_h = s.pool_stride_h, p.stride_w = s.pool_stride_w;
        p.dilation_h = s.pool_dilation_h, p.dilation_w = s.pool_dilation_w;
    }
    return p;
}

// The address `elements` of `bytes` bytes further on; null stays null.
Address advance(Address address, std::int64_t elements, std::int64_t bytes) {
    return address ? Address{address.as<char>() + elements * bytes} : address;
}

void write_maps(const PoolShape& p, Dtype dtype, std::int64_t bit_bytes, Address signal,
                Address switches, Address positive, Address maps, const Exec& exec) {
    const auto run = [&](auto kernel, auto zero, int vector) {
        using T = decltype(zero);
        const Windows windows(p, vector);
        launch(kernel, windows.unpooled.grid(), dim3(kThreads), 0, exec, windows,
               signal.as<const T>(), switches.as<const std::uint8_t>(),
               positive.as<const std::uint8_t>(), bit_bytes, maps.as<T>());
    };
    if (four_channels(p.input(), dtype, signal, switches, maps))
        run(window_maps_kernel<float, 4>, float{}, 4);
    else if (dtype == Dtype::float32)
        run(window_maps_kernel<float, 1>, float{}, 1);
    else
        run(window_maps_kernel<double, 1>, double{}, 1);
}

template <typename T>
void clip_windows(const WindowShape& s, Address origins, Address image, const Exec& exec) {
    const std::int64_t blocks = (s.windows * s.in_height + kThreads / 32 - 1) / (kThreads / 32);
    if (blocks > std::numeric_limits<int>::max())
        throw std::runtime_error("zfcuda: window_deconv2d of over 2^34 rows");
    launch(clip_windows_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, exec, s,
           origins.as<const std::int64_t>(), image.as<T>());
}

// Where the maps lie in the workspace, behind the convolution's own.
std::int64_t maps_at(const WindowShape& s, Dtype dtype, const Exec& exec) {
    return (deconv2d_workspace(convolution(s, 1), dtype, exec) + 15) / 16 * 16;
}

}  // namespace

std::int64_t window_deconv2d_packed(const WindowShape& s, Dtype dtype, const Exec&) {
    return s.out_channels * s.in_per_group() * s.taps() * element_bytes(dtype);
}

void window_deconv2d_pack(const WindowShape& s, Dtype dtype, Address weight, Address packed,
                          const Exec& exec) {
    const std::int64_t words = window_deconv2d_packed(s, dtype, exec) / 4;
    const auto blocks = static_cast<unsigned>((words + kThreads - 1) / kThreads);
    launch(copy_words_kernel, dim3(blocks), dim3(kThreads), 0, exec, words,
           weight.as<const std::uint32_t>(), packed.as<std::uint32_t>());
}

std::int64_t window_deconv2d_workspace(const WindowShape& s, Dtype dtype, const Exec& exec) {
    const std::int64_t maps = s.out_height * s.out_width * s.out_channels;
    return maps_at(s, dtype, exec) + chunk_windows(s, dtype) * maps * element_bytes(dtype);
}

void window_deconv2d(const WindowShape& s, Dtype dtype, Gate gate, Address signal, Address switches,
                     Address positive, Address packed, Address origins, Address image,
                     Address workspace, const Exec& exec) {
    if (s.windows == 0) return;
    const bool direct = !switches && !positive;  // the signal is the maps
    const std::int64_t positions = s.out_height * s.out_width, bytes = element_bytes(dtype);
    const std::int64_t chunk = direct ? s.windows : chunk_windows(s, dtype);
    const Gate rectifier = static_cast<Gate>(static_cast<int>(gate) & kRectify);
    const Address maps = direct ? signal : advance(workspace, maps_at(s, dtype, exec), 1);
    for (std::int64_t first = 0; first < s.windows; first += chunk) {
        const std::int64_t windows = std::min(chunk, s.windows - first);
        const PoolShape unpool = pool(s, windows);
        const std::int64_t from = first * s.out_channels * unpool.out_height * unpool.out_width;
        if (!direct)
            write_maps(unpool, dtype, s.bit_bytes(), advance(signal, from, bytes),
                       advance(switches, from, 1),
                       advance(positive, first * positions * s.bit_bytes(), 1), maps, exec);
        const std::int64_t to = first * s.in_height * s.in_width * s.in_channels;
        deconv2d(convolution(s, windows), dtype, rectifier, maps, Address{}, packed, Address{},
                 advance(image, to, bytes), workspace, exec);
    }
    (dtype == Dtype::float32 ? clip_windows<float> : clip_windows<double>)(s, origins, image, exec);
}

}  // namespace zfcuda
