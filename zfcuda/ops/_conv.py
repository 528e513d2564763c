"""What ``conv2d_relu`` and ``deconv2d`` share: checks, one geometry, and the operators of their gradients.

Both are linear in each tensor apart from the gate, so each is the gradient of the other: see
``csrc/ops.h``. The operators here are registered, because a compiled graph holds them, but private.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zfcuda import core
from zfcuda.ops._common import (
    check_at_least,
    check_tensor,
    dense,
    integer,
    memory_format,
    pair,
)
from zfcuda.ops._out import Result
from zfcuda.ops._register import OneResult, TwoResults, operator


class Filters(NamedTuple):
    """How a weight slides over an image: pairs for height and width, and the groups."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int

    def check(self, name: str, value: Tensor, weight: Tensor, rows: bool) -> None:
        """Raise RuntimeError unless ``weight`` fits the channels of ``value``, the argument called ``name``.

        ``rows`` says that these channels are the weight's rows (deconvolution), not its columns.
        """
        check_tensor(name, value)
        check_tensor("weight", weight, like=value)
        if weight.size(0) == 0:
            raise RuntimeError(f"weight has shape {tuple(weight.shape)}; it must have at least one filter")
        check_at_least(1, stride=self.stride, dilation=self.dilation)
        check_at_least(0, padding=self.padding)
        if self.groups < 1 or value.size(1) % self.groups != 0 or weight.size(0) % self.groups != 0:
            raise RuntimeError(
                f"groups is {self.groups}; it must divide the {value.size(1)} channels of {name} and the "
                f"{weight.size(0)} rows of weight, whose shape is {tuple(weight.shape)}"
            )
        expected = value.size(1) if rows else value.size(1) // self.groups
        if weight.size(0 if rows else 1) != expected:
            raise RuntimeError(
                f"weight has shape {tuple(weight.shape)}; its dimension {0 if rows else 1} must be {expected} for "
                f"{name} of shape {tuple(value.shape)} and groups={self.groups}"
            )

    def shape(
        self, image: Sequence[int], maps: Sequence[int], weight: Tensor, layout: torch.memory_format
    ) -> tuple[int, ...]:
        """ConvShape of csrc/shapes.h."""
        last = int(layout == torch.channels_last)
        kernel = weight.shape[2:]
        return (*image, *maps[1:], *kernel, *self.stride, *self.padding, *self.dilation, self.groups, last)

    def maps_size(self, image: Sequence[int], kernel: Sequence[int]) -> list[int]:
        """Height and width of the maps of an image."""
        return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(image, kernel, *self[:3], strict=True)]

    def image_size(self, maps: Sequence[int], kernel: Sequence[int]) -> list[int]:
        """The smallest height and width of an image that has these maps."""
        return [(n - 1) * s - 2 * p + d * (k - 1) + 1 for n, k, s, p, d in zip(maps, kernel, *self[:3], strict=True)]

    def transposed(self, maps: Sequence[int], kernel: Sequence[int], image: Sequence[int]) -> Transposed:
        """The way down from maps to an image of these heights and widths."""
        rest = [n - r for n, r in zip(image, self.image_size(maps, kernel), strict=True)]
        return Transposed(self.stride, self.padding, rest, self.groups, self.dilation)


class Transposed(NamedTuple):
    """The arguments of a transposed convolution, in torch's order."""

    stride: Sequence[int]
    padding: Sequence[int]
    output_padding: Sequence[int]
    groups: int
    dilation: Sequence[int]

    @property
    def filters(self) -> Filters:
        """The convolution that it transposes."""
        return Filters(self.stride, self.padding, self.dilation, self.groups)


def filters_of(
    stride: int | Sequence[int], padding: int | Sequence[int], dilation: int | Sequence[int], groups: int
) -> Filters:
    """What users give for a convolution; TypeError if it is no such thing."""
    return Filters(
        pair("stride", stride), pair("padding", padding), pair("dilation", dilation), integer("groups", groups)
    )


def transposed_of(
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    output_padding: int | Sequence[int],
    groups: int,
    dilation: int | Sequence[int],
) -> Transposed:
    """What users give for a transposed convolution; TypeError if it is no such thing."""
    return Transposed(
        pair("stride", stride),
        pair("padding", padding),
        pair("output_padding", output_padding),
        integer("groups", groups),
        pair("dilation", dilation),
    )


def check_bias(bias: Tensor | None, like: Tensor, channels: int) -> None:
    """Check a bias of one number for each of the result's channels."""
    if bias is None:
        return
    check_tensor("bias", bias, rank=1, like=like)
    if bias.size(0) != channels:
        raise RuntimeError(f"bias has shape {tuple(bias.shape)}; it must be ({channels},), one for each output channel")


def convolved(image: Tensor, weight: Tensor, maps_size: Sequence[int]) -> Result:
    """The maps of this height and width, in the image's memory format."""
    return Result(image, [image.size(0), weight.size(0), *maps_size], memory_format(image))


def convolve(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    forward: Tensor | None,
    filters: Filters,
    gate: str,
    maps: Tensor,
) -> None:
    """``conv2d`` of csrc/ops.h into maps of the image's memory format."""
    if maps.numel():
        layout, fixed = memory_format(image), (dense(weight), dense(bias))
        for images, gates, part in in_parts(maps, weight, dense(image, layout), dense(forward, layout), maps):
            where = filters.shape(images.shape, part.shape, weight, layout), core.DTYPES[image.dtype]
            scratch = core.workspace("conv2d", image, *where)
            core.run("conv2d", image, *where, core.GATES[gate], images, *fixed, gates, part, scratch)


#: Multiplications of one call of the CPU's core, about a second's: between two calls Python looks for Ctrl-C.
MOST_AT_A_TIME = 1 << 36


def in_parts(maps: Tensor, weight: Tensor, *tensors: Any) -> Iterator[tuple[Any, ...]]:
    """The tensors of a convolution with these maps for some images after others; themselves for few on the CPU."""
    images = maps.size(0)
    count = max(1, MOST_AT_A_TIME * images // (maps.numel() * weight[0].numel()))
    if count >= images or not maps.is_cpu:
        yield tensors
        return
    for first in range(0, images, count):
        yield tuple(None if t is None else t[first : first + count] for t in tensors)


@operator("conv2d_gated", batched=("image", "forward"))
def conv2d_gated(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    forward: Tensor | None,
    filters: Filters,
    maps_size: Sequence[int],
) -> OneResult:
    """Convolution, zero where ``forward <= 0``: the gradient of ``deconv2d`` by its signal."""
    maps = yield convolved(image, weight, maps_size)
    convolve(image, weight, bias, forward, filters, "none" if forward is None else "backprop", maps)


@operator("conv2d_weight_gradient")
def conv2d_weight_gradient(
    image: Tensor,
    signal: Tensor,
    forward: Tensor | None,
    weight: Tensor,
    filters: Filters,
    gate: str,
    with_bias: bool,
) -> TwoResults:
    """Gradients by weight, with the weight's strides, and by bias (empty unless ``with_bias``)."""
    bias = Result(weight, [signal.size(1) if with_bias else 0])
    grad_weight, grad_bias = yield Result(weight, weight.shape, torch.preserve_format), bias
    if not signal.numel():
        grad_weight.zero_()
        grad_bias.zero_()
        return
    layout = memory_format(image)
    where = filters.shape(image.shape, signal.shape, weight, layout), core.DTYPES[image.dtype]
    scratch = core.workspace("conv2d_weight_gradient", image, *where)
    tensors = dense(image, layout), dense(signal, layout), dense(forward, layout)
    written = dense(grad_weight)
    results = written, grad_bias if with_bias else None
    core.run("conv2d_weight_gradient", image, *where, core.GATES[gate], *tensors, *results, scratch)
    grad_weight.copy_(written)  # nothing, where it is contiguous itself
