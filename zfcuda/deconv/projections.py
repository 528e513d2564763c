"""Mined activations projected to pixels, from what mining kept of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zfcuda.deconv.again import Passes
from zfcuda.deconv.asked import Gate
from zfcuda.deconv.local import Local
from zfcuda.deconv.mined import Mined, MinedLayer
from zfcuda.deconv.windows import Kept, Path

if TYPE_CHECKING:
    from zfcuda.deconv.deconvnet import DeconvNet

__all__ = ["Projections", "project_mined"]

#: Pixels and kept switches of the activations that go down together. A larger result would be mapped anew for each
#: part, and its first touch costs as much as a tenth of the projection.
PART_BYTES = 16 * 2**20

#: Entries of a layer: their units and their ranks.
Rows = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Projections:
    """Projections of mined activations; entries that are missing are left out.

    Map by map and strongest first where mining kept the switches, else image by image.

    Attributes
    ----------
    pixels : Tensor (n, C, h, w)
        The receptive field of each, zero where it reaches beyond the image; whole images for fully connected units.
    units, ranks : Tensor, int64 (n,)
        The map, and the place in its list: 0 is the strongest.
    boxes : Tensor, int64 (n, 4)
        Top, left, bottom and right in pixels of the network's input, the last two exclusive; they may reach
        beyond the image.
    """

    pixels: Tensor
    units: Tensor
    ranks: Tensor
    boxes: Tensor

    def _repr_html_(self) -> str:
        from zfcuda.report import notebook

        return notebook.projections_html(self)

    @staticmethod
    def join(parts: Sequence[Projections]) -> Projections:
        """One for all."""
        return Projections(*(torch.cat([getattr(p, name) for p in parts]) for name in Projections.__dataclass_fields__))


def project_mined(
    net: DeconvNet, mined: Mined, layer: str, units: Sequence[int] | Tensor | None, gate: Gate, dataset: Any
) -> Iterator[Projections]:
    """See `DeconvNet.iterate_mined`."""
    found = mined[layer]
    chosen = torch.arange(len(found.values)) if units is None else torch.as_tensor(units, dtype=torch.int64).reshape(-1)
    wrong = chosen[(chosen < 0) | (chosen >= len(found.values))]
    if len(wrong):
        raise IndexError(f"units has {int(wrong[0])}; layer {layer!r} has units 0 to {len(found.values) - 1}")
    path = net.path(layer, mined.input_size)
    places, ranks = (found.images[chosen] >= 0).nonzero(as_tuple=True)
    rows = chosen[places], ranks
    if not len(places):  # dead maps only
        size = path.pixels.size if path else mined.input_size
        empty = next(net.model.parameters()).new_empty(0, net.graph.image_channels, *size)
        return iter([Projections(empty, *rows, rows[0].new_empty(0, 4))])
    masks = path.rectified.keys() if path and gate != "deconvnet" else set()
    lacking = not path or not path.pools.keys() <= found.switches.keys()
    if path and not lacking and masks <= found.positive.keys():
        kept = Kept(
            {name: found.switches[name].flatten(0, 1) for name in path.pools},
            {name: found.positive[name].flatten(0, 1) for name in masks},
        )
        top = found.values.shape[1]
        local = _local(net, path, found, rows, gate)
        return _down(net, local, found, rows, lambda units, ranks: kept[_consecutive(units * top + ranks)])
    if dataset is None:
        raise ValueError(
            f"dataset is None; mining kept no switches for layer {layer!r}, so its projections need the images again: "
            "give the data set that was mined"
            if lacking
            else f"gate is {gate!r}, but the forward masks that it needs were not kept: mine with gates=[{gate!r}], or "
            "give the data set that was mined"
        )
    passes = dataset if isinstance(dataset, Passes) else Passes(net, mined, dataset, masks=gate != "deconvnet")
    if path:
        return _from_windows(net, path, found, rows, gate, passes)
    return _from_images(net, found, rows, gate, passes)


def _local(net: DeconvNet, path: Path, found: MinedLayer, rows: Rows, gate: Gate) -> Local:
    return Local(path, len(found.values), gate, len(rows[0]), next(net.model.parameters()))


def _from_windows(
    net: DeconvNet, path: Path, found: MinedLayer, rows: Rows, gate: Gate, passes: Passes
) -> Iterator[Projections]:
    """With windows cut from the images' passes, a batch of images at a time."""
    local, images = _local(net, path, found, rows, gate), found.images[rows]
    for passed in passes.batches(images):
        of = torch.isin(images, passed.images)
        yield from _down(net, local, found, (rows[0][of], rows[1][of]), partial(passed.cut, path, found))


def _down(
    net: DeconvNet, local: Local, found: MinedLayer, rows: Rows, kept: Callable[[Tensor, Tensor], Kept]
) -> Iterator[Projections]:
    """Entries with what was kept of them, a part at a time."""
    assert found.positions is not None
    parameter = next(net.model.parameters())
    part = max(PART_BYTES // local.bytes, 1)
    for which in zip(rows[0].split(part), rows[1].split(part), strict=True):
        starts, positions = found.values[which].to(parameter), found.positions[which].to(parameter.device)
        crops = local(which[0].to(parameter.device), starts, positions, kept(*which).to(parameter.device))
        yield Projections(crops.pixels, *which, crops.boxes)


def _consecutive(entries: Tensor) -> slice | tuple[Tensor]:
    """An index of these rows; one that copies nothing where they follow one another."""
    first, last = int(entries[0]), int(entries[-1]) + 1
    follow = last - first == len(entries) and torch.equal(entries, torch.arange(first, last))
    return slice(first, last) if follow else (entries,)


def _from_images(net: DeconvNet, found: MinedLayer, rows: Rows, gate: Gate, passes: Passes) -> Iterator[Projections]:
    """Whole maps go down, image by image."""
    images = found.images[rows]
    for image in images.unique().tolist():
        which = tuple(index[images == image] for index in rows)
        positions = None if found.positions is None else found.positions[which][None]
        crops = net.project(
            passes.record(image),
            found.layer.name,
            which[0],
            positions,
            found.values[which][None],
            gate,
            crop=True,
        )
        yield Projections(crops.pixels[0], which[0], which[1], crops.boxes[0])
