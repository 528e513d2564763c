"""Convolution, bias and ReLU in one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zfcuda.ops._common import NAMESPACE, dense, empty, integer, memory_format, pair, tensor
from zfcuda.ops._conv import Filters, check_bias, conv2d_weight_gradient, convolve
from zfcuda.ops.deconv2d import deconvolve

__all__ = ["conv2d_relu"]


def conv2d_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    r"""Convolution (cross-correlation) with bias, rectified: a layer of section 2 of the paper.

    .. math:: y_o = \max\Big(0,\; b_o + \sum_i w_{o,i} \star x_i\Big)

    Parameters
    ----------
    input
        (batch, in_channels, height, width), float32 or float64, any strides.
    weight
        (out_channels, in_channels / groups, kernel_h, kernel_w).
    bias
        (out_channels,) or None.
    stride, padding, dilation, groups
        As in ``torch.nn.functional.conv2d``; padding is a number, not a mode.

    Returns
    -------
    Tensor
        (batch, out_channels, …) in the input's memory format. NaN stays NaN.

    Raises
    ------
    TypeError
        If an argument has the wrong Python type.
    RuntimeError
        If a tensor or a size is impossible; the message names the argument and its value.

    Notes
    -----
    First derivatives with respect to input, weight and bias; as in torch the rectifier's is 0 at 0 and passes
    at NaN.
    """
    return _conv2d_relu(
        tensor("input", input),
        tensor("weight", weight),
        tensor("bias", bias, optional=True),
        pair("stride", stride),
        pair("padding", padding),
        pair("dilation", dilation),
        integer("groups", groups),
    )


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


@torch.library.custom_op(f"{NAMESPACE}::conv2d_relu", mutates_args=())
def _conv2d_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    filters = Filters(stride, padding, dilation, groups)
    size = check(input, weight, bias, filters)
    return convolve(input, weight, bias, None, filters, "deconvnet", size)


@_conv2d_relu.register_fake
def _(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    size = check(input, weight, bias, Filters(stride, padding, dilation, groups))
    return empty(input, [input.size(0), weight.size(0), *size], memory_format(input))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, _, *filters = inputs
    ctx.filters = Filters(*filters)
    ctx.input_size = input.shape[2:]
    ctx.save_for_backward(input if ctx.needs_input_grad[1] else None, weight, output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, output = ctx.saved_tensors
    filters: Filters = ctx.filters
    needs_input, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    grad = dense(grad, memory_format(output))
    grad_input = grad_weight = grad_bias = None
    if needs_input:
        reached = filters.image_size(output.shape[2:], weight.shape[2:])
        rest = [n - r for n, r in zip(ctx.input_size, reached, strict=True)]
        stride, padding, dilation, groups = filters
        grad_input = deconvolve(
            grad, weight, None, stride, padding, rest, groups, dilation, "backprop", output.detach()
        )
    if needs_weight:
        grad_weight, sums = conv2d_weight_gradient(input, grad, output, weight, *filters, "backprop", needs_bias)
        grad_bias = sums if needs_bias else None
    elif needs_bias:
        grad_bias = grad.masked_fill(output <= 0, 0).sum((0, 2, 3))
    return grad_input, grad_weight, grad_bias, None, None, None, None


_conv2d_relu.register_autograd(_backward, setup_context=_setup_context)
