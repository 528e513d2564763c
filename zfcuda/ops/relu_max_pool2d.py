"""ReLU and max-pooling in one pass, with switches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from zfcuda.ops._common import dense, flag, memory_format, tensor
from zfcuda.ops._pool import Window, pool, pooled_input, window_of
from zfcuda.ops._register import TwoResults, entry, operator
from zfcuda.ops.max_unpool2d import gather, unpool

__all__ = ["relu_max_pool2d"]


@entry(images=("input",))
def relu_max_pool2d(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Rectify, then the maximum of each window and where it was (sections 2 and 2.1 of the paper).

    .. math:: y_{oy,ox} = \max_{i,j} \max(0,\; x_{oy \, s_h - p_h + i \, d_h,\; ox \, s_w - p_w + j \, d_w})

    Exactly ``max_pool2d(input.relu(), …)``, switches included, in one pass that writes no rectified map.

    Parameters
    ----------
    input
        (batch, channels, height, width), or one image without the batch; floating point, any strides.
    kernel_size, stride, padding, dilation, ceil_mode
        As in ``torch.nn.functional.max_pool2d``; ``stride=None`` is ``kernel_size``. A window has at most 256
        positions.
    out
        Where to write the results: a pair of tensors as they would be returned, dense in the input's memory
        format. Not differentiable.

    Returns
    -------
    output, switches
        The maxima, and for each the position i · kernel_w + j within its window as uint8; both have the
        input's memory format. Of equal maxima the first in row-major order counts, so a window without a
        positive value has its first position inside the input as switch; of NaN, which wins over every
        number, the last.

    Raises
    ------
    TypeError
        If an argument has the wrong Python type.
    RuntimeError
        If a tensor or a size is impossible, or ``out`` does not fit or meets a tensor that requires grad; the
        message names the argument and its value.

    Notes
    -----
    Differentiable any number of times with respect to ``input``; output and switches are kept for it. As in
    torch the gradient is 0 where the output is 0, and passes at NaN.
    """
    window = window_of(kernel_size, stride, padding, dilation)
    arguments = tensor("input", input), window, flag("ceil_mode", ceil_mode)
    return _relu_max_pool2d(*arguments) if out is None else _relu_max_pool2d.into(out, *arguments)


@operator("relu_max_pool2d", batched=("input",))
def _relu_max_pool2d(input: Tensor, window: Window, ceil_mode: bool) -> TwoResults:
    results = yield pooled_input(input, window, ceil_mode)
    pool(input, window, True, *results)


def _setup_context(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor]) -> None:
    input, ctx.window, _ = inputs
    ctx.input_size = input.shape[2:]
    ctx.save_for_backward(*output)


def _backward(ctx: Any, grad_output: Tensor, _: None) -> Tensor:
    output, switches = ctx.saved_tensors
    passed = dense(grad_output.masked_fill(output.detach() <= 0, 0), memory_format(switches))
    # The switches come from the pool itself, so nobody needs to check them.
    return unpool(passed, switches, ctx.window, ctx.input_size, False, False)


def _tangent(inputs: Sequence[Any], results: tuple[Tensor, Tensor], tangents: Sequence[Any]) -> tuple[Tensor, None]:
    output, switches = results
    return gather(tangents[0], switches, inputs[1], False, False).masked_fill(output.detach() <= 0, 0), None


_relu_max_pool2d.register_autograd(_backward, _setup_context, _tangent)
_relu_max_pool2d.register_out("output", "switches")
