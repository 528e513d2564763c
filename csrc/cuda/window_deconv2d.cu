// One step of a receptive-field-local projection for all windows at once: unpool, gate, transposed
// convolution, clip.
//
//   maps[i, y, x, o]  = (positive) sum of signal[i, w, o] over the windows w of the pool whose
//                       switch points to (y, x); without a pool signal[i, y, x, o]
//   image[i, y, x, c] = sum over o, ky, kx of weight[o, c, ky, kx] * gate(maps)[i, my, mx, o]
//                       with my * stride + ky * dilation = y, likewise mx;
//                       0 where origins[i] + (y, x) lies outside the whole map
//
//   signal            maps                 image
//   +----+  unpool,   +--------+  tap_gemm  +--------------+
//   |    | ---------> |        | ---------> | whole  | 0 0 |   0: the window's part beyond the map
//   +----+  bits      +--------+            | map    | 0 0 |
//                                           +--------------+
//
// The product is deconv2d's, with the windows as its batch: its rows are pixels of all windows, so
// tiles are full however small a window is, and a weight is read once a tile instead of once a
// window, as a block a window would. Its gate rectifies while it loads. Maps that are unpooled or
// masked are written first, by gathering (pool_windows.cuh), for as many windows at a time as fit
// kMapsBytes, so that an L2 of that size still has them when they are read. At last a warp a row
// clears what lies outside. Every order is fixed; nothing is added atomically.
// Work: 2 * windows * taps * map positions * in_channels * out_channels / groups operations. Least
// bytes: signal + switches + bits + weights + image; maps that must be written come on top, twice.
// The zeros that unpooling leaves are multiplied. They are most of what there is, but each channel
// has its own: passing over them takes lists of the others, which is the fast form to come.
// Measured: not yet, for want of a GPU; `make bench` on one fills this line.
#include <algorithm>

#include "gate.cuh"
#include "packed_deconv2d.cuh"
#include "pool_windows.cuh"

namespace zfcuda {
namespace {

constexpr std::int64_t kMapsBytes = 32 << 20;

// The maps that the product reads: unpooled, zero where the forward map was not positive.
template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads)
    window_maps_kernel(Windows w, const T* signal, const std::uint8_t* switches,
                       const std::uint8_t* positive, std::int64_t bit_bytes, T* maps) {
    for_each_place(w.unpooled, [&](std::int64_t index, const Place& place) {
        Vector<Sum<T>, kVector> sum = {};
        for_each_window(w, place, [&](std::int64_t offset, int here) {
            const auto value = load_wide<T, kVector>(signal + offset);
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
                if (!(bits >> e & 1)) sum.value[e] = Sum<T>(0);
        }
        store_rounded(maps + index * kVector, sum);
    });
}

// Zero outside the whole map: a warp a row, whose parts outside are runs of elements.
template <typename Word>
__global__ void __launch_bounds__(kThreads)
    clip_windows_kernel(WindowShape s, const std::int64_t* origins, Word* image) {
    const std::int64_t row = std::int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
    if (row >= s.windows * s.in_height) return;
    const std::int64_t* const origin = origins + row / s.in_height * 2;
    const std::int64_t y = origin[0] + row % s.in_height;
    const auto clamp = [&](std::int64_t x) { return x < 0 ? 0 : x < s.in_width ? x : s.in_width; };
    const bool inside = y >= 0 && y < s.image_height;
    const std::int64_t first = inside ? clamp(-origin[1]) : s.in_width;
    const std::int64_t last = inside ? clamp(s.image_width - origin[1]) : s.in_width;
    Word* const to = image + row * s.in_width * s.in_channels;
    const int lane = threadIdx.x % 32;
    for (std::int64_t i = lane; i < first * s.in_channels; i += 32) to[i] = Word(0);
    for (std::int64_t i = last * s.in_channels + lane; i < s.in_width * s.in_channels; i += 32)
        to[i] = Word(0);
}

// Windows whose maps are in the workspace at a time.
std::int64_t chunk_windows(const WindowShape& s, Dtype dtype) {
    const std::int64_t bytes = s.out_height * s.out_width * s.out_channels * element_bytes(dtype);
    return std::clamp<std::int64_t>(kMapsBytes / bytes, 1, s.windows);
}

ConvShape convolution(const WindowShape& s, std::int64_t windows) {
    ConvShape c = {};
    c.batch = windows, c.groups = s.groups, c.channels_last = 1;
    c.in_channels = s.in_channels, c.in_height = s.in_height, c.in_width = s.in_width;
    c.out_channels = s.out_channels, c.out_height = s.out_height, c.out_width = s.out_width;
    c.kernel_h = s.kernel_h, c.kernel_w = s.kernel_w;
    c.stride_h = s.stride_h, c.stride_w = s.stride_w;
    c.dilation_h = s.dilation_h, c.dilation_w = s.dilation_w;
    return c;
}

// The pool of `windows` windows; without one, of single positions.
PoolShape pool(const WindowShape& s, std::int64_t windows) {
    PoolShape p = {};
    p.batch = windows, p.channels = s.out_channels, p.channels_last = 1;
    p.in_height = s.out_height, p.in_width = s.out_width;
    const bool any = s.pooled();
    p.out_height = any ? s.pooled_height : s.out_height;
    p.out_width = any ? s.pooled_width : s.out_width;
    p.kernel_h = any ? s.pool_kernel_h : 1, p.kernel_w = any ? s.pool_kernel_w : 1;
    p.stride_h = any ? s.pool_stride_h : 1, p.stride_w = any ? s.pool_stride_w : 1;
    p.dilation_h = any ? s.pool_dilation_h : 1, p.dilation_w = any ? s.pool_dilation_w : 1;
    return p;
}

// The address `elements` of `bytes` bytes further on; null stays null.
Address advance(Address address, std::int64_t elements, std::int64_t bytes) {
    return address ? Address{address.as<char>() + elements * bytes} : address;
}

void write_maps(const PoolShape& p, Dtype dtype, std::int64_t bit_bytes, Address signal,
                Address switches, Address positive, Address maps, const Exec& exec) {
    const bool four = four_channels(p.input(), dtype, signal, switches, maps);
    with_vector(dtype, four, [&](auto zero, auto vector) {
        using T = decltype(zero);
        const Windows windows(p, vector);
        launch(window_maps_kernel<T, vector()>, windows.unpooled.grid(), dim3(kThreads), 0, exec,
               windows, signal.as<const T>(), switches.as<const std::uint8_t>(),
               positive.as<const std::uint8_t>(), bit_bytes, maps.as<T>());
    });
}

void clip_windows(const WindowShape& s, Dtype dtype, Address origins, Address image,
                  const Exec& exec) {
    const std::int64_t blocks = (s.windows * s.in_height + kThreads / 32 - 1) / (kThreads / 32);
    if (blocks > std::numeric_limits<int>::max())
        throw std::runtime_error("zfcuda: window_deconv2d of over 2^34 rows");
    with_word(dtype, [&](auto word) {
        using Word = decltype(word);
        launch(clip_windows_kernel<Word>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0,
               exec, s, origins.as<const std::int64_t>(), image.as<Word>());
    });
}

}  // namespace

std::int64_t window_deconv2d_packed(const WindowShape& s, Dtype dtype, const Exec& exec) {
    return deconv2d_packed_bytes(convolution(s, 1), dtype, exec);
}

void window_deconv2d_pack(const WindowShape& s, Dtype dtype, Address weight, Address packed,
                          const Exec& exec) {
    deconv2d_pack(convolution(s, 1), dtype, weight, packed, exec);
}

std::int64_t window_deconv2d_workspace(const WindowShape& s, Dtype dtype, const Exec&) {
    const std::int64_t maps = s.out_height * s.out_width * s.out_channels;
    return chunk_windows(s, dtype) * maps * element_bytes(dtype);
}

void window_deconv2d(const WindowShape& s, Dtype dtype, Gate gate, Address signal, Address switches,
                     Address positive, Address packed, Address origins, Address image,
                     Address workspace, const Exec& exec) {
    if (s.windows == 0) return;
    // The signal is the maps, unless only a copy of it is aligned.
    const bool direct = !switches && !positive && aligned(signal);
    const std::int64_t positions = s.out_height * s.out_width, bytes = element_bytes(dtype);
    const std::int64_t chunk = direct ? s.windows : chunk_windows(s, dtype);
    const Gate rectifier = static_cast<Gate>(static_cast<int>(gate) & kRectify);
    const Address maps = direct ? signal : workspace;
    for (std::int64_t first = 0; first < s.windows; first += chunk) {
        const std::int64_t windows = std::min(chunk, s.windows - first);
        const PoolShape unpool = pool(s, windows);
        const std::int64_t from = first * s.out_channels * unpool.out_height * unpool.out_width;
        if (!direct)
            write_maps(unpool, dtype, s.bit_bytes(), advance(signal, from, bytes),
                       advance(switches, from, 1),
                       advance(positive, first * positions * s.bit_bytes(), 1), maps, exec);
        const std::int64_t to = first * s.in_height * s.in_width * s.in_channels;
        deconv2d_packed(convolution(s, windows), dtype, rectifier, maps, packed,
                        advance(image, to, bytes), exec);
    }
    clip_windows(s, dtype, origins, image, exec);
}

}  // namespace zfcuda
