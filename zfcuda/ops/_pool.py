"""What pooling, unpooling and the switches' conversions share: one geometry and its checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from zfcuda import core
from zfcuda.ops._common import (
    MAX_WINDOW,
    check_at_least,
    check_device,
    check_shape,
    check_tensor,
    dense,
    memory_format,
    pair,
)
from zfcuda.ops._out import Result


class Window(NamedTuple):
    """The arguments of a pool: pairs for height and width."""

    kernel_size: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]

    def check(self, prefix: str = "") -> None:
        """Raise RuntimeError for arguments, whose names begin with ``prefix``, that no input makes sense of."""
        positive = {"kernel_size": self.kernel_size, "stride": self.stride, "dilation": self.dilation}
        check_at_least(1, **{prefix + name: value for name, value in positive.items()})
        check_at_least(0, **{prefix + "padding": self.padding})
        if self.kernel_size[0] * self.kernel_size[1] > MAX_WINDOW:
            raise RuntimeError(
                f"{prefix}kernel_size is {tuple(self.kernel_size)}; a window may have at most {MAX_WINDOW} positions, "
                "for a switch is one byte: pool in two steps"
            )
        if any(2 * p > k for k, p in zip(self.kernel_size, self.padding, strict=True)):
            raise RuntimeError(
                f"{prefix}padding is {tuple(self.padding)}; it must be at most half of "
                f"{prefix}kernel_size={tuple(self.kernel_size)}"
            )

    def pooled_size(self, size: Sequence[int], ceil_mode: bool) -> list[int]:
        """Height and width of the pool of an input of height and width ``size``, by torch's formula."""
        pooled = []
        for n, k, s, p, d in zip(size, *self, strict=True):
            count = (n + 2 * p - (k - 1) * d - 1 + (s - 1 if ceil_mode else 0)) // s + 1
            # The last window of ceil_mode must start inside the input or its left padding.
            pooled.append(count - 1 if ceil_mode and (count - 1) * s >= n + p else count)
        return pooled

    def unpooled_size(self, size: Sequence[int]) -> list[int]:
        """The smallest height and width whose pool without ``ceil_mode`` has height and width ``size``."""
        return [(n - 1) * s - 2 * p + (k - 1) * d + 1 for n, k, s, p, d in zip(size, *self, strict=True)]

    def check_input(self, name: str, size: Sequence[int], ceil_mode: bool, prefix: str = "") -> None:
        """Raise RuntimeError unless every window of an input of ``size`` has a position, and there is one."""
        if min(self.pooled_size(size, ceil_mode)) < 1:
            raise RuntimeError(
                f"{prefix}kernel_size is {tuple(self.kernel_size)} with {prefix}dilation={tuple(self.dilation)}; the "
                f"window must fit {name} of height and width {tuple(size)} padded by {tuple(self.padding)}"
            )
        for n, _, s, p, d in zip(size, *self, strict=True):
            # Only a window that starts in the padding can step over the whole input.
            if n < d and any((o * s - p) % d >= n for o in range(-(-p // s))):
                raise RuntimeError(
                    f"{prefix}dilation is {tuple(self.dilation)}; with {prefix}padding={tuple(self.padding)} a window "
                    f"would step over all of {name} of height and width {tuple(size)}: reduce either"
                )

    def shape(
        self, input_size: Sequence[int], pooled_size: Sequence[int], layout: torch.memory_format
    ) -> tuple[int, ...]:
        """PoolShape of csrc/shapes.h."""
        last = int(layout == torch.channels_last)
        return (*input_size, *pooled_size[-2:], *self.kernel_size, *self.stride, *self.padding, *self.dilation, last)


#: Beside the arguments of a convolution those of a pool have names of their own.
PoolWindow = Annotated[Window, "pool_"]


def window_of(
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None,
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    prefix: str = "",
) -> Window:
    """What users give for a pool, by names that begin with ``prefix``; TypeError if it is no such thing."""
    kernel = pair(f"{prefix}kernel_size", kernel_size)
    return Window(
        kernel,
        kernel if stride is None else pair(f"{prefix}stride", stride),
        pair(f"{prefix}padding", padding),
        pair(f"{prefix}dilation", dilation),
    )


def pooled(input: Tensor, size: Sequence[int]) -> tuple[Result, Result]:
    """Maxima and switches of this whole size, in the memory format of ``input``."""
    layout = memory_format(input)
    return Result(input, size, layout), Result(input, size, layout, torch.uint8)


def pooled_input(input: Tensor, window: Window, ceil_mode: bool) -> tuple[Result, Result]:
    """Maxima and switches of ``input`` itself, after every check."""
    check_tensor("input", input)
    window.check()
    window.check_input("input", input.shape[2:], ceil_mode)
    return pooled(input, [*input.shape[:2], *window.pooled_size(input.shape[2:], ceil_mode)])


def pool(input: Tensor, window: Window, relu: bool, output: Tensor, switches: Tensor) -> None:
    """``max_pool2d`` of csrc/ops.h into checked tensors of the input's memory format."""
    if output.numel():
        layout = memory_format(input)
        shape = window.shape(input.shape, output.shape, layout)
        core.run("max_pool2d", input, shape, core.DTYPES[input.dtype], relu, dense(input, layout), output, switches)


def check_switches(switches: Tensor, like: Tensor, shape: Sequence[int], why: str) -> None:
    """Check dtype, shape and device of switches."""
    if switches.dtype != torch.uint8:
        raise RuntimeError(
            f"switches has dtype {switches.dtype}; it must be torch.uint8: convert torch's int64 indices "
            "with indices_to_switches"
        )
    check_shape("switches", switches, shape, why)
    check_device("switches", switches, like)
