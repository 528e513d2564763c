"""The paper's operators on compiled CPU and CUDA kernels, with torch's argument names and order."""

from zfcuda.ops.conv2d_relu import conv2d_relu
from zfcuda.ops.deconv2d import deconv2d
from zfcuda.ops.local_response_norm import local_response_norm
from zfcuda.ops.max_pool2d import max_pool2d
from zfcuda.ops.max_unpool2d import max_unpool2d
from zfcuda.ops.switches import indices_to_switches, switches_to_indices

__all__ = [
    "conv2d_relu",
    "deconv2d",
    "indices_to_switches",
    "local_response_norm",
    "max_pool2d",
    "max_unpool2d",
    "switches_to_indices",
]
