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
    empty,
    memory_format,
)
from zfcuda.ops._register import operator


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


def check_bias(bias: Tensor | None, like: Tensor, channels: int) -> None:
    """Check a bias of one number for each of the result's channels."""
    if bias is None:
        return
    check_tensor("bias", bias, rank=1, like=like)
    if bias.size(0) != channels:
        raise RuntimeError(f"bias has shape {tuple(bias.shape)}; it must be ({channels},), one for each output channel")


def convolve(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    forward: Tensor | None,
    filters: Filters,
    gate: str,
    maps_size: Sequence[int],
) -> Tensor:
    """``conv2d`` of csrc/ops.h in the image's memory format."""
    layout = memory_format(image)
    maps = empty(image, [image.size(0), weight.size(0), *maps_size], layout)
    if maps.numel():
        fixed = weight.contiguous(), None if bias is None else bias.contiguous()
        for images, gates, part in in_parts(maps, weight, dense(image, layout), dense(forward, layout), maps):
            where = filters.shape(images.shape, part.shape, weight, layout), core.DTYPES[image.dtype]
            scratch = core.workspace("conv2d", image, *where)
            core.run("conv2d", image, *where, core.GATES[gate], images, *fixed, gates, part, scratch)
    return maps


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
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    maps_size: Sequence[int],
) -> Tensor:
    """Convolution, zero where ``forward <= 0``: the gradient of ``deconv2d`` by its signal."""
    gate = "none" if forward is None else "backprop"
    return convolve(image, weight, bias, forward, Filters(stride, padding, dilation, groups), gate, maps_size)


@conv2d_gated.register_fake
def _(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    forward: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    maps_size: Sequence[int],
) -> Tensor:
    return empty(image, [image.size(0), weight.size(0), *maps_size], memory_format(image))


@operator("conv2d_weight_gradient")
def conv2d_weight_gradient(
    image: Tensor,
    signal: Tensor,
    forward: Tensor | None,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    gate: str,
    with_bias: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients by weight, with the weight's strides, and by bias (empty unless ``with_bias``)."""
    allocate = torch.empty if signal.numel() else torch.zeros
    grad_weight = allocate(weight.shape, dtype=weight.dtype, device=weight.device)
    grad_bias = allocate(signal.size(1) if with_bias else 0, dtype=weight.dtype, device=weight.device)
    if signal.numel():
        layout = memory_format(image)
        filters = Filters(stride, padding, dilation, groups)
        where = filters.shape(image.shape, signal.shape, weight, layout), core.DTYPES[image.dtype]
        scratch = core.workspace("conv2d_weight_gradient", image, *where)
        tensors = dense(image, layout), dense(signal, layout), dense(forward, layout)
        results = grad_weight, grad_bias if with_bias else None
        core.run("conv2d_weight_gradient", image, *where, core.GATES[gate], *tensors, *results, scratch)
    return like_weight(grad_weight, weight), grad_bias


def like_weight(gradient: Tensor, weight: Tensor) -> Tensor:
    """A contiguous gradient with the weight's strides."""
    strided = torch.empty_like(weight)
    return gradient if strided.stride() == gradient.stride() else strided.copy_(gradient)


@conv2d_weight_gradient.register_fake
def _(
    image: Tensor,
    signal: Tensor,
    forward: Tensor | None,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    gate: str,
    with_bias: bool,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight), weight.new_empty(signal.size(1) if with_bias else 0)
