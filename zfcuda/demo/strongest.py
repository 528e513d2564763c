"""Mining: where in the photographs every map of every layer is strongest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from zfcuda import DeconvNet
from zfcuda.demo.data import Window, normalise

LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5")
NINE = 9
OVERLAP = 0.25  # of a patch's area that another patch of the same map may share, at most
BATCH = 64


@dataclass(frozen=True)
class Spot:
    """One activation: its value, the crop that it was found in, and its row and column in the map."""

    value: float
    crop: int
    row: int
    column: int


def strongest_everywhere(
    deconvnet: DeconvNet, pixels: torch.Tensor, report: Callable[[int], object] = lambda done: None
) -> dict[str, dict[str, torch.Tensor]]:
    """For each layer the strongest activation of every map in every crop: `values` and `positions` (maps x crops).

    A position is row * width + column in the map.
    """
    values: dict[str, list[torch.Tensor]] = {layer: [] for layer in LAYERS}
    positions: dict[str, list[torch.Tensor]] = {layer: [] for layer in LAYERS}
    for start in range(0, len(pixels), BATCH):
        crops = normalise(pixels[start : start + BATCH])
        record = deconvnet(crops)
        for layer in LAYERS:
            value, position = record.maps[layer].flatten(2).max(2)
            values[layer].append(value)
            positions[layer].append(position)
        report(len(crops))
    return {
        layer: {
            "values": torch.cat(values[layer]).T.contiguous(),
            "positions": torch.cat(positions[layer]).T.contiguous(),
        }
        for layer in LAYERS
    }


def strongest_nine(
    deconvnet: DeconvNet, layer: str, found: dict[str, torch.Tensor], windows: Sequence[Window], size: int
) -> list[list[Spot]]:
    """For each map its nine strongest spots, strongest first: one a crop, and no two patches of nearly the same place.

    Fewer where fewer are positive; none for a dead map.
    """
    width = next(info.size[1] for info in deconvnet.layers if info.name == layer and info.size)
    chosen = []
    for values, positions in zip(found["values"], found["positions"], strict=True):
        spots: list[Spot] = []
        places: list[tuple[int, Square]] = []
        for crop in values.argsort(descending=True, stable=True).tolist():
            if len(spots) == NINE or values[crop] <= 0:
                break
            row, column = divmod(int(positions[crop]), width)
            place = in_photograph(patch_box(deconvnet, layer, row, column, size), windows[crop], size)
            photo = windows[crop].photo
            if all(photo != other or overlap(place, taken) <= OVERLAP for other, taken in places):
                spots.append(Spot(float(values[crop]), crop, row, column))
                places.append((photo, place))
        chosen.append(spots)
    return chosen


@dataclass(frozen=True)
class Square:
    top: float
    left: float
    side: float


def patch_box(deconvnet: DeconvNet, layer: str, row: int, column: int, size: int) -> Square:
    """The receptive field in a crop of `size` pixels, moved inside it where it reaches beyond an edge."""
    box = deconvnet.box(layer, (row, column))
    side = min(box.bottom - box.top, size)
    return Square(min(max(box.top, 0), size - side), min(max(box.left, 0), size - side), side)


def in_photograph(box: Square, window: Window, size: int) -> Square:
    """The same square in the pixels of the photograph."""
    scale = window.side / size
    return Square(window.top + box.top * scale, window.left + box.left * scale, box.side * scale)


def overlap(one: Square, other: Square) -> float:
    """The shared area as a fraction of the smaller square's."""
    down = min(one.top + one.side, other.top + other.side) - max(one.top, other.top)
    across = min(one.left + one.side, other.left + other.side) - max(one.left, other.left)
    return max(down, 0.0) * max(across, 0.0) / min(one.side, other.side) ** 2
