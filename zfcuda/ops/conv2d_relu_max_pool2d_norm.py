"""A whole layer of the paper with its contrast normalisation: convolution, bias, ReLU, max-pool, normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from torch import Tensor

from zfcuda import core
from zfcuda.ops._common import dense, memory_format
from zfcuda.ops._conv import Filters
from zfcuda.ops._out import Result
from zfcuda.ops._pool import PoolWindow, pooled
from zfcuda.ops._register import ThreeResults, derivable, entry, operator
from zfcuda.ops.conv2d_relu_max_pool2d import checked, convolve_pool, gradients, pooled_tangent, sizes
from zfcuda.ops.local_response_norm import Norm, norm_gradient, norm_of, norm_tangent

__all__ = ["conv2d_relu_max_pool2d_norm"]


@entry(casts=True, images=("input",))
def conv2d_relu_max_pool2d_norm(
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
    norm_size: int,
    norm_alpha: float = 1e-4,
    norm_beta: float = 0.75,
    norm_k: float = 1.0,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    r""":func:`conv2d_relu_max_pool2d`, then :func:`local_response_norm`, in one: layers 1 and 2 of the paper (Fig. 3).

    .. math:: y_o = p_o \Big/ \Big(k + \frac{\alpha}{n} \sum_{j = o - \lfloor n/2 \rfloor}
              ^{o + \lfloor (n-1)/2 \rfloor} p_j^2\Big)^{\beta}, \quad
              p_o = \operatorname{pool}\Big(\max\big(0,\; b_o + \sum_i w_{o,i} \star x_i\big)\Big)

    Where no gradient is recorded, the pooled maps are not among the results. On CUDA one kernel does it all where its
    blocks have every map, on the tensor cores in channels_last: up to 96 maps of images of few channels, up to 64 of
    others, of one group, and ``norm_size`` of up to 33. Elsewhere a second kernel normalises.

    Parameters
    ----------
    input, weight, bias, stride, padding, dilation, groups
        As of :func:`conv2d_relu_max_pool2d`.
    pool_kernel_size, pool_stride, pool_padding, pool_dilation, pool_ceil_mode
        As of :func:`conv2d_relu_max_pool2d`.
    norm_size, norm_alpha, norm_beta, norm_k
        As ``size``, … of :func:`local_response_norm`: n, α, β and k of the equation.
    out
        Where to write the results: a pair of tensors as they would be returned, dense in the input's memory
        format. Not differentiable.

    Returns
    -------
    output, switches
        (batch, out_channels, …): the normalised maxima, and as uint8 the switches of
        :func:`conv2d_relu_max_pool2d`; both have the input's memory format. Maxima are rounded to the tensors'
        dtype before they are normalised, as in two steps.

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
    Differentiable any number of times with respect to input, weight and bias. For it the pooled maps are kept.
    """
    window = pool_kernel_size, pool_stride, pool_padding, pool_dilation
    arguments = checked(input, weight, bias, stride, padding, dilation, groups, *window, pool_ceil_mode)
    norm = norm_of(norm_size, norm_alpha, norm_beta, norm_k, "norm_")
    if out is not None:
        return _convolve_norm.into(out, *arguments, norm)
    output, switches, _ = _convolve_norm(*arguments, norm, derivable(input, weight, bias))
    return output, switches


@operator("conv2d_relu_max_pool2d_norm", batched=("input",))
def _convolve_norm(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    filters: Filters,
    window: PoolWindow,
    pool_ceil_mode: bool,
    norm: Annotated[Norm, "norm_"],
    keep: bool,
) -> ThreeResults:
    """The third result is the pool, empty unless ``keep``."""
    maps, size = sizes(input, weight, bias, filters, window, pool_ceil_mode)
    norm.check("norm_")
    result = pooled(input, size)
    output, switches, pool = yield *result, result[0] if keep else Result(input, [0])
    if output.numel():
        layout = memory_format(input)
        shapes = filters.shape(input.shape, maps, weight, layout), window.shape(maps, size, layout)
        dtype, (shape, *constants) = core.DTYPES[input.dtype], norm.on(size, layout)
        scratch = core.workspace("conv2d_relu_max_pool2d_norm", input, *shapes, dtype, keep)
        tensors = dense(input, layout), dense(weight), dense(bias), pool if keep else None, output, switches, scratch
        core.run("conv2d_relu_max_pool2d_norm", input, *shapes, shape, dtype, *constants, *tensors)


def _setup_context(ctx: Any, inputs: Sequence[Any], results: tuple[Tensor, Tensor, Tensor]) -> None:
    input, weight, bias, ctx.filters, ctx.window, ctx.ceil_mode, ctx.norm, ctx.keep = inputs
    _, switches, pool = results
    ctx.input_size = input.shape[2:]
    image = input if ctx.needs_input_grad[1] or not ctx.keep else None
    ctx.save_for_backward(image, weight, None if ctx.keep else bias, switches, pool)


def _backward(ctx: Any, grad_output: Tensor | None, _: None, grad_pool: Tensor | None) -> tuple[Tensor | None, ...]:
    input, weight, bias, switches, pool = ctx.saved_tensors
    if not ctx.keep:
        pool, _ = convolve_pool(input, weight, bias, ctx.filters, ctx.window, ctx.ceil_mode)
    if grad_output is not None:
        through = norm_gradient(pool, grad_output, ctx.norm)
        grad_pool = through if grad_pool is None else grad_pool + through
    assert grad_pool is not None
    return gradients(ctx, input, weight, pool, switches, grad_pool)


def _tangent(
    inputs: Sequence[Any], results: tuple[Tensor, Tensor, Tensor], tangents: Sequence[Any]
) -> tuple[Tensor | None, ...]:
    input, weight, bias, filters, window, ceil_mode, norm, keep = inputs
    _, switches, pool = results
    if not keep:
        pool, _ = convolve_pool(input, weight, bias, filters, window, ceil_mode)
    tangent = pooled_tangent(input, weight, filters, window, pool, switches, tangents)
    if tangent is None:
        return None, None, None
    return norm_tangent(pool, norm, tangent), None, tangent if keep else None


_convolve_norm.register_autograd(_backward, _setup_context, _tangent)
_convolve_norm.register_out("output", "switches", keep=False)
