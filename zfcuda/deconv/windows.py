"""What one activation reaches on the way down: a window of every map, and what must be kept of it.

A position of a layer sees a window of each map below it. On the way down only these windows can be other than
zero, so a projection needs no more than the switches inside them (and, for two of the gates, one bit a value).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from zfcuda import ops
from zfcuda.deconv.graph import Node
from zfcuda.deconv.receptive_field import Pair, Window

__all__ = ["Kept", "Level", "Path", "Stage", "pack_bits"]

#: A switch outside the map: it points nowhere.
NOWHERE = 255


@dataclass(frozen=True)
class Level:
    """A map on the way down, and the window of it that one position of the layer reaches.

    Position (y, x) reaches ``size`` positions from ``start + (y, x) * jump`` on; those outside ``map_size`` are
    padding.
    """

    map_size: Pair
    size: Pair = (1, 1)
    jump: Pair = (1, 1)
    start: Pair = (0, 0)

    def below(self, window: Window, map_size: Pair) -> Level:
        """The level below a convolution or a pool."""
        (h, w), (sy, sx), (ey, ex), (py, px) = self.size, window.stride, window.extent, window.padding
        return Level(
            map_size,
            ((h - 1) * sy + ey, (w - 1) * sx + ex),
            (self.jump[0] * sy, self.jump[1] * sx),
            (self.start[0] * sy - py, self.start[1] * sx - px),
        )

    def outside(self, positions: Tensor) -> Tensor:
        """Rows and columns of each window that lie outside the map: int64 (n, 4), before it and behind it."""
        top, left = self.origins(positions).unbind(1)
        (h, w), (height, width) = self.size, self.map_size
        return torch.stack((-top, -left, top + (h - height), left + (w - width)), 1).clamp(min=0)

    def padding(self, outside: Tensor) -> Tensor:
        """Where windows of which so much is `outside` lie there: bool (n, height, width, 1)."""
        masks = []
        for dim, size in enumerate(self.size):
            place = torch.arange(size, device=outside.device)
            before, behind = outside[:, dim, None], outside[:, 2 + dim, None]
            masks.append((place < before) | (place >= size - behind))
        return (masks[0][:, :, None] | masks[1][:, None, :])[..., None]

    def origins(self, positions: Tensor) -> Tensor:
        """The first position of each window: int64 (n, 2) from the layer's positions (n, 2)."""
        y, x = positions.unbind(-1)
        return torch.stack((y * self.jump[0] + self.start[0], x * self.jump[1] + self.start[1]), -1)


@dataclass(frozen=True)
class Stage:
    """One step down: unpool, gate and filter (``node`` a convolution), or unpool alone, or a node without a window."""

    node: Node | None
    pool: Node | None
    signal: Level
    maps: Level
    image: Level


@dataclass(frozen=True)
class Kept:
    """What a forward pass must leave behind for a batch of windows.

    ``switches``: uint8 (n, h, w, C) by the pool's name, 255 outside the map. ``positive``: uint8
    (n, h, w, ceil(C / 8)) by the name of the rectified node, bit c % 8 of byte c // 8 says that the map is not <= 0.
    """

    switches: Mapping[str, Tensor] = field(default_factory=dict)
    positive: Mapping[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, rows: slice | tuple[Tensor, ...]) -> Kept:
        return self._each(lambda kept: kept[rows])

    def to(self, device: torch.device) -> Kept:
        """The same on a device."""
        return self._each(lambda kept: kept.to(device))

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(kept.nbytes for part in (self.switches, self.positive) for kept in part.values())

    @staticmethod
    def join(parts: Sequence[Kept]) -> Kept:
        """One for all."""

        def joined(maps: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
            return {name: torch.cat([each[name] for each in maps]) for name in maps[0]}

        return Kept(joined([part.switches for part in parts]), joined([part.positive for part in parts]))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Kept:
        return Kept(*({name: change(kept) for name, kept in part.items()} for part in (self.switches, self.positive)))


class Path:
    """The way down from a layer to the pixels, for windows.

    Parameters
    ----------
    nodes : sequence of Node
        From the layer down to the image, each the only input of the one before.
    image_size : (int, int)
        Height and width of the images.
    """

    def __init__(self, nodes: Sequence[Node], image_size: Pair) -> None:
        sizes = [image_size]
        for node in reversed(nodes):
            sizes.append(node.window.output_size(sizes[-1]) if node.window else sizes[-1])
        self.top = level = Level(sizes.pop())
        self.stages: list[Stage] = []
        pool: Node | None = None
        pooled = level
        for node in nodes:
            below = (
                level.below(node.window, sizes.pop())
                if node.window
                else Level(sizes.pop(), level.size, level.jump, level.start)
            )
            if pool and node.kind in ("pool", "relu", "affine"):
                self.stages.append(Stage(None, pool, pooled, level, level))
                pool = None
            if node.kind == "pool":
                pool, pooled = node, level
            elif node.kind == "conv":
                self.stages.append(Stage(node, pool, pooled if pool else level, level, below))
                pool = None
            elif node.kind in ("relu", "affine"):
                self.stages.append(Stage(node, None, level, level, level))
            level = below
        if pool:
            self.stages.append(Stage(None, pool, pooled, level, level))
        self.pixels = level

    @property
    def pools(self) -> dict[str, Level]:
        """The pools on the way and the windows of their switches."""
        return {stage.pool.name: stage.signal for stage in self.stages if stage.pool}

    @property
    def rectified(self) -> dict[str, Level]:
        """The rectified nodes on the way and the windows of their maps."""
        nodes = ((stage.node, stage.maps) for stage in self.stages if stage.node)
        return {node.name: maps for node, maps in nodes if node.rectified or node.kind == "relu"}

    def cut(
        self,
        switches: Mapping[str, Tensor],
        images: Tensor,
        positions: Tensor,
        positive: Mapping[str, Tensor] | None = None,
    ) -> Kept:
        """What these activations need.

        Parameters
        ----------
        switches : mapping of str to Tensor
            uint8 (N, C, h, w), by the pool's name.
        images : Tensor
            int64 (n,): the image of each activation.
        positions : Tensor
            int64 (n, 2): its row and column in the layer.
        positive : mapping of str to Tensor, optional
            uint8 (N, h, w, ceil(C / 8)) as `pack_bits` makes it, by the name of the rectified node.
        """

        def windows(wholes: Iterable[tuple[str, Tensor]], levels: dict[str, Level], fill: int) -> dict[str, Tensor]:
            return {
                name: ops.crop_windows(whole, images, levels[name].origins(positions), levels[name].size, fill)
                for name, whole in wholes
                if name in levels
            }

        return Kept(
            windows(((name, whole.permute(0, 2, 3, 1)) for name, whole in switches.items()), self.pools, NOWHERE),
            windows((positive or {}).items(), self.rectified, 0),
        )


def pack_bits(map_: Tensor) -> Tensor:
    """Where a map (N, C, h, w) is not <= 0: uint8 (N, h, w, ceil(C / 8)), the first channel in the lowest bit."""
    open_ = ~(map_.permute(0, 2, 3, 1) <= 0)
    padded = torch.nn.functional.pad(open_, (0, -map_.shape[1] % 8)).unflatten(-1, (-1, 8))
    return (padded * (1 << torch.arange(8, device=map_.device))).sum(-1).to(torch.uint8)


def unpack_bits(bits: Tensor, channels: int) -> Tensor:
    """The inverse of `pack_bits`: bool (…, channels)."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits.unsqueeze(-1) >> shifts & 1).flatten(-2)[..., :channels].bool()
