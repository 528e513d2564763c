"""One layer of a network's graph: what it computes on the way up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zfcuda import ops
from zfcuda.deconv.receptive_field import Pair, Window

__all__ = ["Arithmetic", "Channels", "Features", "Node", "adaptive_window", "laid_out", "pair", "per_channel"]


@dataclass(frozen=True)
class Node:
    """A layer: where its maps come from, and how they are computed.

    Attributes
    ----------
    name : str
        The module's name in the model; `zfcuda.deconv.graph.trace` says how operations without a module are called.
    kind : str
        ``conv``, ``linear``, ``relu``, ``pool``, ``adaptive_pool``, ``norm``, ``affine``, ``average``, ``flatten``,
        ``add``, ``concat`` or ``channels``.
    inputs : tuple of int
        The nodes whose outputs it takes; -1 is the image.
    module : torch.nn.Module, Arithmetic, Channels or None
        Holds the parameters and attributes of the kind.
    window : Window or None
        How a convolution or a pool slides; None where there is none, or where it depends on the image (adaptive).
    rectified : bool
        A ReLU follows a convolution or a linear layer, and nothing else sees what comes before it: the node's output
        is the rectified one.
    aliases : tuple of str
        Other names of the output: the ReLU, a folded batch normalisation, dropout, identities.
    folded : torch.nn.Module or None
        The batch normalisation that was folded into a convolution or a linear layer.
    """

    name: str
    kind: str
    inputs: tuple[int, ...]
    module: Any = None
    window: Window | None = None
    rectified: bool = False
    aliases: tuple[str, ...] = ()
    folded: Any = None

    @property
    def groups(self) -> int:
        """Of a convolution."""
        return self.module.groups

    def parameters(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of a ``conv`` or ``linear`` node, batch normalisation folded in; of an ``affine`` node the
        scale and the offset, each (channels,) or () for one number.

        Read from the modules at each call.
        """
        if self.kind == "affine":
            return self.module.parameters() if isinstance(self.module, Arithmetic) else _scale_and_offset(self.module)
        weight, bias = self.module.weight, self.module.bias
        if self.folded is None:
            return weight, bias
        scale, offset = _scale_and_offset(self.folded)
        bias = offset if bias is None else bias * scale + offset
        return weight * scale.reshape(-1, *(1,) * (weight.dim() - 1)), bias

    def window_on(self, size: Sequence[int]) -> Window:
        """The window of a ``conv``, ``pool`` or ``adaptive_pool`` on maps of height and width ``size``."""
        if self.window is not None:
            return self.window
        window = adaptive_window(self.module.output_size, (size[0], size[1]))
        if window is None:
            raise RuntimeError(
                f"{self.name} ({type(self.module).__name__}) would pool maps of {tuple(size)} to "
                f"{self.module.output_size} in windows of different sizes, and switches need equal ones: use images "
                "for which the sizes divide, or a MaxPool2d"
            )
        return window

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """The output, and the switches of a pool; inputs are not changed."""
        x = inputs[0]
        if self.kind == "conv":
            assert self.window is not None
            convolve = ops.conv2d_relu if self.rectified else torch.nn.functional.conv2d
            slide = (self.window.stride, self.window.padding, self.window.dilation)
            return convolve(x, *self.parameters(), *slide, self.groups), None
        if self.kind in ("pool", "adaptive_pool"):
            window = self.window_on(x.shape[2:])
            return ops.max_pool2d(x, window.kernel, window.stride, window.padding, window.dilation, window.ceil)
        return self._simple(inputs), None

    def forward_pooled(self, x: Tensor, pool: Node) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of a rectified ``conv`` node and the pool behind it, in one: the pool's output and switches, and the values
        and positions (N, channels) of the maxima of the maps between, which are never in memory."""
        assert self.window is not None and pool.window is not None
        slide, window = (self.window.stride, self.window.padding, self.window.dilation), pool.window
        return ops.conv2d_relu_max_pool2d_maximum(
            x,
            *self.parameters(),
            *slide,
            self.groups,
            pool_kernel_size=window.kernel,
            pool_stride=window.stride,
            pool_padding=window.padding,
            pool_dilation=window.dilation,
            pool_ceil_mode=window.ceil,
        )

    def _simple(self, inputs: Sequence[Tensor]) -> Tensor:
        x, module = inputs[0], self.module
        if self.kind == "linear":
            x = torch.nn.functional.linear(x, *self.parameters())
            return x.relu() if self.rectified else x
        if self.kind == "norm":
            return ops.local_response_norm(x, module.size, module.alpha, module.beta, module.k)
        if self.kind == "affine":
            scale, offset = self.parameters()
            assert offset is not None
            _check_channels(self.name, scale, x)
            return x * per_channel(scale, x) + per_channel(offset, x)
        if self.kind == "average":
            return module.forward(x)  # not module(x): hooks are not run anywhere
        if self.kind == "channels":
            return x[:, module.index]
        if self.kind == "add":
            _check_equal(self.name, inputs)
            return inputs[0] + inputs[1]
        if self.kind == "concat":
            return torch.cat(list(inputs), 1)
        if self.kind == "flatten":
            _check_features(self, x)
            return x.flatten(1)
        return x.relu()


@dataclass(frozen=True)
class Arithmetic:
    """A number, or one for each channel, that a model adds to a map or multiplies it with.

    ``operand`` is a number, or the name of a parameter or buffer of ``model``, read at each call.
    """

    operation: str
    operand: float | str
    model: Any

    def parameters(self) -> tuple[Tensor, Tensor]:
        """Scale and offset, (channels,) or ()."""
        if isinstance(self.operand, str):
            value = self.model
            for part in self.operand.split("."):
                value = getattr(value, part)
            value = value.detach().reshape(-1) if value.numel() > 1 else value.detach().reshape(())
        else:
            value = torch.tensor(self.operand, dtype=torch.float64)
        one, zero = torch.ones_like(value), torch.zeros_like(value)
        return {
            "add": (one, value),
            "sub": (one, -value),
            "rsub": (-one, value),
            "mul": (value, zero),
            "div": (one / value, zero),
        }[self.operation]


@dataclass(frozen=True)
class Channels:
    """Some of a map's channels: what a model takes by ``x[:, index]``."""

    index: slice | list[int]

    def of(self, count: int) -> list[int]:
        """Their numbers, where there are ``count``."""
        return list(range(count))[self.index] if isinstance(self.index, slice) else [i % count for i in self.index]

    def number(self, count: int | None) -> int | None:
        """How many they are; None if that takes a count that is not known."""
        if isinstance(self.index, list):
            return len(self.index)
        return None if count is None else len(self.of(count))


@dataclass(frozen=True)
class Features:
    """A flattening to so many features; -1: however many there are."""

    count: int


def adaptive_window(output_size: Any, size: Pair) -> Window | None:
    """The window of an adaptive pool on maps of this size; None where its windows differ."""
    wanted = tuple(have if w is None else w for w, have in zip(pair(output_size), size, strict=True))
    if any(have % w for w, have in zip(wanted, size, strict=True)):
        return None
    kernel = (size[0] // wanted[0], size[1] // wanted[1])
    return Window(kernel, kernel, (0, 0), (1, 1))


def pair(output_size: Any) -> tuple[int | None, int | None]:
    """An adaptive pool's height and width; None is that of its input."""
    return tuple(output_size) if isinstance(output_size, (tuple, list)) else (output_size, output_size)


def per_channel(value: Tensor, x: Tensor) -> Tensor:
    """(channels,) or () to what multiplies (N, channels, …)."""
    return value.to(x).reshape(-1, *(1,) * (x.dim() - 2)) if value.dim() else value.to(x)


def laid_out(x: Tensor) -> Tensor:
    """Maps in channels_last on the CPU, where pools, normalisation and convolutions are faster in it."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 and x.device.type == "cpu" else x


def _scale_and_offset(norm: Any) -> tuple[Tensor, Tensor]:
    """Batch normalisation in evaluation mode: ``gamma (x - mean) / sqrt(var + eps) + beta``."""
    scale = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    offset = -norm.running_mean * scale
    return scale, offset if norm.bias is None else offset + norm.bias


def _check_equal(name: str, inputs: Sequence[Tensor]) -> None:
    if inputs[0].shape != inputs[1].shape:
        raise RuntimeError(
            f"{name} adds maps of shapes {tuple(inputs[0].shape)} and {tuple(inputs[1].shape)}; DeconvNet adds only "
            "maps of one shape: use images of the size the model was made for"
        )


def _check_channels(name: str, scale: Tensor, x: Tensor) -> None:
    if scale.dim() and len(scale) != x.shape[1]:
        raise RuntimeError(f"{name} has constants for {len(scale)} channels, and its input has {x.shape[1]}")


def _check_features(node: Node, x: Tensor) -> None:
    """``x.view(-1, features)`` would mix images where it is not given their number."""
    wanted = getattr(node.module, "count", -1)
    if wanted not in (-1, x[:1].numel()):
        raise RuntimeError(
            f"{node.name} makes {wanted} features of maps of {tuple(x.shape[1:])}; use images of the size the model "
            "was made for"
        )
