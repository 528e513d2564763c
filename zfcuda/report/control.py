"""The weight-randomisation control: what a projection would look like had the network learned nothing.

Adebayo et al. (2018), *Sanity checks for saliency maps*: a picture that hardly changes when the weights are replaced by
random ones does not show what the network learned. The control is the same network with the entries of every parameter
shuffled, each parameter by itself: a layer keeps the exact distribution of its weights, so the scale of its maps, and
loses all structure. The same activations are projected, the same unit at the same position in the same image:

- with the data set, each image in the lists is run through the shuffled network once, whose own switches are used: the
  control proper;
- without it, the switches that the trained network left are used again, with the shuffled filters. This is milder, as
  those switches were chosen by learned filters: it answers how much of a picture comes from the switches alone.

Projections of the control start from 1 where the unit's own value there may be 0; pictures have scales of their own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata

from zfcuda.deconv import DeconvNet
from zfcuda.deconv.again import Passes
from zfcuda.deconv.deconvnet import Gate
from zfcuda.deconv.mined import Mined, MinedLayer
from zfcuda.report.tiles import Tiles, in_boxes, inside

__all__ = ["Control", "shuffled", "similarity"]


def shuffled(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """A copy of the model with the entries of each parameter in random order."""
    random = copy.deepcopy(model)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in random.parameters():
            order = torch.randperm(parameter.numel(), generator=draw).to(parameter.device)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return random


def similarity(one: NDArray[Any], other: NDArray[Any], box: Sequence[int], size: tuple[int, int]) -> float:
    """Spearman's rank correlation of two projections' strengths, pixel by pixel.

    The strength is the sum of the absolute values of the channels, so that neither sign nor colour counts. Only pixels
    inside the image count.

    Parameters
    ----------
    one, other : arrays (C, h, w)
    box : top, left, bottom, right
        Where they lie in the image.
    size : height and width of the image

    Returns
    -------
    float
        1: the same pixels in the same order. 0: nothing in common. NaN where one of them is the same everywhere.
    """
    where = inside(np.asarray(box), size)
    ranks = [rankdata(np.abs(projection).sum(0)[where]) for projection in (one, other)]
    ranks = [rank - rank.mean() for rank in ranks]
    norm = math.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum())
    return float((ranks[0] * ranks[1]).sum() / norm) if norm > 0 else math.nan


class Control:
    """The control of tiles.

    Parameters
    ----------
    mined : Mined
    model : torch.nn.Module
        The trained network; a shuffled copy is used.
    gate : str
        As the tiles'.
    dataset : map-style dataset, optional
        See the module's docstring for the difference that it makes.
    """

    def __init__(self, mined: Mined, model: torch.nn.Module, gate: Gate = "deconvnet", dataset: Any = None) -> None:
        self.mined, self.gate = mined, gate
        self.deconvnet = DeconvNet(shuffled(model).eval(), mined.input_size)
        self.passes: Passes | None = None
        if dataset is not None:
            self.mined = replace(mined, layers={name: _bare(layer) for name, layer in mined.items()})
            self.passes = Passes(self.deconvnet, mined, dataset, masks=gate != "deconvnet")

    def pixels(self, layer: str, tiles: Tiles) -> NDArray[np.float32]:
        """The projections (n, C, h, w) of the same activations by the shuffled network."""
        if not len(tiles.units):
            return tiles.pixels
        units = np.unique(tiles.units).tolist()
        found = self.deconvnet.project_mined(self.mined, layer, units, self.gate, self.passes)
        order = np.lexsort((found.ranks.numpy(), found.units.numpy()))  # as the tiles are
        return in_boxes(found.pixels.float().cpu().numpy()[order], tiles.boxes)

    def similarities(self, tiles: Tiles, control: NDArray[np.float32]) -> list[float]:
        """`similarity` of each tile and its control."""
        return [
            similarity(one, other, box, self.mined.input_size)
            for one, other, box in zip(tiles.pixels, control, tiles.boxes, strict=True)
        ]


def _bare(layer: MinedLayer) -> MinedLayer:
    """The same activations, of value 1, without what the trained network left of them."""
    return replace(layer, values=(layer.images >= 0).to(layer.values), switches={}, positive={})
