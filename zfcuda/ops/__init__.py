"""The paper's operators on compiled CPU and CUDA kernels, with torch's argument names and order.

In the place of tensors they take arrays of NumPy, CuPy and other libraries that speak DLPack, without gradients, and
return arrays of the same kind: no copy is made.

Tensors are floating point: float16, bfloat16, float32 or float64. Halves are stored as such, computed in float32, and
rounded once, when a result is written.
"""

from zfcuda.ops.conv2d_relu import conv2d_relu
from zfcuda.ops.conv2d_relu_max_pool2d import conv2d_relu_max_pool2d
from zfcuda.ops.conv2d_relu_max_pool2d_maximum import conv2d_relu_max_pool2d_maximum
from zfcuda.ops.conv2d_relu_max_pool2d_norm import conv2d_relu_max_pool2d_norm
from zfcuda.ops.crop_windows import crop_windows
from zfcuda.ops.deconv2d import deconv2d
from zfcuda.ops.local_response_norm import local_response_norm
from zfcuda.ops.map_maximum import map_maximum
from zfcuda.ops.max_pool2d import max_pool2d
from zfcuda.ops.max_unpool2d import max_unpool2d
from zfcuda.ops.relu_max_pool2d import relu_max_pool2d
from zfcuda.ops.renormalize_filters import renormalize_filters_
from zfcuda.ops.switch_gather import switch_gather
from zfcuda.ops.switches import indices_to_switches, switches_to_indices
from zfcuda.ops.unpool_relu_deconv2d import unpool_relu_deconv2d
from zfcuda.ops.window_deconv2d import WindowDeconv2d, window_deconv2d

__all__ = [
    "WindowDeconv2d",
    "conv2d_relu",
    "conv2d_relu_max_pool2d",
    "conv2d_relu_max_pool2d_maximum",
    "conv2d_relu_max_pool2d_norm",
    "crop_windows",
    "deconv2d",
    "indices_to_switches",
    "local_response_norm",
    "map_maximum",
    "max_pool2d",
    "max_unpool2d",
    "relu_max_pool2d",
    "renormalize_filters_",
    "switch_gather",
    "switches_to_indices",
    "unpool_relu_deconv2d",
    "window_deconv2d",
]
