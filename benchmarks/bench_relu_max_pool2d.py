"""ReLU and max-pooling with switches in one pass against torch's two."""

import pytest
import torch
import torch.nn.functional as F
from conftest import BATCH, rivals
from layers import POOLS, Map

from zfcuda import ops


@pytest.mark.parametrize("layer", POOLS, ids=lambda layer: layer.name)
def bench_relu_max_pool2d(compare, device: torch.device, layout: torch.memory_format, layer: Map) -> None:
    shape = BATCH, layer.channels, layer.size, layer.size
    x = torch.randn(shape, device=device).contiguous(memory_format=layout)
    compare(
        lambda: ops.relu_max_pool2d(x, 3, 2, ceil_mode=True),
        rivals(lambda t: F.max_pool2d(t.relu(), 3, 2, ceil_mode=True, return_indices=True), x),
        bytes=4 * x.numel() + 5 * BATCH * layer.channels * layer.pooled_size**2,
    )
