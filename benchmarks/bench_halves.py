"""float16 and bfloat16 against float32 of the same operator, and against torch's in the same dtype."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import BATCH
from layers import CONVOLUTIONS, NORMS, POOLS, Conv, Map
from torch import Tensor

from zfcuda import ops

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def beside(
    ours: Callable[..., object], torchs: Callable[..., object] | None, dtype: torch.dtype, *tensors: Tensor
) -> tuple[Callable[[], object], dict[str, Callable[[], object]]]:
    """Ours in ``dtype``, and what it is compared with."""
    halves = [t.to(dtype) for t in tensors]
    rivals = {"zfcuda float32": lambda: ours(*tensors)}
    if torchs is not None:
        rivals["torch"] = lambda: torchs(*halves)
    return lambda: ours(*halves), rivals


def image(device: torch.device, layout: torch.memory_format, *size: int) -> Tensor:
    return torch.randn(BATCH, *size, device=device).contiguous(memory_format=layout)


@HALVES
@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=lambda layer: layer.name)
def bench_conv2d_relu(
    compare, device: torch.device, layout: torch.memory_format, layer: Conv, dtype: torch.dtype
) -> None:
    x = image(device, layout, layer.channels, layer.size, layer.size)
    weight = torch.randn(layer.maps, layer.channels, layer.kernel, layer.kernel, device=device)
    weight = weight.contiguous(memory_format=layout)
    options = layer.stride, layer.padding
    ours, rivals = beside(
        lambda t, w: ops.conv2d_relu(t, w, None, *options),
        lambda t, w: F.conv2d(t, w, None, *options),
        dtype,
        x,
        weight,
    )
    compare(ours, rivals, bytes=2 * x.numel(), flops=layer.flops(BATCH))


@HALVES
@pytest.mark.parametrize("layer", POOLS, ids=lambda layer: layer.name)
def bench_max_pool2d(
    compare, device: torch.device, layout: torch.memory_format, layer: Map, dtype: torch.dtype
) -> None:
    x = image(device, layout, layer.channels, layer.size, layer.size).relu()
    ours, rivals = beside(
        lambda t: ops.max_pool2d(t, 3, 2, ceil_mode=True),
        lambda t: F.max_pool2d(t, 3, 2, ceil_mode=True, return_indices=True),
        dtype,
        x,
    )
    compare(ours, rivals, bytes=2 * x.numel() + 3 * BATCH * layer.channels * layer.pooled_size**2)


@HALVES
@pytest.mark.parametrize("layer", POOLS, ids=lambda layer: layer.name)
def bench_max_unpool2d(
    compare, device: torch.device, layout: torch.memory_format, layer: Map, dtype: torch.dtype
) -> None:
    x = image(device, layout, layer.channels, layer.size, layer.size).relu()
    pooled, switches = ops.max_pool2d(x, 3, 2, ceil_mode=True)
    unpool = lambda t: ops.max_unpool2d(t, switches, 3, 2, output_size=x.shape[2:])  # noqa: E731
    ours, rivals = beside(unpool, None, dtype, pooled)
    compare(ours, rivals, bytes=2 * x.numel() + 3 * pooled.numel())


@HALVES
@pytest.mark.parametrize("layer", NORMS, ids=lambda layer: layer.name)
def bench_local_response_norm(
    compare, device: torch.device, layout: torch.memory_format, layer: Map, dtype: torch.dtype
) -> None:
    """torch has none in halves on the CPU."""
    x = image(device, layout, layer.channels, layer.size, layer.size).relu()
    torchs = None if x.is_cpu else lambda t: F.local_response_norm(t, 5, 5e-4, 0.75, 2.0)
    ours, rivals = beside(lambda t: ops.local_response_norm(t, 5, 5e-4, 0.75, 2.0), torchs, dtype, x)
    compare(ours, rivals, bytes=4 * x.numel())
