"""Maxima alone, without and with a gradient: the measurements behind the rule of ``zfcuda.nn.fastest_max_pool2d``."""

import pytest
import torch
import torch.nn.functional as F
from conftest import BATCH, rivals
from layers import POOLS, Map

from zfcuda import ops


@pytest.mark.parametrize("trains", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("layer", POOLS, ids=lambda layer: layer.name)
def bench_maxima_alone(compare, device: torch.device, layout: torch.memory_format, layer: Map, trains: bool) -> None:
    shape = BATCH, layer.channels, layer.size, layer.size
    pooled = BATCH * layer.channels * layer.pooled_size**2
    x = torch.randn(shape, device=device).contiguous(memory_format=layout).requires_grad_(trains)

    def step(pool, leaf):
        leaf.grad = None
        output = pool(leaf)
        if trains:
            output.backward(torch.ones_like(output))

    compare(
        lambda: step(lambda t: ops.max_pool2d(t, 3, 2, ceil_mode=True)[0], x),
        rivals(
            lambda t: step(lambda u: F.max_pool2d(u, 3, 2, ceil_mode=True), t.detach().requires_grad_(trains)),
            x.detach(),
        ),
        bytes=(8 if trains else 4) * x.numel() + (13 if trains else 5) * pooled,
    )
