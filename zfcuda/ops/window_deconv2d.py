"""One step down of a receptive-field-local projection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zfcuda import core
from zfcuda.ops._common import (
    MAX_WINDOW,
    NAMESPACE,
    check_at_least,
    check_device,
    check_shape,
    check_tensor,
    integer,
    not_differentiable,
    option,
    pair,
    tensor,
)
from zfcuda.ops.crop_windows import check_origins

__all__ = ["window_deconv2d"]

GATES = ("none", "deconvnet", "backprop", "guided")


def window_deconv2d(
    signal: Tensor,
    weight: Tensor,
    origins: Tensor,
    map_size: Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    gate: str = "none",
    positive: Tensor | None = None,
    switches: Tensor | None = None,
    pool: tuple[int | Sequence[int], int | Sequence[int], int | Sequence[int]] | None = None,
) -> Tensor:
    """Unpool, gate and filter windows of maps: a step of the deconvnet for receptive fields alone (section 2.1).

    ``image = conv_transpose(gate(unpool(signal)), weight)`` for each window by itself, without padding (which only
    moves ``origins``), zero where the window lies outside the map below.

    Parameters
    ----------
    signal
        (windows, height, width, out_channels), float32 or float64: windows of the maps, or of the pooled maps where
        ``pool`` is given.
    weight
        (out_channels, in_channels / groups, kernel_h, kernel_w), as in a convolution from the map below.
    origins
        int64 (windows, 2): row and column, in the map below, of the first position of each result; may be negative.
    map_size
        Height and width of the whole map below.
    stride, dilation, groups
        Those of the convolution.
    gate
        ``"none"``, ``"deconvnet"`` (max(·, 0)), ``"backprop"`` (zero where the forward map was not positive) or
        ``"guided"`` (both).
    positive
        For the last two gates: uint8 (windows, out_height, out_width, ceil(out_channels / 8)), bit ``c % 8`` of byte
        ``c // 8`` says that the forward map is not <= 0 there.
    switches
        uint8, of the signal's shape: where each pooled value belongs in its window; 255 where there is none.
    pool
        kernel_size, stride and dilation of the pool between the maps and the signal.

    Returns
    -------
    Tensor
        (windows, in_height, in_width, in_channels) with ``in_height = (out_height - 1) * stride + (kernel_h - 1) *
        dilation + 1``, and out_height likewise from the pooled height.

    Raises
    ------
    TypeError
        If an argument has the wrong Python type.
    ValueError
        For an unknown gate.
    RuntimeError
        If a tensor or a size is impossible; the message names the argument and its value.

    Notes
    -----
    Overlapping pooling windows are summed. Switches of 255, and any that lie outside their window, put nothing
    back. Not differentiable: a backward pass through the result raises.
    """
    tensor("switches", switches, optional=True)
    if (pool is None) != (switches is None):
        missing = "pool" if pool is None else "switches"
        raise RuntimeError(f"{missing} is None; give pool and switches together, or neither")
    undone = [0] * 6
    if pool is not None:
        if not isinstance(pool, (tuple, list)) or len(pool) != 3:
            raise TypeError(f"pool is {pool!r}; it must be (kernel_size, stride, dilation)")
        names = ("pool[0] (kernel_size)", "pool[1] (stride)", "pool[2] (dilation)")
        undone = [n for name, value in zip(names, pool, strict=True) for n in pair(name, value)]
    return _windows(
        tensor("signal", signal),
        tensor("weight", weight),
        tensor("origins", origins),
        pair("map_size", map_size),
        pair("stride", stride),
        pair("dilation", dilation),
        integer("groups", groups),
        option("gate", gate, GATES),
        tensor("positive", positive, optional=True),
        switches,
        undone,
    )


class _Sizes(NamedTuple):
    maps: list[int]
    image: list[int]


def _reach(size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """Height and width that ``size`` positions of a window reach below."""
    return [(n - 1) * s + (k - 1) * d + 1 for n, k, s, d in zip(size, kernel, stride, dilation, strict=True)]


def _check(
    signal: Tensor,
    weight: Tensor,
    origins: Tensor,
    map_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    gate: str,
    positive: Tensor | None,
    switches: Tensor | None,
    pool: Sequence[int],
) -> _Sizes:
    if signal.dim() != 4:
        raise RuntimeError(
            f"signal has shape {tuple(signal.shape)}; it must be (windows, height, width, channels): "
            "one window needs unsqueeze(0) too"
        )
    check_tensor("signal", signal)
    check_tensor("weight", weight, like=signal)
    check_at_least(1, map_size=map_size, stride=stride, dilation=dilation)
    if groups < 1 or signal.size(3) % groups or weight.size(0) != signal.size(3):
        raise RuntimeError(
            f"weight has shape {tuple(weight.shape)}; with groups={groups} its first dimension must be the "
            f"{signal.size(3)} channels of signal, a multiple of groups"
        )
    check_origins("origins", origins, (len(signal), 2), signal)
    maps = list(signal.shape[1:3])
    if switches is not None:
        kernel, step, spread = pool[:2], pool[2:4], pool[4:]
        check_at_least(1, pool=pool)
        if kernel[0] * kernel[1] >= MAX_WINDOW:
            raise RuntimeError(f"pool has kernel_size {tuple(kernel)}; it may have at most {MAX_WINDOW - 1} positions")
        check_shape("switches", switches, signal.shape, "the shape of signal")
        check_device("switches", switches, signal)
        if switches.dtype != torch.uint8:
            raise RuntimeError(f"switches has dtype {switches.dtype}; it must be torch.uint8")
        maps = _reach(maps, kernel, step, spread)
    if (positive is not None) != (gate in ("backprop", "guided")):
        raise RuntimeError(
            f"positive is {'None' if positive is None else 'given'} with gate={gate!r}; the gates 'backprop' and "
            "'guided' need it, the others have no use for it"
        )
    if positive is not None:
        check_shape("positive", positive, (len(signal), *maps, -(-signal.size(3) // 8)), "a bit for each value")
        check_device("positive", positive, signal)
        if positive.dtype != torch.uint8:
            raise RuntimeError(f"positive has dtype {positive.dtype}; it must be torch.uint8")
    return _Sizes(maps, _reach(maps, weight.shape[2:], stride, dilation))


@torch.library.custom_op(f"{NAMESPACE}::window_deconv2d", mutates_args=())
def _windows(
    signal: Tensor,
    weight: Tensor,
    origins: Tensor,
    map_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    gate: str,
    positive: Tensor | None,
    switches: Tensor | None,
    pool: Sequence[int],
) -> Tensor:
    sizes = _check(signal, weight, origins, map_size, stride, dilation, groups, gate, positive, switches, pool)
    count, *pooled, channels = signal.shape
    image = signal.new_empty(count, *sizes.image, weight.size(1) * groups)
    if not image.numel():
        return image
    convolution = (*weight.shape[2:], *stride, *dilation, groups, *map_size)
    undone = (0,) * 8 if switches is None else (*pooled, *pool)
    shape = (count, image.size(3), *sizes.image, channels, *sizes.maps, *convolution, *undone)
    where = shape, core.DTYPES[signal.dtype]
    scratch = core.workspace("window_deconv2d", signal, *where)
    core.run(
        "window_deconv2d",
        signal,
        *where,
        core.GATES[gate],
        *(None if t is None else t.contiguous() for t in (signal, switches, positive, weight, origins)),
        image,
        scratch,
    )
    return image


@_windows.register_fake
def _(
    signal: Tensor,
    weight: Tensor,
    origins: Tensor,
    map_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    gate: str,
    positive: Tensor | None,
    switches: Tensor | None,
    pool: Sequence[int],
) -> Tensor:
    sizes = _check(signal, weight, origins, map_size, stride, dilation, groups, gate, positive, switches, pool)
    return signal.new_empty(len(signal), *sizes.image, weight.size(1) * groups)


not_differentiable(
    _windows, "window_deconv2d", "deconv2d and max_unpool2d take the same step for whole maps, differentiably"
)
