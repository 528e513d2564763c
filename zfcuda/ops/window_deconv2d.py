"""One step down of a receptive-field-local projection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zfcuda import core
from zfcuda.ops._common import (
    MAX_WINDOW,
    check_at_least,
    check_device,
    check_shape,
    check_tensor,
    integer,
    option,
    pair,
    tensor,
)
from zfcuda.ops._out import Result
from zfcuda.ops._register import OneResult, entry, not_differentiable, operator
from zfcuda.ops.crop_windows import check_origins

__all__ = ["WindowDeconv2d", "window_deconv2d"]

GATES = ("none", "deconvnet", "backprop", "guided")


@entry()
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
        (windows, height, width, out_channels), floating point: windows of the maps, or of the pooled maps where
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
        tensor("switches", switches, optional=True),
        [] if pool is None else _pool_numbers(pool),
    )


class WindowDeconv2d:
    """`window_deconv2d` with a weight that is packed once, for many calls. For use without autograd or tracing.

    Calls compute in the numeric mode (:class:`zfcuda.set_fp32_precision`) in which the weight was packed.

    Parameters
    ----------
    weight, stride, dilation, groups, pool
        As in `window_deconv2d`.
    size
        Height and width of the windows of the signal.
    windows
        How many windows all calls together will have, about: the way to compute is chosen by it.
    """

    def __init__(
        self,
        weight: Tensor,
        size: Sequence[int],
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        *,
        pool: tuple[int | Sequence[int], int | Sequence[int], int | Sequence[int]] | None = None,
        windows: int = 1,
    ) -> None:
        undone = [] if pool is None else _pool_numbers(pool)
        slide = pair("stride", stride), pair("dilation", dilation), integer("groups", groups)
        size = pair("size", list(size))
        self.geometry = _Geometry(size, tensor("weight", weight).shape, *slide, undone, integer("windows", windows))
        check_tensor("weight", weight)
        self.geometry.check()
        self.dtype, self.device = weight.dtype, weight.device
        where = self.geometry.shape(windows, (1, 1)), core.DTYPES[weight.dtype]
        self.precision = core.precision(weight)  # the packed weight depends on it
        self.packed = core.room("window_deconv2d_packed", weight, *where)
        core.run("window_deconv2d_pack", weight, *where, weight.contiguous(), self.packed)

    def __call__(
        self,
        signal: Tensor,
        origins: Tensor,
        map_size: Sequence[int],
        *,
        gate: str = "none",
        positive: Tensor | None = None,
        switches: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """As `window_deconv2d`; the result goes to ``out``, contiguous, where that is given."""
        if torch.is_grad_enabled() and signal.requires_grad:
            raise RuntimeError(f"signal requires a gradient, and WindowDeconv2d has none; {_REMEDY}")
        _check(signal, self.dtype, self.device, origins, map_size, self.geometry, gate, positive, switches)
        size = (len(signal), *self.geometry.image, self.geometry.channels)
        image = core.empty(size, signal) if out is None else out
        _check_out(image, size, signal)
        if image.numel():
            where = self.geometry.shape(len(signal), map_size), core.DTYPES[signal.dtype]
            scratch = core.workspace("window_deconv2d", signal, *where)
            tensors = (
                None if t is None else t.contiguous() for t in (signal, switches, positive, self.packed, origins)
            )
            arguments = *where, core.GATES[gate], *tensors, image, scratch
            core.run("window_deconv2d", signal, *arguments, precision=self.precision)
        return image


_REMEDY = "deconv2d and max_unpool2d take the same step for whole maps, differentiably"


def _pool_numbers(pool: Sequence[int | Sequence[int]]) -> list[int]:
    if not isinstance(pool, (tuple, list)) or len(pool) != 3:
        raise TypeError(f"pool is {pool!r}; it must be (kernel_size, stride, dilation)")
    names = ("pool[0] (kernel_size)", "pool[1] (stride)", "pool[2] (dilation)")
    return [n for name, value in zip(names, pool, strict=True) for n in pair(name, value)]


def _reach(size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """Height and width that ``size`` positions of a window reach below."""
    return [(n - 1) * s + (k - 1) * d + 1 for n, k, s, d in zip(size, kernel, stride, dilation, strict=True)]


class _Geometry(NamedTuple):
    """All that a packed weight depends on."""

    size: Sequence[int]
    weight: Sequence[int]
    stride: Sequence[int]
    dilation: Sequence[int]
    groups: int
    pool: Sequence[int]
    expected: int

    def check(self) -> None:
        """Raise RuntimeError for a geometry that no windows have."""
        rows = self.weight[0]
        check_at_least(1, size=self.size, stride=self.stride, dilation=self.dilation)
        if self.groups < 1 or rows % self.groups:
            raise RuntimeError(f"groups is {self.groups}; it must divide the {rows} rows of weight")
        if self.pool:
            check_at_least(1, pool=self.pool)
            if self.pool[0] * self.pool[1] >= MAX_WINDOW:
                raise RuntimeError(
                    f"pool has kernel_size {tuple(self.pool[:2])}; it may have at most {MAX_WINDOW - 1} positions"
                )

    @property
    def channels(self) -> int:
        """Of the windows below."""
        return self.weight[1] * self.groups

    @property
    def maps(self) -> list[int]:
        """Height and width of the windows of the maps."""
        pool = self.pool
        return _reach(self.size, pool[:2], pool[2:4], pool[4:]) if pool else list(self.size)

    @property
    def image(self) -> list[int]:
        """Height and width of the windows below."""
        return _reach(self.maps, self.weight[2:], self.stride, self.dilation)

    def shape(self, windows: int, map_size: Sequence[int]) -> tuple[int, ...]:
        """WindowShape of csrc/shapes.h."""
        below = (self.channels, *self.image)
        convolution = (*self.weight[2:], *self.stride, *self.dilation, self.groups, *map_size)
        undone = (*self.size, *self.pool) if self.pool else (0,) * 8
        return (windows, self.expected, *below, self.weight[0], *self.maps, *convolution, *undone)


def _check(
    signal: Tensor,
    dtype: torch.dtype,
    device: torch.device,
    origins: Tensor,
    map_size: Sequence[int],
    geometry: _Geometry,
    gate: str,
    positive: Tensor | None,
    switches: Tensor | None,
) -> None:
    _check_signal(signal)
    if signal.dtype != dtype or signal.device != device:
        raise RuntimeError(
            f"signal has dtype {signal.dtype} on {signal.device}; it must be {dtype} on {device} like the weight"
        )
    check_at_least(1, map_size=map_size)
    wanted = (len(signal), *geometry.size, geometry.weight[0])
    check_shape("signal", signal, wanted, "the windows and channels that the weight was packed for")
    check_origins("origins", origins, (len(signal), 2), signal)
    if (switches is not None) != bool(geometry.pool):
        missing = "switches" if switches is None else "pool"
        raise RuntimeError(f"{missing} is None; give pool and switches together, or neither")
    if (positive is not None) != (gate in ("backprop", "guided")):
        raise RuntimeError(
            f"positive is {'None' if positive is None else 'given'} with gate={gate!r}; the gates 'backprop' and "
            "'guided' need it, the others have no use for it"
        )
    if switches is not None:
        _check_bytes("switches", switches, signal.shape, "the shape of signal", signal)
    if positive is not None:
        bits = (len(signal), *geometry.maps, -(-signal.size(3) // 8))
        _check_bytes("positive", positive, bits, "a bit for each value", signal)


def _check_out(out: Tensor, size: Sequence[int], like: Tensor) -> None:
    check_tensor("out", out, like=like)
    check_shape("out", out, size, "the shape of the result")
    if not out.is_contiguous():
        raise RuntimeError(f"out has strides {out.stride()}; it must be contiguous")


def _check_signal(signal: Tensor) -> None:
    if signal.dim() != 4:
        raise RuntimeError(
            f"signal has shape {tuple(signal.shape)}; it must be (windows, height, width, channels): "
            "one window needs unsqueeze(0) too"
        )
    check_tensor("signal", signal)


def _check_bytes(name: str, value: Tensor, shape: Sequence[int], why: str, like: Tensor) -> None:
    if value.dtype != torch.uint8:
        raise RuntimeError(f"{name} has dtype {value.dtype}; it must be torch.uint8")
    check_shape(name, value, shape, why)
    check_device(name, value, like)


def _check_weight(signal: Tensor, weight: Tensor, groups: int) -> None:
    """What the operator checks besides what a packed weight can be asked for."""
    _check_signal(signal)
    check_tensor("weight", weight, like=signal)
    if groups < 1 or signal.size(3) % groups or weight.size(0) != signal.size(3):
        raise RuntimeError(
            f"weight has shape {tuple(weight.shape)}; with groups={groups} its first dimension must be the "
            f"{signal.size(3)} channels of signal, a multiple of groups"
        )


@operator("window_deconv2d")
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
) -> OneResult:
    _check_weight(signal, weight, groups)
    geometry = _Geometry(signal.shape[1:3], weight.shape, stride, dilation, groups, pool, len(signal))
    geometry.check()
    _check(signal, weight.dtype, weight.device, origins, map_size, geometry, gate, positive, switches)
    image = yield Result(signal, [len(signal), *geometry.image, geometry.channels])
    undone = (pool[:2], pool[2:4], pool[4:]) if pool else None
    step = WindowDeconv2d(weight, signal.shape[1:3], stride, dilation, groups, pool=undone, windows=len(signal))
    step(signal, origins, map_size, gate=gate, positive=positive, switches=switches, out=image)


not_differentiable(_windows, "window_deconv2d", _REMEDY)
