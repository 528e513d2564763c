"""Local response normalisation against torch eager, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from conftest import BATCH, rivals
from layers import NORMS, Map

from zfcuda import ops

CONSTANTS = 5, 5e-4, 0.75, 2.0


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("layer", NORMS, ids=lambda layer: layer.name)
def bench_local_response_norm(
    compare, device: torch.device, layout: torch.memory_format, layer: Map, backward: bool
) -> None:
    shape = BATCH, layer.channels, layer.size, layer.size
    x = torch.randn(shape, device=device).relu().contiguous(memory_format=layout).requires_grad_(backward)
    grad = torch.randn_like(x)

    def step(norm, t):
        y = norm(t, *CONSTANTS)
        return torch.autograd.grad(y, t, grad) if backward else y

    compare(
        lambda: step(ops.local_response_norm, x),
        rivals(lambda t: step(F.local_response_norm, t), x),
        bytes=4 * x.numel() * (5 if backward else 2),
    )
