// Every host function of the core. A backend is a module that implements this header: the CPU
// sources once for each instruction-set level, the CUDA sources for the GPU, and the same CUDA
// sources on the emulator of tests/simt. All have the same binding (bindings.cpp), so Python
// picks a module for a device and nothing else differs.
//
// Rules: no function allocates, synchronises or throws away an error; buffers and workspaces
// come from the caller; results are deterministic (no floating-point atomics; a sum has one order
// whatever the number of threads). A failed launch throws std::runtime_error.
#pragma once

#include <cstdint>
#include <string>
#include <type_traits>

#include "shapes.h"

namespace zfcuda {

// An address in the memory of the backend's device; null where an argument is optional.
struct Address {
    void* value = nullptr;

    template <typename T>
    T* as() const {
        return static_cast<T*>(value);
    }
    explicit operator bool() const { return value != nullptr; }
};

enum class Dtype : int { float32 = 0, float64 = 1, float16 = 2, bfloat16 = 3 };

inline std::int64_t element_bytes(Dtype dtype) {
    return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

// What values stored as T are computed in: halves are widened where they are loaded, and a result
// is rounded once, where it is stored.
template <typename T>
using Sum = std::conditional_t<sizeof(T) == 2, float, T>;

// What stands between a signal and the filters on the way down. `forward` is the output of the
// rectifier on the way up; `forward <= 0` blocks (so NaN passes, as in torch).
//   none       signal
//   deconvnet  max(signal, 0), NaN kept
//   backprop   forward <= 0 ? 0 : signal
//   guided     both
enum class Gate : int { none = 0, deconvnet = 1, backprop = 2, guided = 3 };

// How CUDA's convolutions multiply float32 (tf32: 10 bits of fraction). The CPU is always ieee, and
// so is whatever has no kernel for the tensor cores: a mode allows an error, it asks for none.
//   ieee     float32 FMA
//   tf32x3   each factor as a sum of two tf32, three products: an error like that of ieee
//   tf32     one product: activations truncated, weights rounded; of a weight gradient the image
//            truncated, the signal rounded
enum class Precision : std::int64_t { ieee = 0, tf32x3 = 1, tf32 = 2 };

// Where and how to run. CUDA: device ordinal and cudaStream_t. CPU: the number of OpenMP threads.
struct Exec {
    std::int64_t device;
    std::int64_t stream;
    std::int64_t threads;
    Precision precision;
};

// maps = conv(image, weight) + bias, then by `gate`: none nothing; deconvnet max(·, 0), that is,
// ReLU; backprop ·, zero where forward <= 0. `forward` has the size of the maps (backprop only).
// guided is not used here.
std::int64_t conv2d_workspace(const ConvShape& shape, Dtype dtype, const Exec& exec);
void conv2d(const ConvShape& shape, Dtype dtype, Gate gate, Address image, Address weight,
            Address bias, Address forward, Address maps, Address workspace, const Exec& exec);

// image = conv_transpose(gate(signal), weight) + bias: signal and `forward` have the size of the
// maps, bias has in_channels entries.
std::int64_t deconv2d_workspace(const ConvShape& shape, Dtype dtype, const Exec& exec);
void deconv2d(const ConvShape& shape, Dtype dtype, Gate gate, Address signal, Address forward,
              Address weight, Address bias, Address image, Address workspace, const Exec& exec);

// grad_weight[o,i,ky,kx] = sum over n,y,x of gate(signal)[n,o,y,x] * image[n,i,…]; if grad_bias is
// given, grad_bias[o] = sum of gate(signal)[n,o,y,x]. Serves both convolutions.
std::int64_t conv2d_weight_gradient_workspace(const ConvShape& shape, Dtype dtype,
                                              const Exec& exec);
void conv2d_weight_gradient(const ConvShape& shape, Dtype dtype, Gate gate, Address image,
                            Address signal, Address forward, Address grad_weight, Address grad_bias,
                            Address workspace, const Exec& exec);

// Maximum of each window of input, or with `relu` of max(input, 0), and its switch: the first
// maximum in row-major order; the last NaN where there is one; a window without a positive or
// finite value still has a switch.
void max_pool2d(const PoolShape& shape, Dtype dtype, bool relu, Address input, Address output,
                Address switches, const Exec& exec);

// max_pool2d(relu) of conv2d(image, weight, bias), whose maps never exist as a whole: `pool` is the
// pool of the maps of `shape`, in the same layout. With `values` and `positions`, both or neither,
// also what map_maximum says of the rectified maps, their pool and its switches; the workspace then
// is that with `maximum`.
std::int64_t conv2d_relu_max_pool2d_workspace(const ConvShape& shape, const PoolShape& pool,
                                              Dtype dtype, bool maximum, const Exec& exec);
void conv2d_relu_max_pool2d(const ConvShape& shape, const PoolShape& pool, Dtype dtype,
                            Address image, Address weight, Address bias, Address output,
                            Address switches, Address values, Address positions, Address workspace,
                            const Exec& exec);

// local_response_norm of that pool, `norm` of its shape; `pooled`, perhaps null, gets the pool
// itself.
std::int64_t conv2d_relu_max_pool2d_norm_workspace(const ConvShape& shape, const PoolShape& pool,
                                                   Dtype dtype, bool pooled, const Exec& exec);
void conv2d_relu_max_pool2d_norm(const ConvShape& shape, const PoolShape& pool,
                                 const NormShape& norm, Dtype dtype, double alpha, double beta,
                                 double k, Address image, Address weight, Address bias,
                                 Address pooled, Address output, Address switches,
                                 Address workspace, const Exec& exec);

// The transpose of pooling, by gathering. `pooled` and `switches` have the output size of the
// shape, `unpooled` its input size. Where switches of several windows meet: their sum, or with
// `overwrite` the value of the last window in row-major order.
void max_unpool2d(const PoolShape& shape, Dtype dtype, bool overwrite, Address pooled,
                  Address switches, Address unpooled, const Exec& exec);

// image = conv_transpose(gate(maps), weight) + bias, where maps = max_unpool2d(signal, switches)
// never exists as a whole: `pool` is the pool of the maps of `shape`. Here `forward` has the size
// of the signal, and blocks its values before they are unpooled: it is the pool's output on the way
// up.
std::int64_t unpool_relu_deconv2d_workspace(const ConvShape& shape, const PoolShape& pool,
                                            Dtype dtype, const Exec& exec);
void unpool_relu_deconv2d(const ConvShape& shape, const PoolShape& pool, Dtype dtype, Gate gate,
                          bool overwrite, Address signal, Address switches, Address forward,
                          Address weight, Address bias, Address image, Address workspace,
                          const Exec& exec);

// grad_weight of the convolution whose maps are gate(max_unpool2d(signal, switches)), which never
// exist as a whole: as conv2d_weight_gradient, with the pool and the gate of unpool_relu_deconv2d.
std::int64_t unpool_relu_weight_gradient_workspace(const ConvShape& shape, const PoolShape& pool,
                                                   Dtype dtype, const Exec& exec);
void unpool_relu_weight_gradient(const ConvShape& shape, const PoolShape& pool, Dtype dtype,
                                 Gate gate, bool overwrite, Address image, Address signal,
                                 Address switches, Address forward, Address grad_weight,
                                 Address workspace, const Exec& exec);

// The transpose of max_unpool2d: pooled[w] = unpooled[switch of w]; with `overwrite` zero for the
// windows whose value was overwritten.
void switch_gather(const PoolShape& shape, Dtype dtype, bool overwrite, Address unpooled,
                   Address switches, Address pooled, const Exec& exec);

// Writes to *first_invalid (int64) the smallest storage index of a switch that does not point to
// an input position inside its window and inside the input, or -1.
void find_invalid_switch(const PoolShape& shape, Address switches, Address first_invalid,
                         const Exec& exec);

// y[c] = x[c] / (k + alpha / size * sum over the window of x²) ^ beta.
void local_response_norm(const NormShape& shape, Dtype dtype, double alpha, double beta, double k,
                         Address input, Address output, const Exec& exec);
// The gradient with respect to the input; recomputes the denominators.
void local_response_norm_gradient(const NormShape& shape, Dtype dtype, double alpha, double beta,
                                  double k, Address input, Address grad_output, Address grad_input,
                                  const Exec& exec);

// Every filter, `size` neighbouring numbers, whose root mean square exceeds max_rms is scaled back
// to it, in place. A filter that is not finite is left alone.
void renormalize_filters(std::int64_t filters, std::int64_t size, Dtype dtype, double max_rms,
                         Address weight, const Exec& exec);

// One step of a receptive-field-local projection, all windows at once:
//
//   maps  = pooled() ? unpool(signal, switches) : signal       overlaps summed
//   image = conv_transpose(gate(maps), weight), zero outside the whole image below
//
// `signal` (windows, pooled_height, pooled_width, out_channels), or out_height, out_width without a
// pool; `switches` of the same size, 255 where a window has none; `positive`, for the gates
// backprop and guided only: bit c % 8 of byte c / 8 at (windows, out_height, out_width,
// bit_bytes()) says that the forward map is not <= 0; `origins` int64 (windows, 2): row and column
// in the image below of the result's first position, perhaps negative; `image` (windows, in_height,
// in_width, in_channels).
//
// The weight is packed once for many calls, in a form that is the backend's own: `packed` has room
// for as many bytes as window_deconv2d_packed says, and serves every shape that differs from that
// of window_deconv2d_pack in `windows` and the image's size alone.
std::int64_t window_deconv2d_packed(const WindowShape& shape, Dtype dtype, const Exec& exec);
void window_deconv2d_pack(const WindowShape& shape, Dtype dtype, Address weight, Address packed,
                          const Exec& exec);
std::int64_t window_deconv2d_workspace(const WindowShape& shape, Dtype dtype, const Exec& exec);
void window_deconv2d(const WindowShape& shape, Dtype dtype, Gate gate, Address signal,
                     Address switches, Address positive, Address packed, Address origins,
                     Address image, Address workspace, const Exec& exec);

// windows[i] = image images[i] from row origins[i][0] and column origins[i][1] on; outside it each
// byte is `fill`. `images` int64 (windows), `origins` int64 (windows, 2).
void crop_windows(const CropShape& shape, Address source, Address images, Address origins,
                  Address windows, const Exec& exec);

// The maximum of each map (n, c) of the shape's input and the index (row * width + column) of its
// first position, from the pooled values and their switches where they are given and windows have
// no gaps: then only positions that no window covers are read from `input`. NaN is passed over; so
// is the window of a pooled NaN; a map of nothing but NaN gives -infinity and 0.
// `values` (batch, channels), `positions` int64 (batch, channels).
void map_maximum(const PoolShape& shape, Dtype dtype, Address input, Address pooled,
                 Address switches, Address values, Address positions, const Exec& exec);

// What this module was compiled for: "x86-64-v4", or "sm_75 sm_80 sm_90 sm_120 compute_120".
std::string target();

// What this machine offers to a backend of this kind, one fact a line. CPU: the best instruction
// set level that a module exists for. CUDA: "driver 13000" and "runtime 13000", then
// "device NAME|sm_90|BYTES" for each GPU; never throws for want of a driver.
std::string machine();

}  // namespace zfcuda
