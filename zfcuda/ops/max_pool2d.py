"""Max-pooling that records switches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from zfcuda.ops._common import dense, flag, memory_format, tensor
from zfcuda.ops._pool import Window, pool, pooled_input, window_of
from zfcuda.ops._register import TwoResults, entry, operator
from zfcuda.ops.max_unpool2d import gather, unpool

__all__ = ["max_pool2d"]


@entry(images=("input",))
def max_pool2d(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Maximum of each window, and where it was: the *switches* of section 2.1 of the paper.

    .. math:: y[r, c] = \max_{i, j}\; x[r \, s_h - p_h + i \, d_h,\; c \, s_w - p_w + j \, d_w]

    Parameters
    ----------
    input
        (batch, channels, height, width), or one image without the batch; floating point, any strides.
    kernel_size, stride, padding, dilation, ceil_mode
        As in ``torch.nn.functional.max_pool2d``; ``stride=None`` is ``kernel_size``. A window has at most 256
        positions.

    Returns
    -------
    output, switches
        The maxima, and for each the position i · kernel_w + j within its window as uint8; both have the
        input's memory format. Of equal maxima the first in row-major order counts (so a window of zeros has
        its first position inside the input as switch); of NaN, which wins over every number, the last.

    Raises
    ------
    TypeError
        If an argument has the wrong Python type.
    RuntimeError
        If a tensor or a size is impossible; the message names the argument and its value.

    Notes
    -----
    Differentiable any number of times with respect to ``input``; only the switches are kept for it.
    """
    window = window_of(kernel_size, stride, padding, dilation)
    return _max_pool2d(tensor("input", input), window, flag("ceil_mode", ceil_mode))


@operator("max_pool2d", batched=("input",))
def _max_pool2d(input: Tensor, window: Window, ceil_mode: bool) -> TwoResults:
    results = yield pooled_input(input, window, ceil_mode)
    pool(input, window, False, *results)


def _setup_context(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor]) -> None:
    input, ctx.window, _ = inputs
    ctx.input_size = input.shape[2:]
    ctx.save_for_backward(output[1])


def _backward(ctx: Any, grad_output: Tensor, _: None) -> Tensor:
    (switches,) = ctx.saved_tensors
    # The switches come from the pool itself, so nobody needs to check them.
    return unpool(dense(grad_output, memory_format(switches)), switches, ctx.window, ctx.input_size, False, False)


def _tangent(inputs: Sequence[Any], results: tuple[Tensor, Tensor], tangents: Sequence[Any]) -> tuple[Tensor, None]:
    return gather(tangents[0], results[1], inputs[1], False, False), None


_max_pool2d.register_autograd(_backward, _setup_context, _tangent)
