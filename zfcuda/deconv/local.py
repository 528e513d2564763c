"""The receptive-field-local path: projections that cost what their windows cost.

No bias is added on the way down, so what lies outside the window of an activation stays zero: projecting the
window alone is exact, at the borders too. All windows of a layer go down together, a step at a time; where windows have
grown so much that a step's result would leave the cache, the batch goes on in parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from zfcuda import core, ops
from zfcuda.deconv.windows import Kept, Path, Stage, unpack_bits

__all__ = ["Crops", "Local", "boxes", "cut", "paste"]

#: Largest result of a step, but for a single window.
STEP_BYTES = 4 * 2**20


class Crops(NamedTuple):
    """Projections as crops: the receptive fields alone.

    Attributes
    ----------
    pixels : Tensor (…, C, h, w)
        Zero where the field reaches beyond the image.
    boxes : Tensor, int64 (…, 4)
        Top, left, bottom and right in pixels of the network's input, the last two exclusive; they may reach
        beyond the image.
    """

    pixels: Tensor
    boxes: Tensor


class Local:
    """Projects activations of one layer, window by window.

    Parameters
    ----------
    path : Path
        From the layer to the pixels.
    channels : int
        Maps of the layer.
    gate : {"deconvnet", "backprop", "guided"}
    expected : int
        About how many activations are to come. Weights are packed here, once for all of them.
    like : Tensor
        Of the dtype and on the device of the activations.
    """

    def __init__(self, path: Path, channels: int, gate: str, expected: int, like: Tensor) -> None:
        self.path, self.channels = path, channels
        self.steps: list[_Step] = []
        kept = 0
        for stage in path.stages:
            kept += prod(stage.signal.size) * channels if stage.pool else 0
            self.steps.append(_Step(stage, channels, gate, expected, like))
            channels = self.steps[-1].channels
        self.image_channels = channels
        #: Steps that do not see the image. Above the first pool the signal depends on the unit, on the sign of the
        #: value (it scales with its size) and on how much of the windows so far lies outside their maps: activations
        #: that agree in these go down as one.
        self.shared = next((i for i, step in enumerate(self.steps) if step.sees_image), len(self.steps))
        if self.shared == 1 or core.capturing(like):  # a copy of the filter; how many agree is not known
            self.shared = 0
        #: Of one activation: its switches and its pixels.
        self.bytes = kept + prod(path.pixels.size) * channels * like.element_size()

    def __call__(self, units: Tensor, starts: Tensor, positions: Tensor, kept: Kept) -> Crops:
        """Project activations, each given by its unit (n,), value to start from (n,) and position (n, 2)."""
        size = self.path.pixels.size
        pixels = starts.new_empty(len(units), *size, self.image_channels)
        self._down(self.shared, self._above(units, starts, positions, kept), positions, kept, pixels)
        return Crops(pixels.permute(0, 3, 1, 2), boxes(self.path.pixels.origins(positions), size))

    def _above(self, units: Tensor, starts: Tensor, positions: Tensor, kept: Kept) -> Tensor:
        """The signal above step ``shared``, for each activation."""
        if not self.shared:
            return self._start(units, starts)
        signs = starts.sign().nan_to_num()
        (unit, sign), kind = _kinds(units, signs.long() + 1)
        signal = self._start(unit, (sign - 1).to(starts))
        below = self.steps[self.shared].stage if self.shared < len(self.steps) else None
        for i, step in enumerate(self.steps[: self.shared], 1):
            signal = step(signal, None, kept)
            before, outside = kind, step.stage.image.outside(positions)
            if i < self.shared:
                (before, *columns), kind = _kinds(kind, *outside.unbind(1))
                outside = torch.stack(columns, 1)
            signal = signal.index_select(0, before)
            if i < self.shared or not below or not below.pool:  # switches put nothing from outside the map back
                signal.masked_fill_(step.stage.image.padding(outside), 0)
        return signal.mul_(starts.abs()[:, None, None, None])

    def _start(self, units: Tensor, starts: Tensor) -> Tensor:
        """The signal in the layer itself."""
        signal = starts.new_zeros(len(units), 1, 1, self.channels)
        signal[torch.arange(len(units), device=units.device), 0, 0, units] = starts
        return signal

    def _down(self, first: int, signal: Tensor, positions: Tensor, kept: Kept, pixels: Tensor) -> None:
        """From the signal above step ``first`` to ``pixels``."""
        for i in range(first, len(self.steps)):
            step = self.steps[i]
            part = max(STEP_BYTES // (step.values * signal.element_size()), 1)
            if part < len(signal):
                for start in range(0, len(signal), part):
                    rows = slice(start, start + part)
                    self._down(i, signal[rows], positions[rows], kept[rows], pixels[rows])
                return
            signal = step(signal, positions, kept, pixels if step is self.steps[-1] else None)
        if signal is not pixels:
            pixels.copy_(signal)


class _Step:
    """One stage with its weight packed."""

    def __init__(self, stage: Stage, channels: int, gate: str, expected: int, like: Tensor) -> None:
        self.stage, node = stage, stage.node
        self.gated = node is not None and (node.rectified or node.kind == "relu")
        self.gate = gate if self.gated else "none"
        self.filters: ops.WindowDeconv2d | None = None
        self.channels = channels
        if node is None or node.kind == "conv":
            self._pack(channels, expected, like)
        self.values = prod(stage.image.size) * self.channels
        self.sees_image = stage.pool is not None or self.gate in ("backprop", "guided")

    def _pack(self, channels: int, expected: int, like: Tensor) -> None:
        node, pool = self.stage.node, self.stage.pool
        undone = None
        if pool:
            assert pool.window is not None
            undone = pool.window.kernel, pool.window.stride, pool.window.dilation
        if node:
            assert node.window is not None
            weight, groups = node.parameters()[0], node.groups
            stride, dilation = node.window.stride, node.window.dilation
            self.channels = weight.shape[1] * groups
        else:  # unpooling alone: the filter that changes nothing
            weight, groups = like.new_ones(channels, 1, 1, 1), channels
            stride = dilation = (1, 1)
        size = self.stage.signal.size
        self.filters = ops.WindowDeconv2d(weight, size, stride, dilation, groups, pool=undone, windows=expected)

    def __call__(self, signal: Tensor, positions: Tensor | None, kept: Kept, out: Tensor | None = None) -> Tensor:
        """The signal below, zero outside the map where positions are given; filters write it to ``out``."""
        node, stage = self.stage.node, self.stage
        positive = None
        if self.gate in ("backprop", "guided"):
            assert node is not None
            positive = kept.positive[node.name]
        if self.filters:
            size = stage.image.size if positions is None else stage.image.map_size
            origins = (
                torch.zeros(len(signal), 2, dtype=torch.int64, device=signal.device)
                if positions is None
                else stage.image.origins(positions)
            )
            switches = kept.switches[stage.pool.name] if stage.pool else None
            return self.filters(signal, origins, size, gate=self.gate, positive=positive, switches=switches, out=out)
        assert node is not None
        if node.kind == "affine":
            return signal * node.parameters()[0].to(signal)
        if self.gate in ("deconvnet", "guided"):
            signal = signal.relu()
        return signal if positive is None else signal.masked_fill(~unpack_bits(positive, self.channels), 0)


def _kinds(*columns: Tensor) -> tuple[list[Tensor], Tensor]:
    """The different rows of a table of small numbers >= 0, column by column, and for each row which of them it is."""
    radices = [int(column.max()) + 1 if len(column) else 1 for column in columns]
    codes = columns[0]
    for column, radix in zip(columns[1:], radices[1:], strict=True):
        codes = codes * radix + column
    codes, kind = codes.unique(return_inverse=True)  # of one number: a table's rows are compared one by one
    rows = []
    for radix in reversed(radices[1:]):
        rows.append(codes % radix)
        codes = codes // radix
    return [codes, *reversed(rows)], kind


def cut(images: Tensor, origins: Tensor, size: tuple[int, int]) -> Crops:
    """A crop of each image (n, C, height, width), zero outside it."""
    each = torch.arange(len(images), device=images.device)
    pixels = ops.crop_windows(images.permute(0, 2, 3, 1), each, origins, size)
    return Crops(pixels.permute(0, 3, 1, 2), boxes(origins, size))


def boxes(origins: Tensor, size: Sequence[int]) -> Tensor:
    """Boxes (n, 4) of a size, from their first pixels (n, 2)."""
    top, left = origins.unbind(1)
    return torch.stack((top, left, top + size[0], left + size[1]), 1)


def paste(crops: Crops, size: torch.Size) -> Tensor:
    """The crops in whole images, zero elsewhere: (n, C, height, width)."""
    pixels = crops.pixels.permute(0, 2, 3, 1)
    each = torch.arange(len(pixels), device=pixels.device)
    return ops.crop_windows(pixels, each, -crops.boxes[:, :2], size).permute(0, 3, 1, 2)
