"""Gathering by switches against torch's gather by the indices of its pool."""

import pytest
import torch
import torch.nn.functional as F
from conftest import BATCH, rivals
from layers import POOLS, Map

from zfcuda import ops


@pytest.mark.parametrize("layer", POOLS, ids=lambda layer: layer.name)
def bench_switch_gather(compare, device: torch.device, layout: torch.memory_format, layer: Map) -> None:
    shape = BATCH, layer.channels, layer.size, layer.size
    x = torch.randn(shape, device=device).contiguous(memory_format=layout)
    pooled, switches = ops.max_pool2d(x, 3, 2, ceil_mode=True)
    _, indices = F.max_pool2d(x.contiguous(), 3, 2, ceil_mode=True, return_indices=True)
    compare(
        lambda: ops.switch_gather(x, switches, 3, 2),
        rivals(lambda t: t.flatten(2).gather(2, indices.flatten(2)), x),
        bytes=9 * pooled.numel(),
    )
