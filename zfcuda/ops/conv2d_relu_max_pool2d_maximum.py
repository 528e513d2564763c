"""A whole layer of the paper, and where its maps are strongest: `conv2d_relu_max_pool2d` of csrc/ops.h with maxima."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zfcuda.ops._conv import Filters
from zfcuda.ops._out import Result
from zfcuda.ops._pool import PoolWindow, pooled
from zfcuda.ops._register import FourResults, entry, not_differentiable, operator
from zfcuda.ops.conv2d_relu_max_pool2d import checked, run, sizes

__all__ = ["conv2d_relu_max_pool2d_maximum"]


@entry(casts=True, images=("input",))
def conv2d_relu_max_pool2d_maximum(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    pool_kernel_size: int | Sequence[int],
    pool_stride: int | Sequence[int] | None = None,
    pool_padding: int | Sequence[int] = 0,
    pool_dilation: int | Sequence[int] = 1,
    pool_ceil_mode: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`conv2d_relu_max_pool2d`, and what :func:`map_maximum` says of the rectified maps, in one.

    What mining needs of a layer: the maps themselves are neither written to memory nor read for their maxima.

    Parameters
    ----------
    input, weight, bias, stride, padding, dilation, groups
        As of :func:`conv2d_relu_max_pool2d`.
    pool_kernel_size, pool_stride, pool_padding, pool_dilation, pool_ceil_mode
        As of :func:`conv2d_relu_max_pool2d`.

    Returns
    -------
    output, switches : Tensor
        Those of :func:`conv2d_relu_max_pool2d`.
    values : Tensor
        (batch, out_channels): the maximum of each rectified map, positions that no window covers included.
    positions : Tensor
        int64 (batch, out_channels): ``row * width + column`` of its first position in the map. Of a map that is never
        positive 0, the first one. NaN is passed over as by :func:`map_maximum` with ``output`` and ``switches``.

    Raises
    ------
    TypeError
        If an argument has the wrong Python type.
    ValueError
        If ``padding`` is a string, but neither of its two modes.
    RuntimeError
        If a tensor or a size is impossible; the message names the argument and its value.

    Notes
    -----
    Not differentiable: a backward pass through the results raises.
    """
    window = pool_kernel_size, pool_stride, pool_padding, pool_dilation
    return _maximum(*checked(input, weight, bias, stride, padding, dilation, groups, *window, pool_ceil_mode))


@operator("conv2d_relu_max_pool2d_maximum", batched=("input",))
def _maximum(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    filters: Filters,
    window: PoolWindow,
    pool_ceil_mode: bool,
) -> FourResults:
    maps, size = sizes(input, weight, bias, filters, window, pool_ceil_mode)
    results = yield *pooled(input, size), Result(input, size[:2]), Result(input, size[:2], dtype=torch.int64)
    run(input, weight, bias, filters, window, maps, *results)


not_differentiable(
    _maximum,
    "conv2d_relu_max_pool2d_maximum",
    "conv2d_relu_max_pool2d has the gradient of the same output",
)
