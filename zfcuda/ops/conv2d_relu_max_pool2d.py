"""Convolution, bias, ReLU and max-pooling with switches in one: a whole layer of the paper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from zfcuda import core
from zfcuda.ops._common import dense, flag, memory_format, tensor
from zfcuda.ops._conv import Filters, filters_of
from zfcuda.ops._pool import PoolWindow, Window, pooled, window_of
from zfcuda.ops._register import TwoResults, entry, operator
from zfcuda.ops.conv2d_relu import check, padded
from zfcuda.ops.deconv2d import convolution_tangent
from zfcuda.ops.max_unpool2d import gather
from zfcuda.ops.unpool_relu_deconv2d import unpool_deconvolve, unpooled_weight_gradient

__all__ = ["conv2d_relu_max_pool2d"]


@entry(casts=True, images=("input",))
def conv2d_relu_max_pool2d(
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
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    r"""A layer of section 2 of the paper with its pool: :func:`conv2d_relu`, then :func:`max_pool2d`, in one.

    .. math:: y_o = \operatorname{pool}\Big(\max\big(0,\; b_o + \sum_i w_{o,i} \star x_i\big)\Big)

    The rectified maps, four times as large as what is left of them after a pool of stride 2, are neither
    written to memory nor kept for the gradient.

    Parameters
    ----------
    input
        (batch, in_channels, height, width), or one image without the batch; floating point, any strides.
    weight
        (out_channels, in_channels / groups, kernel_h, kernel_w).
    bias
        (out_channels,) or None.
    stride, padding, dilation, groups
        Of the convolution, as in ``torch.nn.functional.conv2d``, with ``padding="valid"`` and ``"same"``.
    pool_kernel_size, pool_stride, pool_padding, pool_dilation, pool_ceil_mode
        Of the pool, as in ``torch.nn.functional.max_pool2d``; ``pool_stride=None`` is ``pool_kernel_size``. A window
        has at most 256 positions.
    out
        Where to write the results: a pair of tensors as they would be returned, dense in the input's memory
        format. Not differentiable.

    Returns
    -------
    output, switches
        (batch, out_channels, …): the maxima, and for each the position i · kernel_w + j within its window as
        uint8; both have the input's memory format. The rules for ties and NaN are those of
        :func:`relu_max_pool2d`.

    Raises
    ------
    TypeError
        If an argument has the wrong Python type.
    ValueError
        If ``padding`` is a string, but neither of its two modes.
    RuntimeError
        If a tensor or a size is impossible, or ``out`` does not fit or meets a tensor that requires grad; the
        message names the argument and its value.

    Notes
    -----
    Differentiable any number of times with respect to input, weight and bias. Where two values of a window are
    equal but for rounding, the switch may differ from that of a convolution that adds in another order, torch's
    for one.
    """
    window = pool_kernel_size, pool_stride, pool_padding, pool_dilation
    arguments = checked(input, weight, bias, stride, padding, dilation, groups, *window, pool_ceil_mode)
    return convolve_pool(*arguments) if out is None else convolve_pool.into(out, *arguments)


def checked(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
    pool_kernel_size: int | Sequence[int],
    pool_stride: int | Sequence[int] | None,
    pool_padding: int | Sequence[int],
    pool_dilation: int | Sequence[int],
    pool_ceil_mode: bool,
) -> tuple[Any, ...]:
    """The arguments of a call, of the right Python types, as implementations take them."""
    input, padding = padded(tensor("input", input), tensor("weight", weight), stride, padding, dilation)
    return (
        input,
        weight,
        tensor("bias", bias, optional=True),
        filters_of(stride, padding, dilation, groups),
        window_of(pool_kernel_size, pool_stride, pool_padding, pool_dilation, "pool_"),
        flag("pool_ceil_mode", pool_ceil_mode),
    )


def sizes(
    input: Tensor, weight: Tensor, bias: Tensor | None, filters: Filters, window: Window, ceil_mode: bool
) -> tuple[list[int], list[int]]:
    """The whole shapes of the maps and of their pool, after every check."""
    maps = check(input, weight, bias, filters)
    window.check("pool_")
    window.check_input("the maps", maps, ceil_mode, "pool_")
    head = [input.size(0), weight.size(0)]
    return [*head, *maps], [*head, *window.pooled_size(maps, ceil_mode)]


def run(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    filters: Filters,
    window: Window,
    maps: Sequence[int],
    output: Tensor,
    switches: Tensor,
    values: Tensor | None = None,
    positions: Tensor | None = None,
) -> None:
    """``conv2d_relu_max_pool2d`` of csrc/ops.h into checked tensors."""
    if output.numel():
        layout = memory_format(input)
        shapes = filters.shape(input.shape, maps, weight, layout), window.shape(maps, output.shape, layout)
        where = *shapes, core.DTYPES[input.dtype]
        scratch = core.workspace("conv2d_relu_max_pool2d", input, *where, values is not None)
        tensors = dense(input, layout), dense(weight), dense(bias), output, switches, values, positions, scratch
        core.run("conv2d_relu_max_pool2d", input, *where, *tensors)


@operator("conv2d_relu_max_pool2d", batched=("input",))
def convolve_pool(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    filters: Filters,
    window: PoolWindow,
    pool_ceil_mode: bool,
) -> TwoResults:
    maps, size = sizes(input, weight, bias, filters, window, pool_ceil_mode)
    output, switches = yield pooled(input, size)
    run(input, weight, bias, filters, window, maps, output, switches)


def _setup_context(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor]) -> None:
    input, weight, _, ctx.filters, ctx.window, _ = inputs
    ctx.input_size = input.shape[2:]
    ctx.save_for_backward(input if ctx.needs_input_grad[1] else None, weight, *output)


def _backward(ctx: Any, grad_output: Tensor, _: None) -> tuple[Tensor | None, ...]:
    input, weight, output, switches = ctx.saved_tensors
    return gradients(ctx, input, weight, output, switches, grad_output)


def gradients(
    ctx: Any, input: Tensor | None, weight: Tensor, output: Tensor, switches: Tensor, grad_output: Tensor
) -> tuple[Tensor | None, ...]:
    """Those by input, weight and bias that ``ctx`` asks for, of the pool that is ``output``."""
    filters, window = ctx.filters, ctx.window
    needs_input, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    maps_size = filters.maps_size(ctx.input_size, weight.shape[2:])
    # What the rectifier lets pass can be told from the maxima: the gradient reaches nothing else.
    grad, opened = dense(grad_output, memory_format(switches)), output.detach()
    grad_input = grad_weight = grad_bias = None
    rest = maps_size, False, "backprop"
    if needs_input:
        slide = filters.transposed(maps_size, weight.shape[2:], ctx.input_size)
        grad_input = unpool_deconvolve(grad, switches, weight, None, slide, window, *rest, opened, False)
    if needs_weight:
        grad_weight = unpooled_weight_gradient(input, grad, switches, opened, weight, filters, window, *rest)
    if needs_bias:
        grad_bias = grad.masked_fill(opened <= 0, 0).sum((0, 2, 3))
    return grad_input, grad_weight, grad_bias


def _tangent(
    inputs: Sequence[Any], results: tuple[Tensor, Tensor], tangents: Sequence[Any]
) -> tuple[Tensor | None, None]:
    image, weight, _, filters, window, _ = inputs
    return pooled_tangent(image, weight, filters, window, *results, tangents), None


def pooled_tangent(
    image: Tensor,
    weight: Tensor,
    filters: Filters,
    window: Window,
    output: Tensor,
    switches: Tensor,
    tangents: Sequence[Any],
) -> Tensor | None:
    """The tangent of the pool that is ``output``, for those of image, weight and bias, which come first."""
    size = [*output.shape[:2], *filters.maps_size(image.shape[2:], weight.shape[2:])]
    maps = convolution_tangent(image, weight, None, filters, size, tangents)
    if maps is None:
        return None
    return gather(maps, switches, window, False, False).masked_fill(output.detach() <= 0, 0)


convolve_pool.register_autograd(_backward, _setup_context, _tangent)
convolve_pool.register_out("output", "switches")
