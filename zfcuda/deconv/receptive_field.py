"""Which pixels of the input a position of a map sees, by arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["Box", "Field", "Layer", "Layers", "Window"]

Pair = tuple[int, int]


@dataclass(frozen=True)
class Window:
    """How a convolution or a pool slides; every field is (vertical, horizontal)."""

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    ceil: bool = False

    @property
    def extent(self) -> Pair:
        """Pixels from the first to the last tap."""
        (ky, kx), (dy, dx) = self.kernel, self.dilation
        return (ky - 1) * dy + 1, (kx - 1) * dx + 1

    def output_size(self, size: Pair) -> Pair:
        """Size of the maps from the size of the input, by torch's rule."""
        return self._along(0, size[0]), self._along(1, size[1])

    def _along(self, axis: int, size: int) -> int:
        stride, padding = self.stride[axis], self.padding[axis]
        room = size + 2 * padding - self.extent[axis]
        if not self.ceil:
            return room // stride + 1
        count = -(-room // stride) + 1
        # A last window that would start in the padding behind the input is dropped.
        return count - 1 if (count - 1) * stride >= size + padding else count


class Box(NamedTuple):
    """Pixels ``top <= y < bottom``, ``left <= x < right``."""

    top: int
    left: int
    bottom: int
    right: int

    def clip(self, height: int, width: int) -> Box:
        """The part that lies inside an image of this size."""
        return Box(max(self.top, 0), max(self.left, 0), min(self.bottom, height), min(self.right, width))


@dataclass(frozen=True)
class Field:
    """The receptive field of position (0, 0), and how it moves.

    Position (y, x) sees ``size`` pixels from ``start + (y, x) * jump`` on; negative pixels are padding.
    """

    size: Pair = (1, 1)
    jump: Pair = (1, 1)
    start: Pair = (0, 0)

    def through(self, window: Window) -> Field:
        """The field after one more convolution or pool.

        ``size + (extent - 1) * jump``, ``jump * stride``, ``start - padding * jump``.
        """
        (ey, ex), (jy, jx) = window.extent, self.jump
        return Field(
            (self.size[0] + (ey - 1) * jy, self.size[1] + (ex - 1) * jx),
            (jy * window.stride[0], jx * window.stride[1]),
            (self.start[0] - window.padding[0] * jy, self.start[1] - window.padding[1] * jx),
        )

    def union(self, other: Field) -> Field | None:
        """The smallest field that holds both; None where they move at different rates."""
        if self.jump != other.jump:
            return None
        start = (min(self.start[0], other.start[0]), min(self.start[1], other.start[1]))
        end = [max(a + n, b + m) for a, n, b, m in zip(self.start, self.size, other.start, other.size, strict=True)]
        return Field((end[0] - start[0], end[1] - start[1]), self.jump, start)

    def box(self, position: Pair) -> Box:
        """The pixels that a position sees; they may reach beyond the image."""
        top = self.start[0] + position[0] * self.jump[0]
        left = self.start[1] + position[1] * self.jump[1]
        return Box(top, left, top + self.size[0], left + self.size[1])


@dataclass(frozen=True)
class Layer:
    """A line of `DeconvNet.layers`.

    Attributes
    ----------
    name, kind : str
        The module's name, and its kind: ``conv``, ``linear``, ``relu``, ``pool``, ``adaptive_pool``, ``norm``,
        ``affine``, ``average``, ``flatten``, ``add``, ``concat`` or ``channels``.
    aliases : tuple of str
        Other modules with the same map: the ReLU after a convolution, batch normalisation folded into it, dropout.
    channels : int or None
        Maps, or units; None where only an image can tell.
    size : (int, int) or None
        Height and width of a map; None without positions, or where the input's size is not known.
    receptive_field, jump, start : (int, int) or None
        Position (y, x) sees ``receptive_field`` pixels from ``start + (y, x) * jump`` on. None: all of them, or, below
        adaptive pools and where branches meet, no such rule. Where branches meet, the smallest box around all of them.
    map_bytes : int or None
        Memory of the layer's output for one image.
    switch_bytes : int or None
        Memory of the switches that the projection of one activation needs: one byte for each channel and position of
        every pool below it (and its own) within its receptive field, borders included. None where a projection from
        this layer goes through the whole maps.
    """

    name: str
    kind: str
    aliases: tuple[str, ...]
    channels: int | None
    size: Pair | None
    receptive_field: Pair | None
    jump: Pair | None
    start: Pair | None
    map_bytes: int | None
    switch_bytes: int | None


class Layers(tuple[Layer, ...]):
    """The layers of a network; a table in notebooks."""

    def _repr_html_(self) -> str:
        from zfcuda.report import notebook

        return notebook.layers_html(self)
