"""Convolution, bias and ReLU in one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from zfcuda.ops._common import dense, memory_format, option, pair, tensor
from zfcuda.ops._conv import Filters, check_bias, convolve, convolved, filters_of
from zfcuda.ops._register import OneResult, entry, operator
from zfcuda.ops.deconv2d import convolution_backward, convolution_tangent

__all__ = ["conv2d_relu"]


@entry(casts=True, images=("input",))
def conv2d_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    r"""Convolution (cross-correlation) with bias, rectified: a layer of section 2 of the paper.

    .. math:: y_o = \max\Big(0,\; b_o + \sum_i w_{o,i} \star x_i\Big)

    Parameters
    ----------
    input
        (batch, in_channels, height, width), or one image without the batch; floating point, any strides.
    weight
        (out_channels, in_channels / groups, kernel_h, kernel_w).
    bias
        (out_channels,) or None.
    stride, padding, dilation, groups
        As in ``torch.nn.functional.conv2d``, with ``padding="valid"`` and ``"same"``.

    Returns
    -------
    Tensor
        (batch, out_channels, …) in the input's memory format. NaN stays NaN.

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
    Differentiable any number of times with respect to input, weight and bias; as in torch the rectifier's derivative is
    0 at 0 and passes at NaN.
    """
    input, padding = padded(tensor("input", input), tensor("weight", weight), stride, padding, dilation)
    filters = filters_of(stride, padding, dilation, groups)
    return _conv2d_relu(input, weight, tensor("bias", bias, optional=True), filters)


def padded(
    input: Tensor,
    weight: Tensor,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
) -> tuple[Tensor, int | Sequence[int]]:
    """The input, padded where a mode asks for more on one side, as torch pads it: on the right; and what is left."""
    if not isinstance(padding, str):
        return input, padding
    option("padding", padding, ("valid", "same"))
    if padding == "valid" or input.dim() != 4 or weight.dim() != 4:  # a wrong rank is named later
        return input, [0, 0]
    if pair("stride", stride) != [1, 1]:
        raise RuntimeError(f"padding is 'same' with stride={stride!r}; it needs stride=1: give padding as a number")
    (top, bottom), (left, right) = (
        (d * (k - 1) // 2, (d * (k - 1) + 1) // 2)
        for k, d in zip(weight.shape[2:], pair("dilation", dilation), strict=True)
    )
    if bottom > top or right > left:
        input = F.pad(input, (0, right - left, 0, bottom - top))
    return input, [top, left]


def check(input: Tensor, weight: Tensor, bias: Tensor | None, filters: Filters) -> list[int]:
    """Height and width of the maps."""
    filters.check("input", input, weight, rows=False)
    check_bias(bias, input, weight.size(0))
    size = filters.maps_size(input.shape[2:], weight.shape[2:])
    if min(size) < 1:
        raise RuntimeError(
            f"weight has shape {tuple(weight.shape)}; with dilation={tuple(filters.dilation)} its kernel must fit the "
            f"input of shape {tuple(input.shape)} padded by {tuple(filters.padding)}"
        )
    return size


@operator("conv2d_relu", batched=("input",))
def _conv2d_relu(input: Tensor, weight: Tensor, bias: Tensor | None, filters: Filters) -> OneResult:
    maps = yield convolved(input, weight, check(input, weight, bias, filters))
    convolve(input, weight, bias, None, filters, "deconvnet", maps)


def _setup_context(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    input, weight, _, ctx.filters = inputs
    ctx.input_size = input.shape[2:]
    ctx.save_for_backward(input if ctx.needs_input_grad[1] else None, weight, output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, output = ctx.saved_tensors
    grad, needs = dense(grad, memory_format(output)), ctx.needs_input_grad[:3]
    return convolution_backward(grad, input, weight, output.detach(), ctx.input_size, ctx.filters, needs)


def _tangent(inputs: Sequence[Any], output: Tensor, tangents: Sequence[Any]) -> Tensor | None:
    image, weight, _, filters = inputs
    return convolution_tangent(image, weight, output.detach(), filters, output.shape, tangents)


_conv2d_relu.register_autograd(_backward, _setup_context, _tangent)
