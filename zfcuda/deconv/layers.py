"""Every layer of a graph: channels, sizes, receptive fields and memory, by arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

from zfcuda.deconv.graph import Graph, Node
from zfcuda.deconv.node import adaptive_window, pair
from zfcuda.deconv.receptive_field import Field, Layer, Pair

__all__ = ["describe"]


class Shape(NamedTuple):
    """What is known of a node's output; None where only an image can tell."""

    channels: int | None = None
    size: Pair | None = None
    field: Field | None = None
    flat: bool = False


def describe(graph: Graph, input_size: Pair | None, itemsize: int) -> tuple[Layer, ...]:
    """A line for every node; ``itemsize`` is the bytes of one number of a map."""
    shapes: list[Shape] = []
    image = Shape(size=input_size, field=Field())
    out = []
    for i, node in enumerate(graph.nodes):
        shapes.append(_through(node, [shapes[j] if j >= 0 else image for j in node.inputs]))
        channels, size, field, _ = shapes[i]
        line = Layer(
            name=node.name,
            kind=node.kind,
            aliases=node.aliases,
            channels=channels,
            size=size,
            receptive_field=field.size if field else None,
            jump=field.jump if field else None,
            start=field.start if field else None,
            map_bytes=_map_bytes(shapes[i], itemsize),
            switch_bytes=_switch_bytes(graph, shapes, i),
        )
        out.append(line)
    return tuple(out)


def _through(node: Node, inputs: Sequence[Shape]) -> Shape:
    shape = inputs[0]
    if node.kind == "linear":
        return shape._replace(channels=node.module.out_features)
    if node.kind == "flatten":
        known = shape.channels is not None and shape.size is not None
        return Shape(shape.channels * prod(shape.size) if known else None, flat=True)  # type: ignore[operator, arg-type]
    if node.kind == "channels":
        return shape._replace(channels=node.module.number(shape.channels))
    if len(inputs) > 1:
        return _joined(node, inputs)
    if node.kind == "adaptive_pool" or (node.kind == "average" and node.window is None):
        return _adaptive(node, shape)
    if node.window is None:
        return shape
    return Shape(
        node.module.out_channels if node.kind == "conv" else shape.channels,
        shape.size and node.window.output_size(shape.size),
        shape.field and shape.field.through(node.window),
    )


def _joined(node: Node, inputs: Sequence[Shape]) -> Shape:
    """Of a sum or a concatenation: it sees what any of its inputs sees."""
    field = inputs[0].field
    for other in inputs[1:]:
        field = field.union(other.field) if field and other.field else None
    known = [s.channels for s in inputs if s.channels is not None]
    if node.kind == "add":
        channels = known[0] if known else None
    else:
        channels = sum(known) if len(known) == len(inputs) else None
    size = next((s.size for s in inputs if s.size), None)
    return Shape(channels, size, field, inputs[0].flat)


def _adaptive(node: Node, shape: Shape) -> Shape:
    """Windows are known where the sizes divide; else a position's pixels follow no rule with one jump."""
    height, width = pair(node.module.output_size)
    if shape.size is None:
        return Shape(shape.channels, (height, width) if height and width else None)
    window = adaptive_window((height, width), shape.size)
    size = (height or shape.size[0], width or shape.size[1])
    field = shape.field.through(window) if window and shape.field else None
    return shape._replace(size=size, field=field)


def _map_bytes(shape: Shape, itemsize: int) -> int | None:
    if shape.channels is None or not (shape.flat or shape.size):
        return None
    return shape.channels * prod(shape.size or ()) * itemsize


def _switch_bytes(graph: Graph, shapes: Sequence[Shape], top: int) -> int | None:
    path = graph.path(top)
    if path is None:
        return None
    total, size = 0, (1, 1)
    for i in path:
        window, channels = graph.nodes[i].window, shapes[i].channels
        if graph.nodes[i].kind == "pool":
            if channels is None:
                return None
            total += size[0] * size[1] * channels
        if window is not None:
            (sy, sx), (ey, ex) = window.stride, window.extent
            size = ((size[0] - 1) * sy + ey, (size[1] - 1) * sx + ex)
    return total
