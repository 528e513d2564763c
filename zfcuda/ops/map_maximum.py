"""Where maps are strongest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zfcuda import core
from zfcuda.ops._common import (
    check_shape,
    check_tensor,
    dense,
    memory_format,
    tensor,
)
from zfcuda.ops._out import Result
from zfcuda.ops._pool import Window, check_switches, window_of
from zfcuda.ops._register import TwoResults, entry, not_differentiable, operator

__all__ = ["map_maximum"]


@entry()
def map_maximum(
    input: Tensor,
    pooled: Tensor | None = None,
    switches: Tensor | None = None,
    kernel_size: int | Sequence[int] = 1,
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
) -> tuple[Tensor, Tensor]:
    """The maximum of each map and its first position in row-major order.

    Parameters
    ----------
    input
        (batch, channels, height, width), floating point, any strides.
    pooled, switches
        What :func:`max_pool2d` gave for ``input`` with the arguments that follow. The maximum is then taken from
        them, fewer bytes by the pool's stride; of ``input`` only what no window covers is read, and all of it where
        windows leave gaps.
    kernel_size, stride, padding, dilation
        Those of the pool; ``stride=None`` is ``kernel_size``.

    Returns
    -------
    values : Tensor
        (batch, channels). NaN is passed over; a map of nothing but NaN gives ``-inf``. Where a pooled value is NaN,
        its whole window is passed over.
    positions : Tensor
        int64 (batch, channels): ``row * width + column``, as from :func:`torch.argmax` of the flattened map.

    Raises
    ------
    TypeError
        If an argument has the wrong Python type.
    RuntimeError
        If a tensor or a size is impossible; the message names the argument and its value.

    Notes
    -----
    Not differentiable: a backward pass through the values raises.
    """
    tensor("pooled", pooled, optional=True)
    tensor("switches", switches, optional=True)
    if (pooled is None) != (switches is None):
        missing = "pooled" if pooled is None else "switches"
        raise RuntimeError(f"{missing} is None; give pooled and switches together, or neither")
    return _maximum(tensor("input", input), pooled, switches, window_of(kernel_size, stride, padding, dilation))


def _check(input: Tensor, pooled: Tensor | None, switches: Tensor | None, window: Window) -> list[int]:
    check_tensor("input", input)
    if pooled is None or switches is None:
        return list(input.shape)
    window.check()
    check_tensor("pooled", pooled, like=input)
    sizes = [window.pooled_size(input.shape[2:], ceil_mode) for ceil_mode in (False, True)]
    fits = all(n in pair for n, pair in zip(pooled.shape[2:], zip(*sizes, strict=True), strict=True))
    check_shape("pooled", pooled, [*input.shape[:2], *(pooled.shape[2:] if fits else sizes[0])], "the pool of input")
    check_switches(switches, input, pooled.shape, "the shape of pooled")
    return list(pooled.shape)


@operator("map_maximum", batched=("input", "pooled", "switches"))
def _maximum(input: Tensor, pooled: Tensor | None, switches: Tensor | None, window: Window) -> TwoResults:
    pooled_size = _check(input, pooled, switches, window)
    values, positions = yield Result(input, input.shape[:2]), Result(input, input.shape[:2], dtype=torch.int64)
    layout = memory_format(input)
    if values.numel():
        where = window.shape(input.shape, pooled_size, layout), core.DTYPES[input.dtype]
        tensors = dense(input, layout), dense(pooled, layout), dense(switches, layout)
        core.run("map_maximum", input, *where, *tensors, values, positions)


not_differentiable(_maximum, "map_maximum", "gather the input at the positions to differentiate by it")
