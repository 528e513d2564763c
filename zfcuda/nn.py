"""Drop-in modules: torch's names, arguments, state dicts and initialisation, on the operators of zfcuda.ops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from zfcuda import core, ops
from zfcuda.ops._common import option
from zfcuda.ops.max_unpool2d import OVERLAPS

__all__ = [
    "ConvReLU2d",
    "ConvReLUMaxPool2d",
    "ConvReLUMaxPool2dNorm",
    "FastestMaxPool2d",
    "LocalResponseNorm",
    "MaxPool2d",
    "MaxUnpool2d",
    "ReLUMaxPool2d",
    "fastest_max_pool2d",
]


class ConvReLU2d(nn.Conv2d):
    """``nn.Conv2d`` followed by ``nn.ReLU`` in one operator, :func:`zfcuda.ops.conv2d_relu`.

    Arguments, parameters, state dict and initialisation are those of ``torch.nn.Conv2d``.

    Raises
    ------
    RuntimeError
        If ``padding_mode`` is not ``"zeros"``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.padding_mode != "zeros":
            raise RuntimeError(f"padding_mode is {self.padding_mode!r}; it must be 'zeros': pad the input instead")

    def forward(self, input: Tensor) -> Tensor:
        """(batch, in_channels, height, width) to (batch, out_channels, …), rectified; the batch may be missing."""
        return ops.conv2d_relu(input, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class ConvReLUMaxPool2d(ConvReLU2d):
    """``nn.Conv2d``, ``nn.ReLU`` and ``nn.MaxPool2d`` in one operator, :func:`zfcuda.ops.conv2d_relu_max_pool2d`.

    Arguments, parameters, state dict and initialisation are those of ``torch.nn.Conv2d``; those of the pool come
    after them by name.

    Parameters
    ----------
    pool_kernel_size, pool_stride, pool_padding, pool_dilation, pool_ceil_mode
        As ``kernel_size``, … of ``torch.nn.MaxPool2d``.
    return_switches
        Return (output, switches) for :class:`MaxUnpool2d`.

    Raises
    ------
    RuntimeError
        If ``padding_mode`` is not ``"zeros"``.
    """

    _operate: Callable[..., tuple[Tensor, Tensor]] = staticmethod(ops.conv2d_relu_max_pool2d)
    _options: tuple[str, ...] = (
        "pool_kernel_size",
        "pool_stride",
        "pool_padding",
        "pool_dilation",
        "pool_ceil_mode",
    )

    def __init__(
        self,
        *args: Any,
        pool_kernel_size: int | tuple[int, ...],
        pool_stride: int | tuple[int, ...] | None = None,
        pool_padding: int | tuple[int, ...] = 0,
        pool_dilation: int | tuple[int, ...] = 1,
        pool_ceil_mode: bool = False,
        return_switches: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.pool_kernel_size = pool_kernel_size
        self.pool_stride = pool_kernel_size if pool_stride is None else pool_stride
        self.pool_padding, self.pool_dilation, self.pool_ceil_mode = pool_padding, pool_dilation, pool_ceil_mode
        self.return_switches = return_switches

    def forward(self, input: Tensor) -> Any:
        """(batch, in_channels, height, width) to the result, or a pair of it and the switches (uint8).

        The batch may be missing.
        """
        output, switches = self._operate(
            input,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            **{name: getattr(self, name) for name in self._options},
        )
        return (output, switches) if self.return_switches else output

    def extra_repr(self) -> str:
        return ", ".join([super().extra_repr(), *(f"{name}={getattr(self, name)}" for name in self._options)])


class ConvReLUMaxPool2dNorm(ConvReLUMaxPool2d):
    """:class:`ConvReLUMaxPool2d` and ``nn.LocalResponseNorm`` in one operator.

    That is :func:`zfcuda.ops.conv2d_relu_max_pool2d_norm`.

    Parameters
    ----------
    norm_size, norm_alpha, norm_beta, norm_k
        As ``size``, … of ``torch.nn.LocalResponseNorm``; the others are those of :class:`ConvReLUMaxPool2d`.

    Raises
    ------
    RuntimeError
        If ``padding_mode`` is not ``"zeros"``.
    """

    _operate = staticmethod(ops.conv2d_relu_max_pool2d_norm)
    _options = (*ConvReLUMaxPool2d._options, "norm_size", "norm_alpha", "norm_beta", "norm_k")

    def __init__(
        self,
        *args: Any,
        norm_size: int,
        norm_alpha: float = 1e-4,
        norm_beta: float = 0.75,
        norm_k: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.norm_size, self.norm_alpha, self.norm_beta, self.norm_k = norm_size, norm_alpha, norm_beta, norm_k


class MaxPool2d(nn.MaxPool2d):
    """``nn.MaxPool2d`` that can return its switches, :func:`zfcuda.ops.max_pool2d`.

    Parameters
    ----------
    kernel_size, stride, padding, dilation, return_indices, ceil_mode
        As in ``torch.nn.MaxPool2d``.
    return_switches
        Return (output, switches) for :class:`MaxUnpool2d`.

    Raises
    ------
    RuntimeError
        If both switches and indices are asked for.
    """

    def __init__(
        self,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] | None = None,
        padding: int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        return_indices: bool = False,
        ceil_mode: bool = False,
        *,
        return_switches: bool = False,
    ) -> None:
        super().__init__(kernel_size, stride, padding, dilation, return_indices, ceil_mode)
        if return_indices and return_switches:
            raise RuntimeError(
                "return_switches and return_indices are both True; they are two forms of one thing: choose"
            )
        self.return_switches = return_switches

    def forward(self, input: Tensor) -> Any:
        """The pooled tensor, or a pair of it and the switches (uint8) or the indices (int64)."""
        return self._results(input, *ops.max_pool2d(input, *self._window(), self.ceil_mode))

    def _window(self) -> tuple[Any, Any, Any, Any]:
        return self.kernel_size, self.stride, self.padding, self.dilation

    def _results(self, input: Tensor, output: Tensor, switches: Tensor) -> Any:
        if self.return_indices:
            return output, ops.switches_to_indices(switches, input.shape, *self._window())
        return (output, switches) if self.return_switches else output


def fastest_max_pool2d(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """``torch.nn.functional.max_pool2d`` by :func:`zfcuda.ops.max_pool2d` where that is the faster of the two.

    That is for dense input of rank 4 on the CPU: of 32,768 numbers or more where no gradient is recorded, and of
    131,072 or more, contiguous (which torch pools one value at a time), where one is. torch's own is called elsewhere:
    its gradient of channels_last input is the faster one, little input takes no time, and on other devices nothing has
    been measured. Values and gradients are the same.
    """
    window: Any = kernel_size, stride, padding, dilation, ceil_mode
    if has_torch_function_unary(input):
        return handle_torch_function(fastest_max_pool2d, (input,), input, *window)
    if input.is_cpu and input.dim() == 4 and input.dtype in core.DTYPES and input.numel() >= _enough_to_pool(input):
        return ops.max_pool2d(input, *window)[0]
    return nn.functional.max_pool2d(input, *window)


def _enough_to_pool(input: Tensor) -> float:
    """Numbers from which on ours takes less time than torch's: `zfcuda bench -k "maxima alone"`."""
    innermost = input.is_contiguous(memory_format=torch.channels_last)
    if (innermost or input.is_contiguous()) and not (torch.is_grad_enabled() and input.requires_grad):
        return 1 << 15
    return 1 << 17 if input.is_contiguous() and not innermost else float("inf")


class FastestMaxPool2d(nn.MaxPool2d):
    """``nn.MaxPool2d`` without indices by :func:`fastest_max_pool2d`."""

    def forward(self, input: Tensor) -> Tensor:
        """The pooled tensor."""
        return fastest_max_pool2d(input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)


class ReLUMaxPool2d(MaxPool2d):
    """``nn.ReLU`` followed by ``nn.MaxPool2d`` in one operator, :func:`zfcuda.ops.relu_max_pool2d`.

    Arguments and results are those of :class:`MaxPool2d`.
    """

    def forward(self, input: Tensor) -> Any:
        """The pool of the rectified input, or a pair of it and the switches (uint8) or the indices (int64)."""
        return self._results(input, *ops.relu_max_pool2d(input, *self._window(), self.ceil_mode))


class MaxUnpool2d(nn.Module):
    """The transpose of :class:`MaxPool2d`, by its switches: :func:`zfcuda.ops.max_unpool2d`.

    Parameters
    ----------
    kernel_size, stride, padding, dilation
        Those of the pool.
    overlap
        ``"sum"`` or ``"overwrite"``, for switches of several windows that meet.

    Raises
    ------
    ValueError
        If ``overlap`` is neither of its two values.
    """

    def __init__(
        self,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] | None = None,
        padding: int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        *,
        overlap: str = "sum",
    ) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.stride = kernel_size if stride is None else stride
        self.padding, self.dilation = padding, dilation
        self.overlap = option("overlap", overlap, OVERLAPS)

    def forward(self, input: Tensor, switches: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Each value where its switch points, zero elsewhere; ``output_size`` as in ``torch.nn.MaxUnpool2d``."""
        window = self.kernel_size, self.stride, self.padding, self.dilation
        return ops.max_unpool2d(input, switches, *window, output_size, self.overlap)

    def extra_repr(self) -> str:
        return (
            f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"dilation={self.dilation}, overlap={self.overlap!r}"
        )


class LocalResponseNorm(nn.LocalResponseNorm):
    """``nn.LocalResponseNorm``, the paper's contrast normalisation: :func:`zfcuda.ops.local_response_norm`."""

    def forward(self, input: Tensor) -> Tensor:
        """Like ``input``."""
        return ops.local_response_norm(input, self.size, self.alpha, self.beta, self.k)
