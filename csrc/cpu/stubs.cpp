#include <stdexcept>
#include "../ops.h"
namespace zfcuda {
[[noreturn]] static void no() { throw std::runtime_error("not written yet"); }
std::int64_t conv2d_workspace(const ConvShape&, Dtype, const Exec&) { return 0; }
void conv2d(const ConvShape&, Dtype, Gate, Address, Address, Address, Address, Address, Address, const Exec&) { no(); }
std::int64_t deconv2d_workspace(const ConvShape&, Dtype, const Exec&) { return 0; }
void deconv2d(const ConvShape&, Dtype, Gate, Address, Address, Address, Address, Address, Address, const Exec&) { no(); }
std::int64_t conv2d_weight_gradient_workspace(const ConvShape&, Dtype, const Exec&) { return 0; }
void conv2d_weight_gradient(const ConvShape&, Dtype, Gate, Address, Address, Address, Address, Address, Address, const Exec&) { no(); }
void max_unpool2d(const PoolShape&, Dtype, bool, Address, Address, Address, const Exec&) { no(); }
void switch_gather(const PoolShape&, Dtype, bool, Address, Address, Address, const Exec&) { no(); }
void find_invalid_switch(const PoolShape&, Address, Address, const Exec&) { no(); }
void local_response_norm(const NormShape&, Dtype, double, double, double, Address, Address, const Exec&) { no(); }
void local_response_norm_gradient(const NormShape&, Dtype, double, double, double, Address, Address, Address, const Exec&) { no(); }
}
