"""Image files as a data set for `zfcuda.deconv.mine`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image, ImageOps
from torch import Tensor

from zfcuda.deconv.mined import Preprocessing, Source

__all__ = ["SUFFIXES", "ImageFiles"]

#: Files of a folder that count as images.
SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})

PathLike = str | os.PathLike[str]


class ImageFiles(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """The images of a folder, or a list of files, as inputs of a network.

    An image is turned upright (EXIF), scaled so that its short side is ``short_side``, cropped about its centre to
    ``input_size``, and becomes ``(pixels - mean) / std`` with pixels in 0 … 255. A file that cannot be read raises when
    its item is asked for; `zfcuda.deconv.mine` reports and skips it.

    Parameters
    ----------
    files : path, or sequence of paths
        A folder, searched with all folders in it: its files with a suffix of `SUFFIXES`, hidden ones left out, in the
        order of their paths. Its sub-folders are classes, as in torchvision's ImageFolder. Or a list of files.
    input_size : int or (int, int)
        Height and width of the network's input.
    mean, std : float or one for each channel
        In units of pixel values 0 … 255. The default is that of `zfcuda.show`; torchvision's is
        ``mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375)``.
    short_side : int, optional
        Default: as small as ``input_size`` allows, so that nothing is cut off a square picture. With 256 and an input
        of 224 it is the usual preprocessing of ImageNet.
    channels : {3, 1}
        Colour or grey.

    Raises
    ------
    FileNotFoundError
        If there is no such folder, or no image in it.
    ValueError
        If ``channels`` is not 3 or 1, or ``short_side`` smaller than the input.
    """

    def __init__(
        self,
        files: PathLike | Sequence[PathLike],
        input_size: int | tuple[int, int] = 224,
        mean: ArrayLike = 128.0,
        std: ArrayLike = 1.0,
        *,
        short_side: int | None = None,
        channels: int = 3,
    ) -> None:
        self.input_size = (input_size, input_size) if isinstance(input_size, int) else (input_size[0], input_size[1])
        if channels not in (1, 3):
            raise ValueError(f"channels is {channels!r}; it must be 3 (colour) or 1 (grey)")
        if short_side is not None and short_side < max(self.input_size):
            raise ValueError(f"short_side is {short_side}; it must be at least input_size, {self.input_size}")
        self.short_side, self.channels = short_side, channels
        self.preprocessing = Preprocessing(
            *(tuple(np.broadcast_to(v, channels).astype(float).tolist()) for v in (mean, std))
        )
        self.root = Path(files) if isinstance(files, (str, os.PathLike)) else None
        self.paths = _find(self.root) if self.root else [Path(file) for file in files]  # type: ignore[union-attr]
        names = [path.relative_to(self.root) for path in self.paths] if self.root else []
        folders = sorted({name.parts[0] for name in names if len(name.parts) > 1})
        self.classes = folders or None
        self._labels = [folders.index(n.parts[0]) if len(n.parts) > 1 else None for n in names] if folders else None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """The network's input, float32 (channels, height, width), and the label; -1 where there is none."""
        with Image.open(self.paths[index]) as file:
            picture = _eight_bits(ImageOps.exif_transpose(file)).convert("RGB" if self.channels == 3 else "L")
        top, left, bottom, right = self._box(picture.height, picture.width)
        height, width = self.input_size
        resized = picture.resize((width, height), Image.Resampling.BICUBIC, (left, top, right, bottom))
        pixels = np.atleast_3d(np.asarray(resized, np.float32)).transpose(2, 0, 1)
        mean, std = (np.array(v, np.float32)[:, None, None] for v in (self.preprocessing.mean, self.preprocessing.std))
        label = self._label(index)
        return torch.from_numpy((pixels - mean) / std), -1 if label is None else label

    def source(self, index: int) -> Source:
        """Where an image comes from; only the head of the file is read."""
        path = self.paths[index]
        try:
            with Image.open(path) as file:
                turned = file.getexif().get(0x0112, 1) >= 5  # orientations that swap height and width
                size = (file.width, file.height) if turned else (file.height, file.width)
        except Exception:
            return Source(self.name(index), self._label(index), str(path))
        return Source(self.name(index), self._label(index), str(path), size, self._box(*size))

    def name(self, index: int) -> str:
        """For people: the path within the folder."""
        path = self.paths[index]
        return (path.relative_to(self.root) if self.root else path).as_posix()

    def _label(self, index: int) -> int | None:
        return self._labels[index] if self._labels else None

    def _box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """The part of a picture that becomes the input: top, left, bottom, right in its pixels."""
        if self.short_side:
            scale = min(height, width) / self.short_side
        else:
            scale = min(height / self.input_size[0], width / self.input_size[1])
        h, w = (max(round(n * scale), 1) for n in self.input_size)
        h, w = min(h, height), min(w, width)
        top, left = (height - h) // 2, (width - w) // 2
        return top, left, top + h, left + w


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Pictures of 16 bits as 8, which PIL would clip."""
    if picture.mode.startswith("I"):
        return Image.fromarray((np.asarray(picture).clip(0, 65535) / 257).round().astype(np.uint8))
    if picture.mode == "F":
        raise ValueError("it holds floating-point numbers of an unknown range")
    return picture


def _find(root: Path) -> list[Path]:
    if not root.is_dir():
        kind = "a file" if root.exists() else "not there"
        raise FileNotFoundError(f"files is {str(root)!r}, which is {kind}; it must be a folder, or a list of files")
    paths = sorted(_walk(root), key=lambda path: path.relative_to(root).as_posix())
    if not paths:
        raise FileNotFoundError(f"files is {str(root)!r}, which holds no image ({', '.join(sorted(SUFFIXES))})")
    return paths


def _walk(root: Path) -> Iterator[Path]:
    seen: set[str] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link that leads back up
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(folder, f) for f in files if Path(f).suffix.lower() in SUFFIXES and not f.startswith("."))
