"""The deconvnet's step in one: unpool by switches, gate, transposed convolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zfcuda import core
from zfcuda.ops._common import dense, memory_format, option, tensor
from zfcuda.ops._conv import Filters, Transposed, conv2d_gated, conv2d_weight_gradient, transposed_of
from zfcuda.ops._out import Result
from zfcuda.ops._pool import PoolWindow, Window, window_of
from zfcuda.ops._register import OneResult, entry, operator
from zfcuda.ops.deconv2d import check_forward, deconvolve, deconvolved, linear_tangent
from zfcuda.ops.max_unpool2d import OVERLAPS, check_switch_values, gather, plane, unpool, unpooled_shape

__all__ = ["unpool_relu_deconv2d"]


@entry(casts=True, images=("signal", "switches", "forward"), whole="pool_output_size")
def unpool_relu_deconv2d(
    signal: Tensor,
    switches: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    *,
    pool_kernel_size: int | Sequence[int],
    pool_stride: int | Sequence[int] | None = None,
    pool_padding: int | Sequence[int] = 0,
    pool_dilation: int | Sequence[int] = 1,
    pool_output_size: Sequence[int] | None = None,
    overlap: str = "sum",
    gate: str = "deconvnet",
    forward: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Unpool, rectify, filter: one whole step down the deconvnet (section 2.1 of the paper).

    :func:`max_unpool2d`, then :func:`deconv2d`, without the unpooled map in memory: the way down through a layer
    that :func:`conv2d_relu_max_pool2d` went up.

    Parameters
    ----------
    signal
        Pooled values (batch, in_channels, height, width), or of one image without the batch; floating point, any
        strides: what came down so far.
    switches
        As the pool gave them on the way up: uint8, of the signal's shape.
    weight
        (in_channels, out_channels / groups, kernel_h, kernel_w), as in ``conv_transpose2d``: the very weight of
        the convolution on the way up.
    bias
        (out_channels,) or None. The paper uses none.
    stride, padding, output_padding, groups, dilation
        Of the convolution, as in ``torch.nn.functional.conv_transpose2d``.
    pool_kernel_size, pool_stride, pool_padding, pool_dilation
        Those of the pool; ``pool_stride=None`` is ``pool_kernel_size``.
    pool_output_size
        Height and width (or the whole shape) of the map that was pooled. By default the smallest size whose pool
        without ``ceil_mode`` has the signal's size.
    overlap
        ``"sum"`` or ``"overwrite"``, as in :func:`max_unpool2d`.
    gate
        What stands between the unpooled signal and the filters: ``"deconvnet"`` keeps what is positive (the paper);
        ``"backprop"`` what came from where the rectified map was; ``"guided"`` where both are; ``"none"`` keeps
        it all.
    forward
        For ``"backprop"`` and ``"guided"`` only: the pool's output on the way up, of the signal's shape. A pool's
        output is the rectified map at its switches, the only places that unpooling reaches, so that it says all
        that the map would.
    out
        Where to write the result: a tensor as it would be returned, dense in the signal's memory format. Not
        differentiable.

    Returns
    -------
    Tensor
        (batch, out_channels, …) in the signal's memory format. Deterministic.

    Raises
    ------
    TypeError
        If an argument has the wrong Python type.
    ValueError
        If ``gate`` or ``overlap`` is not one of its values.
    RuntimeError
        If a tensor or a size is impossible, a switch points out of its window or out of the map, or ``out`` does
        not fit or meets a tensor that requires grad; the message names the argument and its value.

    Notes
    -----
    Differentiable any number of times with respect to signal, weight and bias; ``forward`` only opens and closes, so
    it has no derivative.
    The check of the switches' values reads one number back, which on CUDA waits for the device; while a CUDA graph
    is being captured it is left out.
    """
    arguments = (
        tensor("signal", signal),
        tensor("switches", switches),
        tensor("weight", weight),
        tensor("bias", bias, optional=True),
        transposed_of(stride, padding, output_padding, groups, dilation),
        window_of(pool_kernel_size, pool_stride, pool_padding, pool_dilation, "pool_"),
        plane("pool_output_size", pool_output_size, tensor("signal", signal)),
        option("overlap", overlap, OVERLAPS) == "overwrite",
        option("gate", gate, tuple(core.GATES)),
        tensor("forward", forward, optional=True),
    )
    return unpool_deconvolve(*arguments, True) if out is None else unpool_deconvolve.into(out, *arguments)


@operator("unpool_relu_deconv2d", batched=("signal", "switches", "forward"))
def unpool_deconvolve(
    signal: Tensor,
    switches: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slide: Transposed,
    window: PoolWindow,
    pool_output_size: Sequence[int] | None,
    overwrite: bool,
    gate: str,
    forward: Tensor | None,
    check_values: bool,
) -> OneResult:
    maps = unpooled_shape("signal", signal, switches, window, pool_output_size, "pool_")
    check_forward(signal, gate, forward, "the pool's output")
    image = yield deconvolved(signal, maps, weight, bias, slide)
    if not image.numel():
        return
    layout = memory_format(signal)
    pool = window.shape(maps, signal.shape, layout)
    switches = dense(switches, layout)
    if check_values:
        check_switch_values(switches, pool, window, maps)
    where = slide.filters.shape(image.shape, maps, weight, layout), pool, core.DTYPES[signal.dtype]
    scratch = core.workspace("unpool_relu_deconv2d", signal, *where)
    tensors = dense(signal, layout), switches, dense(forward, layout), dense(weight), dense(bias), image, scratch
    core.run("unpool_relu_deconv2d", signal, *where, core.GATES[gate], overwrite, *tensors)


def _setup_context(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    signal, switches, weight, _, slide, ctx.window, size, ctx.overwrite, ctx.gate, forward, _ = inputs
    ctx.filters, ctx.layout = slide.filters, memory_format(output)
    needed = ctx.needs_input_grad[2] or (ctx.needs_input_grad[0] and ctx.gate in ("deconvnet", "guided"))
    ctx.save_for_backward(signal if needed else None, switches, weight, forward)
    ctx.maps_size = ctx.window.unpooled_size(signal.shape[2:]) if size is None else size


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    signal, switches, weight, forward = ctx.saved_tensors
    grad = dense(grad, ctx.layout)
    needs_signal, _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    grad_signal = grad_weight = grad_bias = None
    slides = ctx.filters, ctx.window, ctx.maps_size, ctx.overwrite, ctx.gate
    if needs_signal:
        grad_signal = _to_signal(grad, weight, signal, switches, forward, *slides)
    if needs_weight:
        grad_weight = unpooled_weight_gradient(grad, signal, switches, forward, weight, *slides)
    if needs_bias:
        grad_bias = grad.sum((0, 2, 3))
    return grad_signal, None, grad_weight, grad_bias


def _to_signal(
    image: Tensor,
    weight: Tensor,
    signal: Tensor | None,
    switches: Tensor,
    forward: Tensor | None,
    filters: Filters,
    window: Window,
    maps_size: Sequence[int],
    overwrite: bool,
    gate: str,
) -> Tensor:
    """The transpose of the whole step with respect to its signal, which is given where the gate asks for its sign."""
    opened = None
    if gate in ("deconvnet", "guided"):
        assert signal is not None
        opened = _maps(signal, switches, forward, window, maps_size, overwrite).detach()
    maps = conv2d_gated(image, weight, None, opened, filters, maps_size)
    pooled = gather(maps, switches, window, overwrite, False)
    return pooled if forward is None else dense(pooled.masked_fill(forward <= 0, 0), memory_format(image))


def _maps(
    signal: Tensor,
    switches: Tensor,
    forward: Tensor | None,
    window: Window,
    size: Sequence[int] | None,
    overwrite: bool,
) -> Tensor:
    """The unpooled signal, masked but not rectified."""
    masked = signal if forward is None else signal.masked_fill(forward <= 0, 0)
    return unpool(masked, switches, window, size, overwrite, False)


def _tangent(inputs: Sequence[Any], output: Tensor, tangents: Sequence[Any]) -> Tensor | None:
    signal, switches, weight, _, slide, window, size, overwrite, gate, forward, _ = inputs
    rectifies = gate in ("deconvnet", "guided")

    def by_signal(tangent: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        opened = _maps(signal, switches, forward, window, size, overwrite).detach() if rectifies else None
        maps = _maps(tangent, switches, forward, window, size, overwrite)
        return deconvolve(maps, weight, bias, slide, "backprop" if rectifies else "none", opened)

    def by_weight(signal: Tensor, tangent: Tensor, bias: Tensor | None) -> Tensor:
        rest = slide, window, size, overwrite, gate, forward, False
        return unpool_deconvolve(signal, switches, tangent, bias, *rest)

    return linear_tangent(by_signal, by_weight, (signal, weight), (tangents[0], *tangents[2:4]), output.shape)


unpool_deconvolve.register_autograd(_backward, _setup_context, _tangent)
unpool_deconvolve.register_out("output", check_values=True)


@operator("unpool_relu_weight_gradient")
def unpooled_weight_gradient(
    image: Tensor,
    signal: Tensor,
    switches: Tensor,
    forward: Tensor | None,
    weight: Tensor,
    filters: Filters,
    window: PoolWindow,
    maps_size: Sequence[int],
    overwrite: bool,
    gate: str,
) -> OneResult:
    """``conv2d_weight_gradient`` of the unpooled and gated signal, which is never in memory."""
    gradient = yield Result(weight, weight.shape, torch.preserve_format)
    if not signal.numel():
        gradient.zero_()
        return
    layout, maps = memory_format(image), [*signal.shape[:2], *maps_size]
    shapes = filters.shape(image.shape, maps, weight, layout), window.shape(maps, signal.shape, layout)
    where = *shapes, core.DTYPES[image.dtype]
    scratch = core.workspace("unpool_relu_weight_gradient", image, *where)
    tensors = dense(image, layout), dense(signal, layout), dense(switches, layout), dense(forward, layout)
    written = dense(gradient)
    arguments = *where, core.GATES[gate], overwrite, *tensors, written, scratch
    core.run("unpool_relu_weight_gradient", image, *arguments)
    gradient.copy_(written)  # nothing, where it is contiguous itself


def _gradient_setup_context(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    image, signal, switches, forward, _, *ctx.slides = inputs
    ctx.save_for_backward(image, signal, switches, forward)


def _gradient_backward(ctx: Any, by_weight: Tensor) -> tuple[Tensor | None, ...]:
    image, signal, switches, forward = ctx.saved_tensors
    filters, window, maps_size, overwrite, gate = ctx.slides
    grad_image = grad_signal = None
    if ctx.needs_input_grad[0]:
        slide = filters.transposed(maps_size, by_weight.shape[2:], image.shape[2:])
        rest = slide, window, maps_size, overwrite, gate, forward, False
        grad_image = unpool_deconvolve(signal, switches, by_weight, None, *rest)
    if ctx.needs_input_grad[1]:
        grad_signal = _to_signal(image, by_weight, signal, switches, forward, *ctx.slides)
    return grad_image, grad_signal


def _gradient_tangent(inputs: Sequence[Any], output: Tensor, tangents: Sequence[Any]) -> Tensor | None:
    image, signal, switches, forward, weight, *slides = inputs
    filters, window, maps_size, overwrite, gate = slides
    rectifies = gate in ("deconvnet", "guided")
    parts = []
    if tangents[0] is not None:
        parts.append(unpooled_weight_gradient(tangents[0], signal, switches, forward, weight, *slides))
    if tangents[1] is not None:
        opened = _maps(signal, switches, forward, window, maps_size, overwrite).detach() if rectifies else None
        maps = _maps(tangents[1], switches, forward, window, maps_size, overwrite)
        passes = "backprop" if rectifies else "none"
        parts.append(conv2d_weight_gradient(image, maps, opened, weight, filters, passes, False)[0])
    return sum(parts[1:], parts[0]) if parts else None


unpooled_weight_gradient.register_autograd(_gradient_backward, _gradient_setup_context, _gradient_tangent)
