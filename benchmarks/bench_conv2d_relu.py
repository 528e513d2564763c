"""Convolution + bias + ReLU against torch eager, forward."""

import pytest
import torch
import torch.nn.functional as F
from conftest import BATCH, rivals
from layers import CONVOLUTIONS, Conv

from zfcuda import ops


@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=lambda layer: layer.name)
def bench_conv2d_relu(compare, device: torch.device, layout: torch.memory_format, layer: Conv) -> None:
    shape = BATCH, layer.channels, layer.size, layer.size
    x = torch.randn(shape, device=device).contiguous(memory_format=layout)
    weight = torch.randn(layer.maps, layer.channels, layer.kernel, layer.kernel, device=device)
    bias = torch.randn(layer.maps, device=device)
    maps = BATCH * layer.maps * layer.out_size**2
    compare(
        lambda: ops.conv2d_relu(x, weight, bias, layer.stride, layer.padding),
        rivals(lambda t: F.conv2d(t, weight, bias, layer.stride, layer.padding).relu_(), x),
        bytes=4 * (x.numel() + weight.numel() + maps),
        flops=layer.flops(BATCH),
    )
