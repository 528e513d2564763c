"""Pictures of the strongest spots: nine projections beside nine patches for every map, and the figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from zfcuda import DeconvNet
from zfcuda.demo.data import Photograph, Window, normalise
from zfcuda.demo.folder import write
from zfcuda.demo.strongest import BATCH, Spot, patch_box
from zfcuda.report import pictures
from zfcuda.report.pictures import Picture

CELL = {"conv1": 63, "conv2": 81, "conv3": 75, "conv4": 96, "conv5": 96}  # side of a small picture
ON_FIGURE = 16  # maps of a layer on its figure, at most


@dataclass(frozen=True)
class MapPictures:
    """One map: its spots, and the projection and the patch of each."""

    index: int
    spots: list[Spot]
    projections: list[Picture]
    patches: list[Picture]


def layer_pictures(
    deconvnet: DeconvNet,
    layer: str,
    nines: Sequence[Sequence[Spot]],
    pixels: torch.Tensor,
    report: Callable[[int], object] = lambda done: None,
) -> list[MapPictures]:
    """Every map of a layer, its spots projected to pixels; the dead ones have no pictures."""
    tasks = [(index, spot) for index, spots in enumerate(nines) for spot in spots]
    maps = [MapPictures(index, list(spots), [], []) for index, spots in enumerate(nines)]
    size = pixels.shape[-1]
    for start in range(0, len(tasks), BATCH):
        batch = tasks[start : start + BATCH]
        crops = pixels[[spot.crop for _, spot in batch]]
        units = torch.tensor([[index] for index, _ in batch])
        where = torch.tensor([[[spot.row, spot.column]] for _, spot in batch])
        projected = deconvnet.project(normalise(crops), layer, units, where)[:, 0]
        for (index, spot), projection, crop in zip(batch, projected.numpy(), crops.numpy(), strict=True):
            square = patch_box(deconvnet, layer, spot.row, spot.column, size)
            top, left, side = int(square.top), int(square.left), int(square.side)
            inside = np.s_[:, top : top + side, left : left + side]
            maps[index].projections.append(pictures.projection(projection[inside], pictures.white(projection[inside])))
            maps[index].patches.append(pictures.patch(crop[inside]))
        report(len(batch))
    return maps


def map_size(layer: str) -> tuple[int, int]:
    """Width and height of the picture that `save_map` writes."""
    block = 3 * CELL[layer] + 2
    return 2 * block + 8, block


def save_map(path: Path, layer: str, pictured: MapPictures) -> None:
    """Nine projections, and beside them the nine patches."""
    both = pictures.fig2([(pictured.projections, pictured.patches)], columns=1, size=CELL[layer])
    write(path, lambda part: Image.fromarray(both).save(part, quality=92, subsampling=0))


def save_figure(path: Path, layer: str, maps: Sequence[MapPictures]) -> None:
    """A selection of the maps, evenly spaced among those that are not dead, arranged as in the paper's Fig. 2."""
    alive = [pictured for pictured in maps if pictured.spots]
    picked = [alive[i] for i in np.linspace(0, len(alive) - 1, min(ON_FIGURE, len(alive))).round().astype(int)]
    figure = pictures.fig2([(p.projections, p.patches) for p in picked], columns=4, size=CELL[layer])
    write(path, lambda part: Image.fromarray(figure).save(part, optimize=True))


def save_filters(path: Path, weight: torch.Tensor) -> None:
    """The filters of layer 1, each on its own scale, the strongest first."""
    order = weight.square().sum((1, 2, 3)).argsort(descending=True)
    figure = pictures.filters(weight[order].numpy(), columns=8, size=56)
    write(path, lambda part: Image.fromarray(figure).save(part, optimize=True))


def names(spots: Sequence[Spot], windows: Sequence[Window], photographs: Sequence[Photograph]) -> str:
    """The photographs of the spots, the commonest first: ``coffee 5, astronaut 3, cat``."""
    count = Counter(photographs[windows[spot.crop].photo].name for spot in spots)
    return ", ".join(f"{name} {n}" if n > 1 else name for name, n in count.most_common())
