"""The constraint on filters against torch's norm and multiplication."""

import pytest
import torch
from layers import CONVOLUTIONS, Conv

from zfcuda import ops


@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=lambda layer: layer.name)
def bench_renormalize_filters(compare, device: torch.device, layer: Conv) -> None:
    weight = 0.05 * torch.randn(layer.maps, layer.channels, layer.kernel, layer.kernel, device=device)
    rival = weight.clone()

    def torchs() -> torch.Tensor:
        rms = torch.linalg.vector_norm(rival, dim=(1, 2, 3), keepdim=True) / rival[0].numel() ** 0.5
        return rival.mul_((0.1 / rms).clamp(max=1.0))

    compare(lambda: ops.renormalize_filters_(weight, 0.1), {"torch": torchs}, bytes=4 * weight.numel())
