"""One step down the deconvnet: gate the signal, then the transposed convolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zfcuda import core
from zfcuda.ops._common import (
    NAMESPACE,
    check_at_least,
    check_shape,
    check_tensor,
    dense,
    empty,
    integer,
    memory_format,
    option,
    pair,
    tensor,
)
from zfcuda.ops._conv import Filters, check_bias, conv2d_gated, conv2d_weight_gradient

__all__ = ["deconv2d"]


def deconv2d(
    signal: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    *,
    gate: str = "deconvnet",
    forward: Tensor | None = None,
) -> Tensor:
    """Rectify the signal and pass it through the transposed filters (section 2.1 of the paper).

    Parameters
    ----------
    signal
        (batch, in_channels, height, width), float32 or float64, any strides: what came down so far.
    weight
        (in_channels, out_channels / groups, kernel_h, kernel_w), as in ``conv_transpose2d``: the very weight of
        the convolution on the way up.
    bias
        (out_channels,) or None. The paper uses none.
    stride, padding, output_padding, groups, dilation
        As in ``torch.nn.functional.conv_transpose2d``.
    gate
        What stands between signal and filters, the only difference between three methods:
        ``"deconvnet"`` keeps signal > 0 (the paper); ``"backprop"`` keeps it where forward > 0;
        ``"guided"`` where both are (Springenberg et al. 2014); ``"none"`` keeps it all.
    forward
        The rectifier's output on the way up, of the signal's shape; for ``"backprop"`` and ``"guided"`` only.

    Returns
    -------
    Tensor
        (batch, out_channels, …) in the signal's memory format. NaN passes every gate that compares it.

    Raises
    ------
    TypeError
        If an argument has the wrong Python type.
    ValueError
        If ``gate`` is not one of its four values.
    RuntimeError
        If a tensor or a size is impossible; the message names the argument and its value.

    Notes
    -----
    First derivatives with respect to signal, weight and bias; ``forward`` only opens and closes, so it has none.
    """
    return deconvolve(
        tensor("signal", signal),
        tensor("weight", weight),
        tensor("bias", bias, optional=True),
        pair("stride", stride),
        pair("padding", padding),
        pair("output_padding", output_padding),
        integer("groups", groups),
        pair("dilation", dilation),
        option("gate", gate, tuple(core.GATES)),
        tensor("forward", forward, optional=True),
    )


def deconvolved_size(
    signal: Tensor,
    maps: Sequence[int],
    weight: Tensor,
    bias: Tensor | None,
    filters: Filters,
    output_padding: Sequence[int],
) -> list[int]:
    """The whole shape of the result for maps of the shape ``maps``, which the signal is or unpools to."""
    filters.check("signal", signal, weight, rows=True)
    channels = weight.size(1) * filters.groups
    check_bias(bias, signal, channels)
    check_at_least(0, output_padding=output_padding)
    if any(o >= max(s, d) for o, s, d in zip(output_padding, filters.stride, filters.dilation, strict=True)):
        raise RuntimeError(
            f"output_padding is {tuple(output_padding)}; it must be smaller than stride={tuple(filters.stride)} or "
            f"dilation={tuple(filters.dilation)}"
        )
    reached = filters.image_size(maps[2:], weight.shape[2:])
    size = [n + o for n, o in zip(reached, output_padding, strict=True)]
    if min(size) < 1:
        raise RuntimeError(
            f"padding is {tuple(filters.padding)}; it leaves an output of height and width {tuple(size)} for maps "
            f"of shape {tuple(maps)} and a weight of shape {tuple(weight.shape)}: reduce it"
        )
    return [signal.size(0), channels, *size]


def check_forward(signal: Tensor, gate: str, forward: Tensor | None, what: str) -> None:
    """Raise RuntimeError unless ``forward`` is there exactly where the gate needs it, as ``what`` says."""
    if (forward is not None) != (gate in ("backprop", "guided")):
        raise RuntimeError(
            f"forward is {'None' if forward is None else 'given'} with gate={gate!r}; the gates 'backprop' and "
            f"'guided' need {what} on the way up, the others take none"
        )
    if forward is not None:
        check_tensor("forward", forward, like=signal)
        check_shape("forward", forward, signal.shape, f"the signal's shape: it is {what}")


def _check(
    signal: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    filters: Filters,
    output_padding: Sequence[int],
    gate: str,
    forward: Tensor | None,
) -> list[int]:
    """The whole shape of the result."""
    size = deconvolved_size(signal, signal.shape, weight, bias, filters, output_padding)
    check_forward(signal, gate, forward, "the rectifier's output")
    return size


@torch.library.custom_op(f"{NAMESPACE}::deconv2d", mutates_args=())
def deconvolve(
    signal: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
    dilation: Sequence[int],
    gate: str,
    forward: Tensor | None,
) -> Tensor:
    filters = Filters(stride, padding, dilation, groups)
    size = _check(signal, weight, bias, filters, output_padding, gate, forward)
    layout = memory_format(signal)
    image = empty(signal, size, layout)
    if image.numel():
        where = filters.shape(size, signal.shape, weight, layout), core.DTYPES[signal.dtype]
        scratch = core.workspace("deconv2d", signal, *where)
        tensors = dense(signal, layout), dense(forward, layout), weight.contiguous()
        offset = None if bias is None else bias.contiguous()
        core.run("deconv2d", signal, *where, core.GATES[gate], *tensors, offset, image, scratch)
    return image


@deconvolve.register_fake
def _(
    signal: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
    dilation: Sequence[int],
    gate: str,
    forward: Tensor | None,
) -> Tensor:
    filters = Filters(stride, padding, dilation, groups)
    size = _check(signal, weight, bias, filters, output_padding, gate, forward)
    return empty(signal, size, memory_format(signal))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    signal, weight, _, stride, padding, _, groups, dilation, gate, forward = inputs
    ctx.filters, ctx.gate = Filters(stride, padding, dilation, groups), gate
    ctx.signal_size = signal.shape[2:]
    needed = ctx.needs_input_grad[1] or (ctx.needs_input_grad[0] and gate in ("deconvnet", "guided"))
    ctx.save_for_backward(signal if needed else None, weight, forward)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    signal, weight, forward = ctx.saved_tensors
    filters: Filters = ctx.filters
    needs_signal, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    grad_signal = grad_weight = grad_bias = None
    if needs_signal:
        opened = {"none": None, "deconvnet": signal, "backprop": forward, "guided": forward}[ctx.gate]
        if ctx.gate == "guided":
            opened = forward.masked_fill(signal <= 0, 0)
        grad_signal = conv2d_gated(grad, weight, opened, *filters, ctx.signal_size)
    if needs_weight:
        grad_weight, _ = conv2d_weight_gradient(grad, signal, forward, weight, *filters, ctx.gate, False)
    if needs_bias:
        grad_bias = grad.sum((0, 2, 3))
    return grad_signal, grad_weight, grad_bias, *(None,) * 7


deconvolve.register_autograd(_backward, setup_context=_setup_context)
