"""What mining found, as pictures: for every entry of a list its projection and its patch.

A *tile* is one entry: the map (``unit``), its place in the list (``rank``), and two small pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from zfcuda.deconv import DeconvNet
from zfcuda.deconv.again import Passes
from zfcuda.deconv.batches import image_of
from zfcuda.deconv.deconvnet import Gate
from zfcuda.deconv.mined import Mined, MinedLayer
from zfcuda.deconv.mining import fingerprint
from zfcuda.report import pictures

__all__ = ["Painter", "Tiles", "in_boxes", "inside", "windows"]

Array = NDArray[Any]


class Tiles(NamedTuple):
    """The entries of some maps, map by map, the strongest first.

    Attributes
    ----------
    units, ranks : int64 (n,)
    boxes : int64 (n, 4)
        Top, left, bottom and right in the network's input; they may reach beyond it.
    pixels, values : float32 (n, C, h, w)
        The projections themselves, and the patches in values of the network's input.
    projections, patches : uint8 (n, h, w, 3)
    """

    units: Array
    ranks: Array
    boxes: Array
    pixels: Array
    values: Array
    projections: Array
    patches: Array


class Painter:
    """Makes tiles of what was mined.

    Parameters
    ----------
    mined : Mined
    model : torch.nn.Module
        The network that was mined.
    gate : {"deconvnet", "backprop", "guided"}
    dataset : map-style dataset, optional
        What was mined; needed only for layers that keep no patches, such as fully connected ones.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        If these do not belong together, or a projection needs what mining did not keep.
    """

    def __init__(self, mined: Mined, model: torch.nn.Module, gate: Gate = "deconvnet", dataset: Any = None) -> None:
        self.mined, self.gate, self.dataset = mined, gate, dataset
        self.deconvnet = DeconvNet(model, mined.input_size)
        self._check()
        self.passes = None if dataset is None else Passes(self.deconvnet, mined, dataset, masks=gate != "deconvnet")
        self.mean, self.std = _preprocessing(mined)
        for name, layer in mined.items():
            # One map of each layer, so that whatever its projections lack shows now and not when half is done.
            self.tiles(name, layer.count.argmax().reshape(1).tolist())

    def tiles(self, layer: str, units: Sequence[int]) -> Tiles:
        """The entries of these maps of a layer."""
        mined = self.mined[layer]
        alive = [unit for unit in units if mined.count[unit]]
        if not alive:
            return _no_tiles()
        projected = self.deconvnet.project_mined(self.mined, layer, alive, gate=self.gate, dataset=self.passes)
        which, ranks = projected.units.cpu(), projected.ranks.cpu()
        boxes = self._boxes(mined, which, ranks)
        pixels = in_boxes(projected.pixels.float().cpu().numpy(), boxes)
        order = np.lexsort((ranks, which))  # projections that needed the images come image by image
        which, ranks, boxes, pixels = which[order], ranks[order], boxes[order], pixels[order]
        values = self._patches(mined, which, ranks, boxes)
        patches = pictures.patches(values, self.mean, self.std)
        for patch, box in zip(patches, boxes, strict=True):
            patch[~inside(box, self.mined.input_size)] = pictures.GREY
        shown = pictures.projections(pixels)
        return Tiles(which.numpy(), ranks.numpy(), boxes, pixels, values, shown, patches)

    def picture(self, image: int) -> pictures.Picture:
        """An image of the data set as the network saw it."""
        return pictures.patch(image_of(self.dataset, image).float().numpy(), self.mean, self.std)

    def _boxes(self, mined: MinedLayer, units: torch.Tensor, ranks: torch.Tensor) -> Array:
        """The receptive fields; the whole image for fully connected units."""
        line = mined.layer
        if mined.positions is None or line.start is None or line.jump is None or line.receptive_field is None:
            return np.tile((0, 0, *self.mined.input_size), (len(units), 1))
        start = np.array(line.start) + mined.positions[units, ranks].numpy() * line.jump
        return np.concatenate((start, start + line.receptive_field), 1)

    def _patches(self, mined: MinedLayer, units: torch.Tensor, ranks: torch.Tensor, boxes: Array) -> Array:
        if mined.patches is not None:
            return mined.patches[units, ranks].float().numpy()
        images = mined.images[units, ranks].tolist()
        inputs = {image: image_of(self.dataset, image).float().numpy() for image in set(images)}
        return windows([inputs[image] for image in images], boxes)

    def _check(self) -> None:
        known = {layer.name: layer for layer in self.deconvnet.layers}
        if not self.mined:
            raise ValueError("mined holds no layers; mine at least one")
        if self.dataset is not None and not hasattr(self.dataset, "__getitem__"):
            raise TypeError(
                f"dataset is a {type(self.dataset).__name__}; it must have __getitem__, as images are looked up again"
            )
        for name, mined in self.mined.items():
            if name not in known:
                raise ValueError(
                    f"mined has the layer {name!r}, which model does not have; pass the model it came from"
                )
            count = len(mined.values)
            if known[name].channels not in (None, count):
                raise RuntimeError(
                    f"mined has {count} maps of layer {name!r}, model {known[name].channels}; "
                    "pass the model that was mined"
                )
            if mined.patches is None and self.dataset is None:
                raise ValueError(
                    f"layer {name!r} keeps no patches, so its images are needed again; pass the mined dataset"
                )
            if mined.patches is not None and mined.patches.shape[2] not in (1, 3):
                raise RuntimeError(
                    f"images have {mined.patches.shape[2]} channels; only 1 or 3 can be shown as pictures"
                )
        if self.mined.model and self.mined.model != fingerprint(self.deconvnet.model):
            raise RuntimeError("model has other weights than the one that was mined; load those, or mine again")


def _no_tiles() -> Tiles:
    numbers, values, shown = np.empty(0, np.int64), np.empty((0, 3, 0, 0), np.float32), np.empty((0, 0, 0, 3), np.uint8)
    return Tiles(numbers, numbers, np.empty((0, 4), np.int64), values, values, shown, shown)


def in_boxes(projections: Array, boxes: Array) -> Array:
    """Projections (n, C, h, w) as those boxes alone, where they are whole images: those of the dense path."""
    size = tuple((boxes[0, 2:] - boxes[0, :2]).tolist()) if len(boxes) else projections.shape[2:]
    return projections if projections.shape[2:] == size else windows(list(projections), boxes)


def windows(images: Sequence[Array], boxes: Array) -> Array:
    """The box of each image (C, H, W), with zeros outside it: (n, C, h, w)."""
    sizes = boxes[:, 2:] - boxes[:, :2]
    out = np.zeros((len(images), len(images[0]), *sizes[0]), np.float32)
    for window, image, box in zip(out, images, boxes, strict=True):
        mask = inside(box, image.shape[1:])
        top, left, bottom, right = box
        window[:, mask] = image[:, max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)].reshape(len(image), -1)
    return out


def inside(box: Array, size: tuple[int, int]) -> Array:
    """Which pixels of a box lie in the image: bool (h, w)."""
    top, left, bottom, right = (int(side) for side in box)
    rows, columns = np.arange(top, bottom), np.arange(left, right)
    return ((rows >= 0) & (rows < size[0]))[:, None] & ((columns >= 0) & (columns < size[1]))


def _preprocessing(mined: Mined) -> tuple[Any, Any]:
    """Mean and standard deviation that undo the loader; where it is not known, all values span black to white."""
    known = mined.preprocessing
    if known is not None:
        return known.mean, known.std
    patches = [layer.patches for layer in mined.values() if layer.patches is not None and layer.patches.numel()]
    if not patches:
        return 128.0, 64.0  # values of about ±2
    low = min(float(patch.min()) for patch in patches)
    high = max(float(patch.max()) for patch in patches)
    std = 255 / max(high - low, 1e-6)
    return -low * std, std
