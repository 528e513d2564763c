"""A whole layer, convolution to switches, against torch's three steps."""

import pytest
import torch
import torch.nn.functional as F
from conftest import BATCH, rivals
from layers import CONVOLUTIONS, POOLS, Conv, Map

from zfcuda import ops

LAYERS = [pair for pair in ((c, p) for c in CONVOLUTIONS for p in POOLS) if pair[0].name[4:] == pair[1].name[4:]]


@pytest.mark.parametrize(("layer", "pool"), LAYERS, ids=lambda layer: layer.name)
def bench_conv2d_relu_max_pool2d(
    compare, device: torch.device, layout: torch.memory_format, layer: Conv, pool: Map
) -> None:
    shape = BATCH, layer.channels, layer.size, layer.size
    x = torch.randn(shape, device=device).contiguous(memory_format=layout)
    weight = torch.randn(layer.maps, layer.channels, layer.kernel, layer.kernel, device=device)
    bias = torch.randn(layer.maps, device=device)
    window = {"pool_kernel_size": 3, "pool_stride": 2, "pool_ceil_mode": True}

    def torchs(t: torch.Tensor) -> object:
        maps = F.conv2d(t, weight, bias, layer.stride, layer.padding).relu_()
        return F.max_pool2d(maps, 3, 2, ceil_mode=True, return_indices=True)

    compare(
        lambda: ops.conv2d_relu_max_pool2d(x, weight, bias, layer.stride, layer.padding, **window),
        rivals(torchs, x),
        bytes=4 * (x.numel() + weight.numel()) + 5 * BATCH * layer.maps * pool.pooled_size**2,
        flops=layer.flops(BATCH),
    )
