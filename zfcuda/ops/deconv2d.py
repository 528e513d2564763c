"""One step down the deconvnet: gate the signal, then the transposed convolution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from zfcuda import core
from zfcuda.ops._common import (
    check_at_least,
    check_shape,
    check_tensor,
    dense,
    memory_format,
    option,
    tensor,
)
from zfcuda.ops._conv import (
    Filters,
    Transposed,
    check_bias,
    conv2d_gated,
    conv2d_weight_gradient,
    in_parts,
    transposed_of,
)
from zfcuda.ops._out import Result
from zfcuda.ops._register import OneResult, entry, operator

__all__ = ["deconv2d"]


@entry(casts=True, images=("signal", "forward"))
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
        (batch, in_channels, height, width), or one image without the batch; floating point, any strides: what
        came down so far.
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
    Differentiable any number of times with respect to signal, weight and bias; ``forward`` only opens and closes, so it
    has no derivative.
    """
    return deconvolve(
        tensor("signal", signal),
        tensor("weight", weight),
        tensor("bias", bias, optional=True),
        transposed_of(stride, padding, output_padding, groups, dilation),
        option("gate", gate, tuple(core.GATES)),
        tensor("forward", forward, optional=True),
    )


def deconvolved(signal: Tensor, maps: Sequence[int], weight: Tensor, bias: Tensor | None, slide: Transposed) -> Result:
    """The image for maps of the whole shape ``maps``, which the signal has or unpools to, after every check."""
    filters, output_padding = slide.filters, slide.output_padding
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
    return Result(signal, [signal.size(0), channels, *size], memory_format(signal))


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


@operator("deconv2d", batched=("signal", "forward"))
def deconvolve(
    signal: Tensor, weight: Tensor, bias: Tensor | None, slide: Transposed, gate: str, forward: Tensor | None
) -> OneResult:
    wanted = deconvolved(signal, signal.shape, weight, bias, slide)
    check_forward(signal, gate, forward, "the rectifier's output")
    image = yield wanted
    if image.numel():
        layout, fixed, filters = memory_format(signal), (dense(weight), dense(bias)), slide.filters
        for maps, gates, part in in_parts(signal, weight, dense(signal, layout), dense(forward, layout), image):
            where = filters.shape(part.shape, maps.shape, weight, layout), core.DTYPES[signal.dtype]
            scratch = core.workspace("deconv2d", signal, *where)
            core.run("deconv2d", signal, *where, core.GATES[gate], maps, gates, *fixed, part, scratch)


# ---------------------------------------------------------------- derivatives
#
# Apart from the gate, which opens and closes and has no derivative, each of the three operators is linear in each of
# its tensors, and the gradients of each are the other two: so there are derivatives of every order.


def convolution_backward(
    grad: Tensor,
    image: Tensor | None,
    weight: Tensor,
    forward: Tensor | None,
    image_size: Sequence[int],
    filters: Filters,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients by image, weight and bias of a convolution that is zero where ``forward <= 0``; those of ``needs``."""
    needs_image, needs_weight, needs_bias = needs
    gate = "none" if forward is None else "backprop"
    grad_image = grad_weight = grad_bias = None
    if needs_image:
        grad_image = _to_image(grad, weight, image_size, filters, gate, forward)
    if needs_weight:
        grad_weight, sums = conv2d_weight_gradient(image, grad, forward, weight, filters, gate, needs_bias)
        grad_bias = sums if needs_bias else None
    elif needs_bias:
        grad_bias = (grad if forward is None else grad.masked_fill(forward <= 0, 0)).sum((0, 2, 3))
    return grad_image, grad_weight, grad_bias


def _to_image(
    signal: Tensor, weight: Tensor, size: Sequence[int], filters: Filters, gate: str, forward: Tensor | None
) -> Tensor:
    """The deconvolution whose result has this height and width."""
    slide = filters.transposed(signal.shape[2:], weight.shape[2:], size)
    return deconvolve(signal, weight, None, slide, gate, forward)


def _opened(gate: str, signal: Tensor | None, forward: Tensor | None) -> Tensor | None:
    """What is positive where a gate lets the signal pass; None for everywhere."""
    if gate == "guided":
        assert signal is not None and forward is not None
        return forward.masked_fill(signal <= 0, 0)
    return {"none": None, "deconvnet": signal, "backprop": forward}[gate]


def _detached(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.detach() for t in tensors]


def _deconv_setup_context(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    signal, weight, _, slide, gate, forward = inputs
    ctx.filters, ctx.gate = slide.filters, gate
    ctx.signal_size, ctx.layout = signal.shape[2:], memory_format(output)
    needed = ctx.needs_input_grad[1] or (ctx.needs_input_grad[0] and gate in ("deconvnet", "guided"))
    ctx.save_for_backward(signal if needed else None, weight, forward)


def _deconv_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    signal, weight, forward = ctx.saved_tensors
    grad = dense(grad, ctx.layout)
    needs_signal, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    grad_signal = grad_weight = grad_bias = None
    if needs_signal:
        opened = _opened(ctx.gate, *_detached(signal, forward))
        grad_signal = conv2d_gated(grad, weight, None, opened, ctx.filters, ctx.signal_size)
    if needs_weight:
        grad_weight, _ = conv2d_weight_gradient(grad, signal, forward, weight, ctx.filters, ctx.gate, False)
    if needs_bias:
        grad_bias = grad.sum((0, 2, 3))
    return grad_signal, grad_weight, grad_bias


def _gated_setup_context(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    image, weight, _, forward, ctx.filters, _ = inputs
    ctx.image_size = image.shape[2:]
    ctx.save_for_backward(image if ctx.needs_input_grad[1] else None, weight, forward)


def _gated_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    image, weight, forward = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    return convolution_backward(grad, image, weight, forward, ctx.image_size, ctx.filters, needs)


def _weight_gradient_setup_context(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor]) -> None:
    image, signal, forward, weight, ctx.filters, ctx.gate, ctx.with_bias = inputs
    ctx.weight_size = weight.shape
    ctx.save_for_backward(image, signal, forward)


def _weight_gradient_backward(ctx: Any, by_weight: Tensor | None, by_bias: Tensor | None) -> tuple[Tensor | None, ...]:
    image, signal, forward = ctx.saved_tensors
    grad_image = grad_signal = None
    if by_weight is None:
        by_weight = signal.new_zeros(ctx.weight_size)
    if ctx.needs_input_grad[0]:
        grad_image = _to_image(signal, by_weight, image.shape[2:], ctx.filters, ctx.gate, forward)
    if ctx.needs_input_grad[1]:
        bias = by_bias if ctx.with_bias else None
        opened = _opened(ctx.gate, *_detached(signal, forward))
        grad_signal = conv2d_gated(image, by_weight, bias, opened, ctx.filters, signal.shape[2:])
    return grad_image, grad_signal


def linear_tangent(
    by_image: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    by_weight: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    tensors: tuple[Tensor, Tensor],
    tangents: Sequence[Tensor | None],
    size: Sequence[int],
) -> Tensor | None:
    """The sum of what the tangents of image (or signal), weight and bias add to a result of this size.

    ``by_image`` and ``by_weight`` are the operator for the tangent of one and the other tensor itself, and a bias.
    """
    (image, weight), (image_tangent, weight_tangent, bias) = tensors, tangents
    parts = []
    if image_tangent is not None:
        parts.append(by_image(image_tangent, weight, bias))
    if weight_tangent is not None:
        parts.append(by_weight(image, weight_tangent, None if parts else bias))
    if not parts and bias is not None:
        parts.append(bias.new_zeros(size) + bias[:, None, None])
    return sum(parts[1:], parts[0]) if parts else None


def convolution_tangent(
    image: Tensor,
    weight: Tensor,
    forward: Tensor | None,
    filters: Filters,
    size: Sequence[int],
    tangents: Sequence[Tensor | None],
) -> Tensor | None:
    """The tangent of the maps of this size, a convolution that is zero where ``forward <= 0``."""

    def convolution(image: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return conv2d_gated(image, weight, bias, forward, filters, size[2:])

    result = linear_tangent(convolution, convolution, (image, weight), tangents[:3], size)
    if result is None or forward is None or any(t is not None for t in tangents[:2]):
        return result
    return result.masked_fill(forward <= 0, 0)


def _deconv_tangent(inputs: Sequence[Any], output: Tensor, tangents: Sequence[Any]) -> Tensor | None:
    signal, weight, _, slide, gate, forward = inputs
    opened = _opened(gate, *_detached(signal, forward))

    def by_signal(tangent: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return deconvolve(tangent, weight, bias, slide, "none" if opened is None else "backprop", opened)

    def by_weight(signal: Tensor, tangent: Tensor, bias: Tensor | None) -> Tensor:
        return deconvolve(signal, tangent, bias, slide, gate, forward)

    return linear_tangent(by_signal, by_weight, (signal, weight), tangents[:3], output.shape)


def _gated_tangent(inputs: Sequence[Any], output: Tensor, tangents: Sequence[Any]) -> Tensor | None:
    image, weight, _, forward, filters, _ = inputs
    return convolution_tangent(image, weight, forward, filters, output.shape, tangents)


def _weight_gradient_tangent(
    inputs: Sequence[Any], results: tuple[Tensor, Tensor], tangents: Sequence[Any]
) -> tuple[Tensor | None, Tensor | None]:
    image, signal, forward, weight, filters, gate, with_bias = inputs
    by_weight = by_bias = None
    if tangents[1] is not None:
        opened = _opened(gate, *_detached(signal, forward))
        passes = "none" if opened is None else "backprop"
        by_weight, by_bias = conv2d_weight_gradient(image, tangents[1], opened, weight, filters, passes, with_bias)
    if tangents[0] is not None:
        more, _ = conv2d_weight_gradient(tangents[0], signal, forward, weight, filters, gate, False)
        by_weight = more if by_weight is None else by_weight + more
    return by_weight, by_bias if with_bias else None


deconvolve.register_autograd(_deconv_backward, _deconv_setup_context, _deconv_tangent)
conv2d_gated.register_autograd(_gated_backward, _gated_setup_context, _gated_tangent)
conv2d_weight_gradient.register_autograd(
    _weight_gradient_backward, _weight_gradient_setup_context, _weight_gradient_tangent
)
