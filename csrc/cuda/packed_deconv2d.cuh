// deconv2d in two halves, for an operator that packs its weights once and multiplies many times
// (window_deconv2d.cu). They are defined in deconv2d.cu, so that its product is compiled once.
#pragma once

#include "port.cuh"

namespace zfcuda {

// `packed` has room for deconv2d_packed_bytes, and serves every batch and size of the image, in
// one Precision.
std::int64_t deconv2d_packed_bytes(const ConvShape& shape, Dtype dtype, const Exec& exec);
void deconv2d_pack(const ConvShape& shape, Dtype dtype, Address weight, Address packed,
                   const Exec& exec);

// deconv2d without bias, for the gates none and deconvnet, of a signal that is aligned to 16 bytes.
void deconv2d_packed(const ConvShape& shape, Dtype dtype, Gate gate, Address signal, Address packed,
                     Address image, const Exec& exec);

}  // namespace zfcuda
