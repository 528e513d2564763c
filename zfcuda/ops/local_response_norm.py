"""Normalisation across channels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from zfcuda import core
from zfcuda.ops._common import (
    check_tensor,
    dense,
    integer,
    memory_format,
    number,
    tensor,
)
from zfcuda.ops._out import Result
from zfcuda.ops._register import OneResult, entry, operator

__all__ = ["local_response_norm"]


@entry()
def local_response_norm(input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Tensor:
    r"""Divide each value by its neighbourhood across channels, as the paper's contrast normalisation does.

    .. math:: y_c = x_c \Big/ \Big(k + \frac{\alpha}{n} \sum_{j = c - \lfloor n/2 \rfloor}
              ^{c + \lfloor (n-1)/2 \rfloor} x_j^2\Big)^{\beta}, \quad n = \mathrm{size}

    Parameters
    ----------
    input
        (batch, channels, height, width), floating point, any strides.
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
    Differentiable any number of times with respect to ``input``, which is all that is kept for it: the denominators are
    computed again. From the second derivative on torch's operators compute it, in several passes.
    """
    return _local_response_norm(tensor("input", input), norm_of(size, alpha, beta, k))


class Norm(NamedTuple):
    """The arguments of a normalisation."""

    size: int
    alpha: float
    beta: float
    k: float

    def check(self, prefix: str = "") -> None:
        """Raise RuntimeError for a window without a channel; the arguments' names begin with ``prefix``."""
        if self.size < 1:
            raise RuntimeError(f"{prefix}size is {self.size}; it must be at least 1 channel")

    def on(self, shape: Sequence[int], layout: torch.memory_format) -> tuple[tuple[int, ...], float, float, float]:
        """NormShape of csrc/shapes.h, and alpha, beta and k for it: a window wider than all channels is cut."""
        seen = min(self.size, 2 * shape[1])
        alpha = self.alpha if seen == self.size else self.alpha * seen / self.size
        return (*shape, seen, int(layout == torch.channels_last)), alpha, self.beta, self.k


def norm_of(size: int, alpha: float, beta: float, k: float, prefix: str = "") -> Norm:
    """The arguments of a call, whose names begin with ``prefix``, of the right Python types."""
    rest = {"alpha": alpha, "beta": beta, "k": k}
    return Norm(integer(f"{prefix}size", size), *(number(prefix + name, value) for name, value in rest.items()))


def _like(input: Tensor, norm: Norm) -> Result:
    check_tensor("input", input)
    norm.check()
    return Result(input, input.shape, memory_format(input))


def _run(function: str, input: Tensor, norm: Norm, *tensors: Tensor) -> None:
    """A function of csrc/ops.h on checked tensors."""
    layout = memory_format(input)
    shape, *constants = norm.on(input.shape, layout)
    core.run(function, input, shape, core.DTYPES[input.dtype], *constants, *(dense(t, layout) for t in tensors))


@operator("local_response_norm", batched=("input",))
def _local_response_norm(input: Tensor, norm: Norm) -> OneResult:
    output = yield _like(input, norm)
    if output.numel():
        _run("local_response_norm", input, norm, input, output)


@operator("local_response_norm_gradient", batched=("input", "grad"))
def norm_gradient(input: Tensor, grad: Tensor, norm: Norm) -> OneResult:
    grad_input = yield _like(input, norm)
    if grad_input.numel():
        _run("local_response_norm_gradient", input, norm, input, grad, grad_input)


def _setup_context(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    input, ctx.norm = inputs
    ctx.save_for_backward(input)


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    (input,) = ctx.saved_tensors
    return norm_gradient(input, grad, ctx.norm)


def _tangent(inputs: Sequence[Any], output: Tensor, tangents: Sequence[Any]) -> Tensor:
    input, norm = inputs
    return norm_tangent(input, norm, tangents[0])


def norm_tangent(input: Tensor, norm: Norm, tangent: Tensor) -> Tensor:
    """That of the result, for one of the input: of torch's operators, as the second derivative is."""
    return _pushed_forward(lambda x: F.local_response_norm(x, *norm), (input,), (tangent,))


def _gradient_setup_context(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    input, grad, ctx.norm = inputs
    ctx.save_for_backward(input, grad)


def _gradient_backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, ...]:
    """Of torch's operators, in float32 at least: the first gradient as they compute it, differentiated again."""
    saved = ctx.saved_tensors
    wide = torch.promote_types(cotangent.dtype, torch.float32)
    pull_back = torch.func.vjp(functools.partial(_torchs_gradient, ctx.norm), *(t.to(wide) for t in saved))[1]
    results = pull_back(cotangent.to(wide))
    return tuple(r.to(t.dtype) for r, t in zip(results, saved, strict=True))


def _gradient_tangent(inputs: Sequence[Any], output: Tensor, tangents: Sequence[Any]) -> Tensor:
    input, grad, norm = inputs
    given = tuple(torch.zeros_like(t) if d is None else d for t, d in zip((input, grad), tangents[:2], strict=True))
    return _pushed_forward(functools.partial(_torchs_gradient, norm), (input, grad), given)


def _pushed_forward(function: Callable[..., Tensor], tensors: tuple[Tensor, ...], tangents: Sequence[Tensor]) -> Tensor:
    """The tangent of the result: the transpose of the transpose, as torch's forward mode does not nest."""
    pulled = torch.func.vjp(function, *tensors)
    return cast(Tensor, torch.func.vjp(pulled[1], torch.zeros_like(pulled[0]))[1](tuple(tangents))[0])


def _torchs_gradient(norm: Norm, input: Tensor, grad: Tensor) -> Tensor:
    return torch.func.vjp(lambda x: F.local_response_norm(x, *norm), input)[1](grad)[0]


_local_response_norm.register_autograd(_backward, _setup_context, _tangent)
norm_gradient.register_autograd(_gradient_backward, _gradient_setup_context, _gradient_tangent)
