"""The deconvnet's step from the pool of each layer that has one, against torch's three operations."""

import pytest
import torch
import torch.nn.functional as F
from bench_conv2d_relu_max_pool2d import LAYERS
from conftest import BATCH, FORMATS
from layers import Conv, Map

from zfcuda import ops


@pytest.mark.parametrize(("layer", "pool"), LAYERS, ids=lambda layer: layer.name)
def bench_unpool_relu_deconv2d(
    compare, device: torch.device, layout: torch.memory_format, layer: Conv, pool: Map
) -> None:
    shape = BATCH, layer.maps, layer.out_size, layer.out_size
    maps = torch.randn(shape, device=device).relu().contiguous(memory_format=layout)
    pooled, switches = ops.max_pool2d(maps, 3, 2, ceil_mode=True)
    weight = torch.randn(layer.maps, layer.channels, layer.kernel, layer.kernel, device=device)
    slide = layer.stride, layer.padding, layer.output_padding
    window = {"pool_kernel_size": 3, "pool_stride": 2, "pool_output_size": (layer.out_size, layer.out_size)}

    def rival(memory_format: torch.memory_format):
        t = maps.contiguous(memory_format=memory_format)
        y, indices = F.max_pool2d(t, 3, 2, ceil_mode=True, return_indices=True)
        unpool = torch.ops.aten.max_pool2d_with_indices_backward

        def torchs() -> torch.Tensor:
            unpooled = unpool(y, t, [3, 3], [2, 2], [0, 0], [1, 1], True, indices)
            return F.conv_transpose2d(unpooled.relu_(), weight, None, *slide)

        return torchs

    compare(
        lambda: ops.unpool_relu_deconv2d(pooled, switches, weight, None, *slide, **window),
        {f"torch {name}": rival(memory_format) for name, memory_format in FORMATS.items()},
        bytes=5 * pooled.numel() + 4 * (weight.numel() + BATCH * layer.channels * layer.size**2),
        flops=layer.flops(BATCH),
    )
