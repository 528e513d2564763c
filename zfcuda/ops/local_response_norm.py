"""Normalisation across channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zfcuda import core
from zfcuda.ops._common import (
    NAMESPACE,
    check_tensor,
    dense,
    empty,
    first_derivative_only,
    integer,
    memory_format,
    number,
    tensor,
)

__all__ = ["local_response_norm"]


def local_response_norm(input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Tensor:
    r"""Divide each value by its neighbourhood across channels, as the paper's contrast normalisation does.

    .. math:: y_c = x_c \Big/ \Big(k + \frac{\alpha}{n} \sum_{j = c - \lfloor n/2 \rfloor}
              ^{c + \lfloor (n-1)/2 \rfloor} x_j^2\Big)^{\beta}, \quad n = \mathrm{size}

    Parameters
    ----------
    input
        (batch, channels, height, width), float32 or float64, any strides.
    size
        Channels in the window, which is clipped at the first and the last channel.
    alpha, beta, k
        As in torch, ONNX and Caffe: alpha is divided by size. The paper's constants (Krizhevsky's, whose alpha
        is not divided) are ``size=5, alpha=5e-4, beta=0.75, k=2``.

    Returns
    -------
    Tensor
        Like ``input``, in its memory format.

    Raises
    ------
    TypeError
        If an argument has the wrong Python type.
    RuntimeError
        If the tensor or ``size`` is impossible; the message names the argument and its value.

    Notes
    -----
    First derivative with respect to ``input``, which is all that is kept for it: the denominators are computed
    again.
    """
    return _local_response_norm(
        tensor("input", input),
        integer("size", size),
        number("alpha", alpha),
        number("beta", beta),
        number("k", k),
    )


def _allocate(input: Tensor, size: int) -> tuple[Tensor, torch.memory_format]:
    check_tensor("input", input)
    if size < 1:
        raise RuntimeError(f"size is {size}; it must be at least 1 channel")
    layout = memory_format(input)
    return empty(input, input.shape, layout), layout


def _shape(input: Tensor, size: int, layout: torch.memory_format) -> tuple[int, ...]:
    """NormShape of csrc/shapes.h."""
    return *input.shape, size, int(layout == torch.channels_last)


@torch.library.custom_op(f"{NAMESPACE}::local_response_norm", mutates_args=())
def _local_response_norm(input: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    output, layout = _allocate(input, size)
    if output.numel():
        where = _shape(input, size, layout), core.DTYPES[input.dtype]
        core.run("local_response_norm", input, *where, alpha, beta, k, dense(input, layout), output)
    return output


@_local_response_norm.register_fake
def _(input: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    return _allocate(input, size)[0]


@torch.library.custom_op(f"{NAMESPACE}::local_response_norm_gradient", mutates_args=())
def _gradient(input: Tensor, grad: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    grad_input, layout = _allocate(input, size)
    if grad_input.numel():
        where = _shape(input, size, layout), core.DTYPES[input.dtype]
        tensors = dense(input, layout), dense(grad, layout), grad_input
        core.run("local_response_norm_gradient", input, *where, alpha, beta, k, *tensors)
    return grad_input


@_gradient.register_fake
def _(input: Tensor, grad: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    return _allocate(input, size)[0]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, *ctx.constants = inputs
    ctx.save_for_backward(input)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (input,) = ctx.saved_tensors
    return _gradient(input, grad, *ctx.constants), None, None, None, None


_local_response_norm.register_autograd(_backward, setup_context=_setup_context)
first_derivative_only(_gradient, "local_response_norm")
