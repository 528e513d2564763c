"""Switches to torch's flat indices and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zfcuda.ops._common import check_shape, integers, pair, tensor
from zfcuda.ops._pool import Window, check_switches, window_of
from zfcuda.ops._register import entry

__all__ = ["indices_to_switches", "switches_to_indices"]


@entry(repeats=False, images=("switches",))
def switches_to_indices(
    switches: Tensor,
    input_size: Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """The int64 indices of ``torch.nn.functional.max_pool2d(…, return_indices=True)``: y · width + x.

    Parameters
    ----------
    switches
        uint8 (batch, channels, height, width), or without the batch, as :func:`max_pool2d` gives them.
    input_size
        Height and width of what was pooled, or its whole shape.
    kernel_size, stride, padding, dilation
        Those of the pool; ``stride=None`` is ``kernel_size``.

    Raises
    ------
    TypeError
        If an argument has the wrong Python type.
    RuntimeError
        If a switch points out of its window or out of the input, or a size is impossible.
    """
    window, size = _window(input_size, kernel_size, stride, padding, dilation)
    tensor("switches", switches)
    _check_pooled("switches", switches, window, size)
    check_switches(switches, switches, switches.shape, "")
    top, left = _origins(switches, window)
    tap_y, tap_x = switches.long() // window.kernel_size[1], switches.long() % window.kernel_size[1]
    y, x = top + tap_y * window.dilation[0], left + tap_x * window.dilation[1]
    valid = (tap_y < window.kernel_size[0]) & (y >= 0) & (y < size[0]) & (x >= 0) & (x < size[1])
    _require_all("switches", switches, valid, window, size)
    return y * size[1] + x


@entry(repeats=False, images=("indices",))
def indices_to_switches(
    indices: Tensor,
    input_size: Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """The inverse of :func:`switches_to_indices`, with the same arguments.

    Raises
    ------
    TypeError
        If an argument has the wrong Python type.
    RuntimeError
        If an index does not lie in its window or in the input, or a size or the dtype is impossible.
    """
    window, size = _window(input_size, kernel_size, stride, padding, dilation)
    tensor("indices", indices)
    if indices.dtype != torch.int64:
        raise RuntimeError(f"indices has dtype {indices.dtype}; it must be torch.int64, as torch's pool returns them")
    _check_pooled("indices", indices, window, size)
    top, left = _origins(indices, window)
    # Distance from the first position of the window; floor division keeps negative ones out.
    y = torch.div(indices, size[1], rounding_mode="floor") - top
    x = indices % size[1] - left
    tap_y, tap_x = y // window.dilation[0], x // window.dilation[1]
    valid = (indices >= 0) & (indices < size[0] * size[1])
    valid &= (y % window.dilation[0] == 0) & (x % window.dilation[1] == 0)
    valid &= (tap_y >= 0) & (tap_y < window.kernel_size[0]) & (tap_x >= 0) & (tap_x < window.kernel_size[1])
    _require_all("indices", indices, valid, window, size)
    return (tap_y * window.kernel_size[1] + tap_x).to(torch.uint8)


def _window(
    input_size: Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None,
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
) -> tuple[Window, list[int]]:
    window = window_of(kernel_size, stride, padding, dilation)
    window.check()
    return window, pair("input_size", integers("input_size", input_size)[-2:])


def _check_pooled(name: str, value: Tensor, window: Window, size: Sequence[int]) -> None:
    if value.dim() != 4:
        raise RuntimeError(f"{name} has shape {tuple(value.shape)}; it must have 4 dimensions")
    pooled = [window.pooled_size(size, ceil_mode) for ceil_mode in (False, True)]
    sizes = [n if n in both else both[1] for n, both in zip(value.shape[2:], zip(*pooled, strict=True), strict=True)]
    check_shape(name, value, [*value.shape[:2], *sizes], f"the shape of the pool of an input_size of {tuple(size)}")


def _origins(value: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """Rows of the windows' first positions as a column, their columns as a row."""
    top = torch.arange(value.size(2), device=value.device) * window.stride[0] - window.padding[0]
    left = torch.arange(value.size(3), device=value.device) * window.stride[1] - window.padding[1]
    return top[:, None], left[None, :]


def _require_all(name: str, value: Tensor, valid: Tensor, window: Window, size: Sequence[int]) -> None:
    if not bool(valid.all()):
        index = (~valid).nonzero()[0].tolist()
        raise RuntimeError(
            f"{name}[{', '.join(map(str, index))}] is {int(value[tuple(index)])}; it must point into its window of "
            f"{tuple(window.kernel_size)} and into the input of height and width {tuple(size)}"
        )
