// The denominators of a local response normalisation: what local_response_norm.cu and the
// convolution that normalises its pooled maps share.
#pragma once

#include "port.cuh"

namespace zfcuda {

template <typename V>
struct NormConstants {
    V scale, beta, k;  // scale = alpha / size

    NormConstants(std::int64_t size, double alpha, double exponent, double offset)
        : scale(V(alpha / double(size))), beta(V(exponent)), k(V(offset)) {}

    // Rounded once a step in every kernel, so that the bits are the same in all.
    __device__ static V add_square(V squares, V value) { return fma(value, value, squares); }
    __device__ V denominator(V squares) const { return fma(scale, squares, k); }
    __device__ V power(V denominator) const {  // d ^ beta
        if (beta == V(0.75)) {
            const V root = sqrt(denominator);
            return root * sqrt(root);
        }
        return pow(denominator, beta);
    }
};

// The window of a channel where a warp has all channels of its pixels in registers.
template <typename V>
struct WarpNorm : NormConstants<V> {
    static constexpr int kReach = 16;  // channels on either side: at most the lanes of a pixel

    int before, after;

    WarpNorm(std::int64_t size, double alpha, double exponent, double offset)
        : NormConstants<V>(size, alpha, exponent, offset),
          before(static_cast<int>(size / 2)),
          after(static_cast<int>((size - 1) / 2)) {}

    // Of kSide neighbouring lanes, number `side` has the channels side, kSide + side, … of a pixel;
    // values[i] of channel i * kSide + side. Every lane of the warp calls it. Squares are added in
    // the order of local_response_norm_kernel.
    template <int kSide, int kSides>
    __device__ void divide(int side, const V (&values)[kSides], V (&quotients)[kSides]) const {
        static_assert(kSide >= kReach && 32 % kSide == 0);
        V squares[kSides] = {};
        for (int d = -before; d <= after; ++d) {
            // The channel d further on: of the same number or, past an end, of one beside it.
            const int lane = side + d;
            V last = V(0), moved = __shfl_sync(0xffffffffu, values[0], lane, kSide);
#pragma unroll
            for (int i = 0; i < kSides; ++i) {
                const V next =
                    i + 1 < kSides ? __shfl_sync(0xffffffffu, values[i + 1], lane, kSide) : V(0);
                const V value = lane < 0 ? last : lane < kSide ? moved : next;
                squares[i] = this->add_square(squares[i], value);
                last = moved;
                moved = next;
            }
        }
#pragma unroll
        for (int i = 0; i < kSides; ++i)
            quotients[i] = values[i] / this->power(this->denominator(squares[i]));
    }
};

}  // namespace zfcuda
