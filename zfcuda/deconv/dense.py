"""The dense path: whole maps travel down, for every projection. Exact, general, the reference for faster ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from zfcuda import ops
from zfcuda.deconv.graph import Graph
from zfcuda.deconv.node import Node, laid_out, per_channel

__all__ = ["Record", "down", "up"]


@dataclass(frozen=True)
class Record:
    """What one forward pass leaves behind, in the order of the layers.

    Attributes
    ----------
    images : Tensor (N, C, H, W)
        The input.
    maps : mapping of str to Tensor
        The output of every layer by its name and aliases, rectified where a ReLU is joined: (N, K, h, w) or (N, K).
    switches : mapping of str to Tensor
        uint8 (N, K, h, w): the position within its window of each pooled maximum, by the pool's name.
    logits : Tensor
        The output of the last layer.
    """

    images: Tensor
    maps: Mapping[str, Tensor]
    switches: Mapping[str, Tensor]
    logits: Tensor


def up(graph: Graph, images: Tensor) -> Record:
    """One forward pass that keeps everything."""
    maps: dict[str, Tensor] = {}
    switches: dict[str, Tensor] = {}

    def keep(i: int, output: Tensor, switch: Tensor | None) -> None:
        node = graph.nodes[i]
        maps.update(dict.fromkeys((node.name, *node.aliases), output))
        if switch is not None:
            switches[node.name] = switch

    logits = graph.run(images, keep)
    return Record(images, MappingProxyType(maps), MappingProxyType(switches), logits)


def down(
    graph: Graph, top: int, signal: Tensor, record: Record, images: Tensor, gate: str, overlap: str = "sum"
) -> Tensor:
    """The pixels that a signal at the output of node ``top`` comes from.

    Each node takes the sum of the signals that come from those above it, as the transpose of a copy is a sum, and
    hands on one to each of its inputs.

    Parameters
    ----------
    signal : Tensor (n, K, h, w) or (n, K)
        Of the shape of the node's output.
    images : Tensor, int64 (n,)
        Which of the record's images each signal belongs to.

    Returns
    -------
    Tensor (n, C, H, W)
    """
    signals = {top: signal}
    for i in range(top, -1, -1):
        if i not in signals:
            continue
        node = graph.nodes[i]
        if node.name in record.switches and _is_one_step(graph, i, top):
            layer = graph.nodes[node.inputs[0]]
            (j,) = layer.inputs
            under = record.maps[graph.nodes[j].name] if j >= 0 else record.images
            part = _unpooled(node, layer, signals.pop(i), under.shape, record, images, gate, overlap)
            signals[j] = signals[j] + part if j in signals else part
            continue
        below = [record.maps[graph.nodes[j].name] if j >= 0 else record.images for j in node.inputs]
        forward = None
        if gate != "deconvnet" and (node.rectified or node.kind == "relu"):
            forward = record.maps[node.name][images]
        switches = record.switches[node.name][images] if node.name in record.switches else None
        parts = _step(node, signals.pop(i), [m.shape for m in below], forward, switches, gate, overlap)
        for j, part in zip(node.inputs, parts, strict=True):
            signals[j] = signals[j] + part if j in signals else part
    return signals[-1]


def _is_one_step(graph: Graph, pool: int, top: int) -> bool:
    """Whether a pool takes the maps of a convolution that nothing else up to ``top`` takes: no sum between them."""
    (layer,) = graph.nodes[pool].inputs
    if layer < 0 or graph.nodes[layer].kind != "conv":
        return False
    return all(layer not in node.inputs for i, node in enumerate(graph.nodes[: top + 1]) if i != pool)


def _unpooled(
    pool: Node,
    layer: Node,
    signal: Tensor,
    below: torch.Size,
    record: Record,
    images: Tensor,
    gate: str,
    overlap: str,
) -> Tensor:
    """Back through a pool and its convolution at once; the pool's output says what the rectifier let pass."""
    size = record.maps[layer.name].shape[2:]
    window = pool.window_on(size)
    forward = record.maps[pool.name][images] if layer.rectified and gate in ("backprop", "guided") else None
    return ops.unpool_relu_deconv2d(
        signal,
        record.switches[pool.name][images],
        layer.parameters()[0],
        None,
        *_slide(layer, size, below),
        pool_kernel_size=window.kernel,
        pool_stride=window.stride,
        pool_padding=window.padding,
        pool_dilation=window.dilation,
        pool_output_size=size,
        overlap=overlap,
        gate=gate if layer.rectified else "none",
        forward=forward,
    )


def _step(
    node: Node,
    signal: Tensor,
    below: Sequence[torch.Size],
    forward: Tensor | None,
    switches: Tensor | None,
    gate: str,
    overlap: str,
) -> Sequence[Tensor]:
    """One step back: from a signal of the size of the node's output to one for each of its inputs."""
    if node.kind == "add":
        return [signal] * len(below)
    if node.kind == "concat":
        return signal.split([shape[1] for shape in below], 1)
    if switches is not None:
        window = node.window_on(below[0][2:])
        slide = (window.kernel, window.stride, window.padding, window.dilation)
        return [ops.max_unpool2d(signal, switches, *slide, output_size=below[0][2:], overlap=overlap)]
    if node.rectified or node.kind == "relu":
        return [_rectified(node, signal, below[0], forward, gate)]
    return [_transposed(node, signal, below[0])]


def _rectified(node: Node, signal: Tensor, below: torch.Size, forward: Tensor | None, gate: str) -> Tensor:
    if node.kind == "conv":
        return _filtered(node, signal, below, gate, forward)
    if gate != "backprop":
        signal = signal.relu()
    if forward is not None:
        signal = signal.masked_fill(forward <= 0, 0)
    return _transposed(node, signal, below)


def _transposed(node: Node, signal: Tensor, below: torch.Size) -> Tensor:
    """Without a gate: the transpose of what the node does, as a linear map; offsets vanish.

    Batch normalisation in evaluation mode is such a map, ``scale · x + offset``, and whether it is folded into a
    convolution or stands alone must make no difference: the signal is multiplied by its scale. The contrast
    normalisation of the paper is none, and is skipped.
    """
    if node.kind == "conv":
        return _filtered(node, signal, below, "none", None)
    if node.kind == "linear":
        return signal @ node.parameters()[0]
    if node.kind == "affine":
        return signal * per_channel(node.parameters()[0], signal)
    if node.kind == "average":
        shape = (len(signal), *below[1:])
        return torch.func.vjp(node.module.forward, signal.new_zeros(()).expand(shape))[1](signal)[0]
    if node.kind == "channels":
        chosen = torch.tensor(node.module.of(below[1]), device=signal.device)
        return signal.new_zeros(len(signal), *below[1:]).index_add_(1, chosen, signal)
    if node.kind == "flatten":
        return laid_out(signal.unflatten(1, below[1:]))
    return signal  # normalisation; a ReLU, whose gate the signal has passed


def _filtered(node: Node, signal: Tensor, below: torch.Size, gate: str, forward: Tensor | None) -> Tensor:
    weight, _ = node.parameters()
    return ops.deconv2d(signal, weight, None, *_slide(node, signal.shape[2:], below), gate=gate, forward=forward)


def _slide(node: Node, size: Sequence[int], below: torch.Size) -> tuple[Any, ...]:
    """How a convolution's transpose takes maps of height and width ``size`` to what is below it."""
    window = node.window
    assert window is not None
    # Pixels at the bottom and right that no window of the convolution reached.
    rest = [
        below[2 + d] - ((size[d] - 1) * window.stride[d] - 2 * window.padding[d] + window.extent[d]) for d in (0, 1)
    ]
    return window.stride, window.padding, rest, node.groups, window.dilation
