"""Mined activations projected to pixels, from what mining kept of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zfcuda.deconv.asked import Gate
from zfcuda.deconv.batches import image_and_label
from zfcuda.deconv.local import Local
from zfcuda.deconv.mined import Mined, MinedLayer
from zfcuda.deconv.windows import Kept, Path

if TYPE_CHECKING:
    from zfcuda.deconv.deconvnet import DeconvNet

__all__ = ["Projections", "project_mined"]

#: Pixels and kept switches of the activations that go down together. A larger result would be mapped anew for each
#: part, and its first touch costs as much as a tenth of the projection.
PART_BYTES = 16 * 2**20


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
    height, width = mined.input_size
    path = net.path(layer, (height, width))
    places, ranks = (found.images[chosen] >= 0).nonzero(as_tuple=True)
    rows = chosen[places], ranks
    if path is not None and found.positions is not None and path.pools.keys() <= found.switches.keys():
        return _from_kept(net, path, found, rows, gate)
    if dataset is None:
        raise ValueError(
            f"dataset is None; mining keeps no switches for layer {layer!r}, so its projections need the images again: "
            "give the data set that was mined"
        )
    return _from_images(net, found, rows, gate, dataset)


def _from_kept(
    net: DeconvNet, path: Path, found: MinedLayer, rows: tuple[Tensor, Tensor], gate: Gate
) -> Iterator[Projections]:
    masks = path.rectified if gate != "deconvnet" else {}
    missing = masks.keys() - found.positive.keys()
    if missing:
        raise ValueError(
            f"gate is {gate!r}, but the forward masks that it needs were not kept: mine with gates=[{gate!r}]"
        )
    assert found.positions is not None
    units, ranks = rows
    parameter = next(net.model.parameters())
    local = Local(path, len(found.values), gate, len(units), parameter)
    kept = Kept(
        {name: found.switches[name].flatten(0, 1) for name in path.pools},
        {name: found.positive[name].flatten(0, 1) for name in masks},
    )
    entries = units * found.values.shape[1] + ranks
    part = max(PART_BYTES // local.bytes, 1)
    for unit, rank, entry in zip(units.split(part), ranks.split(part), entries.split(part), strict=True):
        starts, positions = found.values[unit, rank].to(parameter), found.positions[unit, rank].to(parameter.device)
        crops = local(unit.to(parameter.device), starts, positions, kept[_rows(entry)].to(parameter.device))
        yield Projections(crops.pixels, unit, rank, crops.boxes)


def _rows(entries: Tensor) -> slice | tuple[Tensor]:
    """An index of these rows; one that copies nothing where they follow one another."""
    first, last = int(entries[0]), int(entries[-1]) + 1
    return slice(first, last) if torch.equal(entries, torch.arange(first, last)) else (entries,)


def _from_images(
    net: DeconvNet, found: MinedLayer, rows: tuple[Tensor, Tensor], gate: Gate, dataset: Any
) -> Iterator[Projections]:
    """One forward pass for each image in the lists, image by image."""
    images = found.images[rows]
    for image in images.unique().tolist():
        which = tuple(index[images == image] for index in rows)
        positions = None if found.positions is None else found.positions[which][None]
        item = image_and_label(dataset[image])
        if item is None:
            raise TypeError(f"dataset has no image at index {image}; it must be the data set that was mined")
        crops = net.project(
            item[0][None].to(next(net.model.parameters())),
            found.layer.name,
            which[0],
            positions,
            found.values[which][None],
            gate,
            crop=True,
        )
        yield Projections(crops.pixels[0], which[0], which[1], crops.boxes[0])
