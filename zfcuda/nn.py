"""Drop-in modules: torch's names, arguments, state dicts and initialisation, on the operators of zfcuda.ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from zfcuda import ops
from zfcuda.ops._common import option
from zfcuda.ops.max_unpool2d import OVERLAPS

__all__ = ["ConvReLU2d", "LocalResponseNorm", "MaxPool2d", "MaxUnpool2d"]


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
        window = self.kernel_size, self.stride, self.padding, self.dilation
        output, switches = ops.max_pool2d(input, *window, self.ceil_mode)
        if self.return_indices:
            return output, ops.switches_to_indices(switches, input.shape, *window)
        return (output, switches) if self.return_switches else output


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
