"""Rectify + transposed convolution against torch eager."""

import pytest
import torch
import torch.nn.functional as F
from conftest import BATCH, rivals
from layers import CONVOLUTIONS, Conv

from zfcuda import ops


@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=lambda layer: layer.name)
def bench_deconv2d(compare, device: torch.device, layout: torch.memory_format, layer: Conv) -> None:
    shape = BATCH, layer.maps, layer.out_size, layer.out_size
    signal = torch.randn(shape, device=device).contiguous(memory_format=layout)
    weight = torch.randn(layer.maps, layer.channels, layer.kernel, layer.kernel, device=device)
    filters = None, layer.stride, layer.padding, layer.output_padding
    compare(
        lambda: ops.deconv2d(signal, weight, *filters),
        rivals(lambda t: F.conv_transpose2d(t.relu(), weight, *filters), signal),
        bytes=4 * (signal.numel() + weight.numel() + BATCH * layer.channels * layer.size**2),
        flops=layer.flops(BATCH),
    )
