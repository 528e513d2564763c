"""Unpooling (sum) against the same sum in torch: the backward pass of its max-pool."""

import pytest
import torch
import torch.nn.functional as F
from conftest import BATCH, FORMATS
from layers import POOLS, Map

from zfcuda import ops


@pytest.mark.parametrize("layer", POOLS, ids=lambda layer: layer.name)
def bench_max_unpool2d(compare, device: torch.device, layout: torch.memory_format, layer: Map) -> None:
    shape = BATCH, layer.channels, layer.size, layer.size
    x = torch.randn(shape, device=device).relu().contiguous(memory_format=layout)
    pooled, switches = ops.max_pool2d(x, 3, 2, ceil_mode=True)

    def rival(memory_format: torch.memory_format):
        t = x.contiguous(memory_format=memory_format)
        y, indices = F.max_pool2d(t, 3, 2, ceil_mode=True, return_indices=True)
        backward = torch.ops.aten.max_pool2d_with_indices_backward
        return lambda: backward(y, t, [3, 3], [2, 2], [0, 0], [1, 1], True, indices)

    compare(
        lambda: ops.max_unpool2d(pooled, switches, 3, 2, output_size=x.shape[2:]),
        {f"torch {name}": rival(memory_format) for name, memory_format in FORMATS.items()},
        bytes=4 * x.numel() + 5 * pooled.numel(),
    )
