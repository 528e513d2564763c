// Local response normalisation across channels, and its gradient.
//
//   d[c] = k + alpha / size * sum of x² over channels c - size/2 … c + (size-1)/2
//   y[c] = x[c] * d[c]^-beta
//   grad_x[c] = g[c] * d[c]^-beta
//               - 2 * beta * alpha / size * x[c] * sum of t over channels c - (size-1)/2 … c +
//               size/2
//   t[j] = g[j] * x[j] * d[j]^(-beta-1)
//
//          32 pixels
//         +---------+  a block: 32 pixels x 32 channels, 4 results a thread. Lanes run along
//   32    |         |  pixels in NCHW, along channels in NHWC.
//   chan- |         |
//   nels  +---------+
//
// The channels of a window are read from L1: a block reads (32 + size - 1) / 32 of its elements
// from beyond. Sums are formed anew for each channel, never by subtracting what leaves the window,
// so they lose no digits and one infinity spoils no other channel. The gradient stages t and g /
// d^beta of its channels and `size - 1` more in shared memory, kStage at a time, so any size works.
// Least bytes: two tensors forward, three backward. beta = 3/4, the paper's, takes two square roots
// instead of a power.
// Measured: not yet, for want of a GPU; `make bench` on one fills this line.
#include <limits>

#include "local_response_norm.cuh"
#include "vector.cuh"

namespace zfcuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kSide = 32, kStage = 48;
constexpr int kRow = kSide + 1;  // of a staged channel: rows and columns in different banks

template <typename T>
struct Norm : NormConstants<Sum<T>> {
    using V = Sum<T>;
    NormShape s;
    std::int64_t pixel_tiles, channel_tiles;

    Norm(const NormShape& shape, double alpha, double beta, double k)
        : NormConstants<V>(shape.size, alpha, beta, k),
          s(shape),
          pixel_tiles((s.batch * s.height * s.width + kSide - 1) / kSide),
          channel_tiles((s.channels + kSide - 1) / kSide) {}

    // [first, last) of the channels whose squares divide channel c.
    __device__ std::int64_t first(std::int64_t c) const {
        return c > s.size / 2 ? c - s.size / 2 : 0;
    }
    __device__ std::int64_t last(std::int64_t c) const {
        const std::int64_t end = c + (s.size - 1) / 2 + 1;
        return end < s.channels ? end : s.channels;
    }
    // d[c] of the pixel whose channel 0 is at `column`.
    __device__ V denominator(const T* column, std::int64_t step, std::int64_t c) const {
        V sum = V(0);
        const std::int64_t end = last(c);
        for (std::int64_t i = first(c); i < end; ++i) sum = this->add_square(sum, column[i * step]);
        return NormConstants<V>::denominator(sum);
    }
};

// Where a block's tile lies: its first pixel of all images, its first channel.
struct NormTile {
    std::int64_t pixel, channel;

    template <typename T>
    __device__ explicit NormTile(const Norm<T>& norm)
        : pixel(blockIdx.x % norm.pixel_tiles * kSide),
          channel(blockIdx.x / norm.pixel_tiles * kSide) {}
};

// The offset of a pixel's channel 0, or -1 beyond the last pixel.
__device__ std::int64_t column_offset(const NormShape& s, std::int64_t pixel) {
    const std::int64_t plane = s.height * s.width;
    if (pixel >= s.batch * plane) return -1;
    return s.channels_last ? pixel * s.channels
                           : pixel / plane * (s.channels * plane) + pixel % plane;
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    local_response_norm_kernel(Norm<T> norm, const T* input, T* output) {
    const NormShape& s = norm.s;
    const NormTile tile(norm);
    const std::int64_t step = s.layout().step_channel();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int i = warp; i < kSide; i += kWarps) {
        const std::int64_t c = tile.channel + (s.channels_last ? lane : i);
        const std::int64_t column = column_offset(s, tile.pixel + (s.channels_last ? i : lane));
        if (column < 0 || c >= s.channels) continue;
        const Sum<T> denominator = norm.denominator(input + column, step, c);
        const Sum<T> value = input[column + c * step];
        output[column + c * step] = static_cast<T>(value / norm.power(denominator));
    }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    local_response_norm_gradient_kernel(Norm<T> norm, const T* input, const T* grad_output,
                                        T* grad_input) {
    using V = Sum<T>;
    ZF_SHARED(V, terms, kStage * kRow);   // t[channel][pixel]
    ZF_SHARED(V, shares, kStage * kRow);  // g / d^beta, a channel's own share
    ZF_SHARED(V, totals, kSide * kRow);   // the gradient after a stage, for the thread that has it
    const NormShape& s = norm.s;
    const NormTile tile(norm);
    const std::int64_t step = s.layout().step_channel();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

    // Windows of the tile's channels, seen from the other side.
    const std::int64_t before = (s.size - 1) / 2, after = s.size / 2;
    const std::int64_t first = tile.channel > before ? tile.channel - before : 0;
    const std::int64_t end = tile.channel + kSide + after;
    const std::int64_t last = end < s.channels ? end : s.channels;

    const V factor = 2 * norm.beta * norm.scale;
    for (std::int64_t stage = first; stage < last; stage += kStage) {
        const int channels = static_cast<int>(last - stage < kStage ? last - stage : kStage);
        const int slow_count = s.channels_last ? kSide : channels;
        const int fast_count = s.channels_last ? channels : kSide;
        for (int slow = warp; slow < slow_count; slow += kWarps)
            for (int fast = lane; fast < fast_count; fast += 32) {
                const int channel = s.channels_last ? fast : slow;
                const int pixel = s.channels_last ? slow : fast;
                const std::int64_t column = column_offset(s, tile.pixel + pixel);
                const std::int64_t c = stage + channel;
                V share = V(0), term = V(0);
                if (column >= 0) {
                    const std::int64_t offset = column + c * step;
                    const V denominator = norm.denominator(input + column, step, c);
                    share = V(grad_output[offset]) / norm.power(denominator);
                    term = share * V(input[offset]) / denominator;
                }
                terms[channel * kRow + pixel] = term;
                shares[channel * kRow + pixel] = share;
            }
        __syncthreads();
        for (int slow = warp; slow < kSide; slow += kWarps) {
            const std::int64_t c = tile.channel + (s.channels_last ? lane : slow);
            const int pixel = s.channels_last ? slow : lane;
            const std::int64_t column = column_offset(s, tile.pixel + pixel);
            if (column < 0 || c >= s.channels) continue;
            const std::int64_t own = c - stage;
            const std::int64_t begin = own > before ? own - before : 0;
            const std::int64_t stop = own + after < channels ? own + after + 1 : channels;
            V sum = V(0);
            for (std::int64_t j = begin; j < stop; ++j) sum += terms[j * kRow + pixel];
            const std::int64_t offset = column + c * step;
            V& total = totals[(c - tile.channel) * kRow + pixel];
            V gradient = stage > first ? total : V(0);
            if (own >= 0 && own < channels) gradient += shares[own * kRow + pixel];
            gradient -= factor * V(input[offset]) * sum;
            total = gradient;
            if (stage + kStage >= last) grad_input[offset] = static_cast<T>(gradient);
        }
        __syncthreads();
    }
}

template <typename T, typename... Arguments>
void launch_norm(void (*kernel)(Norm<T>, Arguments...), const NormShape& s, double alpha,
                 double beta, double k, const Exec& exec, Arguments... arguments) {
    if (s.elements() == 0) return;
    const Norm<T> norm(s, alpha, beta, k);
    const std::int64_t blocks = norm.pixel_tiles * norm.channel_tiles;
    if (blocks > std::numeric_limits<int>::max())
        throw std::runtime_error("zfcuda: a CUDA tensor has over 2^41 elements");
    launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, exec, norm,
           arguments...);
}

template <typename T>
void forward(const NormShape& s, double alpha, double beta, double k, Address input, Address output,
             const Exec& exec) {
    launch_norm<T>(local_response_norm_kernel<T>, s, alpha, beta, k, exec, input.as<const T>(),
                   output.as<T>());
}

template <typename T>
void gradient(const NormShape& s, double alpha, double beta, double k, Address input,
              Address grad_output, Address grad_input, const Exec& exec) {
    launch_norm<T>(local_response_norm_gradient_kernel<T>, s, alpha, beta, k, exec,
                   input.as<const T>(), grad_output.as<const T>(), grad_input.as<T>());
}

}  // namespace

void local_response_norm(const NormShape& s, Dtype dtype, double alpha, double beta, double k,
                         Address input, Address output, const Exec& exec) {
    with_dtype(dtype,
               [&](auto zero) { forward<decltype(zero)>(s, alpha, beta, k, input, output, exec); });
}

void local_response_norm_gradient(const NormShape& s, Dtype dtype, double alpha, double beta,
                                  double k, Address input, Address grad_output, Address grad_input,
                                  const Exec& exec) {
    with_dtype(dtype, [&](auto zero) {
        gradient<decltype(zero)>(s, alpha, beta, k, input, grad_output, grad_input, exec);
    });
}

}  // namespace zfcuda
