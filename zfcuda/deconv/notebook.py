"""One line for notebooks: an image in, a picture of what a unit sees out."""

from __future__ import annotations

import os

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image, ImageOps
from torch import Tensor

from zfcuda.deconv.deconvnet import DeconvNet, Gate
from zfcuda.report import pictures

__all__ = ["show"]


def show(
    model: torch.nn.Module | DeconvNet,
    image: str | os.PathLike[str] | Image.Image | ArrayLike | Tensor,
    layer: str,
    unit: int | None = None,
    *,
    mean: ArrayLike = 128.0,
    std: ArrayLike = 1.0,
    input_size: tuple[int, int] | None = None,
    gate: Gate = "deconvnet",
    size: int = 224,
) -> Image.Image:
    """A unit's projection beside the image patch that caused it.

    Parameters
    ----------
    model : torch.nn.Module or DeconvNet
        Anything that `DeconvNet` accepts.
    image : path, PIL image, array or Tensor
        A file, a PIL image, or an array (height, width) or (height, width, channels) of uint8 or of floats in
        0 … 1: scaled and cropped about its centre to ``input_size``, then ``(pixels - mean) / std`` with pixels in
        0 … 255. A tensor (C, H, W) or (1, C, H, W) is the network's input as it is.
    layer : str
        Name of the layer, as in ``DeconvNet(model).layers``.
    unit : int, optional
        The map, or the fully connected unit; default the one with the strongest activation.
    mean, std : float or one for each channel
        Preprocessing, in units of pixel values 0 … 255. The default is near the paper's (pixels in about -128 … 128);
        torchvision's is ``mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375)``.
    input_size : (int, int), optional
        Height and width of the network's input; default ``model.input_size`` where it has one, else the image's own.
    gate : {"deconvnet", "backprop", "guided"}
        As in `DeconvNet.project`.
    size : int
        Longer side of either half of the picture.

    Returns
    -------
    PIL.Image.Image
        Left the projection (zero is mid-grey), right the patch: both the receptive field of the strongest
        position, or the whole image for fully connected units.

    Raises
    ------
    ValueError, IndexError, TypeError
        As `DeconvNet` and `DeconvNet.project`.
    """
    net = model if isinstance(model, DeconvNet) else DeconvNet(model)
    record = net(_as_input(net, image, mean, std, input_size or net.input_size))
    if unit is None:
        unit = int(net.strongest_unit(record, layer)[0])
    projected = pictures.projection(net.project(record, layer, unit, gate=gate)[0].cpu())
    patch = pictures.patch(record.images[0].cpu(), mean, std)
    positions = net.strongest(record, layer, unit).positions
    if positions is not None:
        box = net.box(layer, positions[0].tolist())
        projected, patch = pictures.crop(projected, box), pictures.crop(patch, box)
    return Image.fromarray(pictures.beside(pictures.enlarge(projected, size), pictures.enlarge(patch, size)))


def _as_input(
    net: DeconvNet, image: object, mean: ArrayLike, std: ArrayLike, input_size: tuple[int, int] | None
) -> Tensor:
    """The image as the network's input (1, C, H, W)."""
    parameter = next(net.model.parameters(), torch.empty(0))
    if isinstance(image, Tensor):
        return image.reshape(1, *image.shape[-3:]).to(parameter)
    first = next((m for m in net.model.modules() if isinstance(m, torch.nn.Conv2d)), None)
    photo = _as_photo(image).convert("L" if first is not None and first.in_channels == 1 else "RGB")
    if input_size:
        photo = ImageOps.fit(photo, (input_size[1], input_size[0]), Image.Resampling.BICUBIC)
    pixels = np.atleast_3d(np.asarray(photo, dtype=np.float64))
    values = (pixels - np.asarray(mean)) / np.asarray(std)
    return torch.from_numpy(values.transpose(2, 0, 1).copy())[None].to(parameter)


def _as_photo(image: object) -> Image.Image:
    if isinstance(image, Image.Image):
        return ImageOps.exif_transpose(image)
    if isinstance(image, (str, os.PathLike)):
        return ImageOps.exif_transpose(Image.open(image))
    array = np.asarray(image)
    if array.dtype.kind == "f":
        array = np.rint(np.clip(array, 0, 1) * 255).astype(np.uint8)
    if array.dtype != np.uint8 or array.ndim not in (2, 3):
        raise TypeError(
            f"image is {type(image).__name__} of {array.dtype} {array.shape}; it must be a path, a PIL image, a "
            "tensor, or an array (height, width[, channels]) of uint8 or of floats in 0 … 1"
        )
    return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)
