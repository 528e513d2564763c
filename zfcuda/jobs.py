"""The commands as functions: a model by name and a folder of images in, files and tables out.

``zfcuda mine vgg16 photos/ --top 16`` is ``zfcuda.jobs.mine("vgg16", "photos/", top=16)``: every option of a command is
a parameter of the same name. Inside them are `zfcuda.models.load_model`, `zfcuda.images.ImageFiles`,
`zfcuda.deconv.mine`, `zfcuda.DeconvNet` and `zfcuda.report.gallery`, for those who have modules and data sets.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from zfcuda.deconv import Box, DeconvNet, Layer, Record
from zfcuda.deconv.batches import image_of, say
from zfcuda.deconv.mined import Mined, Skipped
from zfcuda.deconv.ranks import is_first
from zfcuda.demo.folder import write
from zfcuda.images import ImageFiles
from zfcuda.models import LoadedModel, load_model
from zfcuda.report import pictures
from zfcuda.report.pictures import Picture

__all__ = [
    "GalleryResult",
    "LayersResult",
    "MineResult",
    "ProjectResult",
    "Projected",
    "gallery",
    "layers",
    "mine",
    "project",
]

PathLike = str | os.PathLike[str]
Gate = Literal["deconvnet", "backprop", "guided"]


@dataclass(frozen=True)
class LayersResult:
    """The model, and every layer of it."""

    loaded: LoadedModel
    layers: tuple[Layer, ...]


@dataclass(frozen=True)
class MineResult:
    """The model, what was mined, and the folder that keeps it (`Mined.load` reads it)."""

    loaded: LoadedModel
    mined: Mined
    folder: Path


@dataclass(frozen=True)
class GalleryResult:
    """The same, and the gallery's page."""

    loaded: LoadedModel
    mined: Mined
    folder: Path
    page: Path


@dataclass(frozen=True)
class Projected:
    """One unit in one image: its strongest activation, where it is, the pixels it sees, and the picture of them."""

    image: str
    unit: int
    value: float
    position: tuple[int, int] | None
    box: Box
    file: Path


@dataclass(frozen=True)
class ProjectResult:
    """The model, a line for each picture, and the images that could not be read."""

    loaded: LoadedModel
    layer: str
    rows: list[Projected]
    skipped: list[Skipped]


def layers(
    model: str,
    *,
    weights: PathLike | None = None,
    num_classes: int | None = None,
    input_size: int | tuple[int, int] | None = None,
) -> LayersResult:
    """Every layer that can be mined and projected; the names are those of `mine`, `project` and `gallery`.

    Parameters
    ----------
    model, weights, num_classes, input_size
        As in `zfcuda.models.load_model`.
    """
    loaded = load_model(model, weights, num_classes=num_classes, input_size=input_size)
    return LayersResult(loaded, DeconvNet(loaded.model, loaded.input_size).layers)


def mine(
    model: str,
    data: PathLike | Sequence[PathLike],
    *,
    output: PathLike | None = None,
    layers: Sequence[str] | None = None,
    top: int = 9,
    per_image: int | None = 1,
    batch_size: int = 32,
    num_workers: int = 0,
    memory: int = 2 * 2**30,
    gates: Sequence[Gate] = ("deconvnet",),
    weights: PathLike | None = None,
    num_classes: int | None = None,
    input_size: int | tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
    device: str | None = None,
    progress: bool = True,
) -> MineResult:
    """The strongest activations of every map over images, kept in the folder ``output/mined``.

    The same call again takes over what is done, and goes on where it was stopped.

    Parameters
    ----------
    model, weights, num_classes, input_size, mean, std, seed
        As in `zfcuda.models.load_model`.
    data : path, or several
        A folder, image files, or a text file with the path of an image in every line.
    output : path, optional
        Default: the names of the model and of the data, in the current folder.
    layers, top, per_image, batch_size, num_workers, memory, gates, progress
        As in `zfcuda.deconv.mine`.
    device : str, optional
        Default: a GPU where there is one; the first, or under ``torchrun`` each process its own.
    """
    loaded = load_model(model, weights, num_classes=num_classes, input_size=input_size, mean=mean, std=std, seed=seed)
    loaded.model.to(_device(device))
    folder = _folder(output, model, data) / "mined"
    mined = _mine(
        loaded,
        _images(loaded, data),
        folder,
        layers=layers,
        top=top,
        per_image=per_image,
        batch_size=batch_size,
        num_workers=num_workers,
        memory=memory,
        gates=tuple(gates),
        progress=progress,
    )
    return MineResult(loaded, mined, folder)


def gallery(
    model: str,
    data: PathLike | Sequence[PathLike],
    *,
    output: PathLike | None = None,
    layers: Sequence[str] | None = None,
    top: int = 9,
    per_image: int | None = 1,
    batch_size: int = 32,
    num_workers: int = 0,
    memory: int = 2 * 2**30,
    gate: Gate = "deconvnet",
    control: bool = False,
    weights: PathLike | None = None,
    num_classes: int | None = None,
    input_size: int | tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
    device: str | None = None,
    progress: bool = True,
) -> GalleryResult:
    """Mine, project and show: a page that opens from the disk, ``output/gallery/index.html``.

    What `mine` has left in ``output/mined`` is used. Of several processes all mine, and the first one writes the page.

    Parameters
    ----------
    gate, control
        As in `zfcuda.report.gallery`.
    model, data, output, …
        As in `mine`.
    """
    from zfcuda.report.gallery import gallery as write_gallery

    loaded = load_model(model, weights, num_classes=num_classes, input_size=input_size, mean=mean, std=std, seed=seed)
    loaded.model.to(_device(device))
    folder = _folder(output, model, data)
    images = _images(loaded, data)
    mined = _mine(
        loaded,
        images,
        folder / "mined",
        layers=layers,
        top=top,
        per_image=per_image,
        batch_size=batch_size,
        num_workers=num_workers,
        memory=memory,
        gates=(gate,),
        progress=progress,
    )
    if is_first():
        write_gallery(
            mined,
            loaded.model,
            folder / "gallery",
            control=control,
            gate=gate,
            dataset=images,
            title=f"{loaded.name}, weights {loaded.weights}",
            progress=progress,
        )
    return GalleryResult(loaded, mined, folder / "mined", (folder / "gallery/index.html").absolute())


def project(
    model: str,
    data: PathLike | Sequence[PathLike],
    *,
    layer: str,
    units: Sequence[int] | None = None,
    strongest: int = 1,
    output: PathLike | None = None,
    gate: Gate = "deconvnet",
    full: bool = False,
    npz: bool = False,
    size: int = 224,
    weights: PathLike | None = None,
    num_classes: int | None = None,
    input_size: int | tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
    device: str | None = None,
) -> ProjectResult:
    """Pictures of what units of a layer see in images: the projection of each, beside the patch that caused it.

    Parameters
    ----------
    model, weights, num_classes, input_size, mean, std, seed
        As in `zfcuda.models.load_model`.
    data, output
        As in `mine`. The pictures are ``output/<layer>/<image>-<unit>.png``.
    layer : str
        As `layers` names it.
    units : sequence of int, optional
        Maps, or units of a fully connected layer. Default: those with the strongest activations in the image.
    strongest : int
        How many, where ``units`` names none.
    gate : {"deconvnet", "backprop", "guided"}
        As in `DeconvNet.project`.
    full : bool
        Show the whole image, in the place of the receptive field.
    npz : bool
        Also write ``output/<layer>/<image>.npz``: pixels (U, C, H, W), units, values, positions, boxes and the input.
    size : int
        Longer side of either half of a picture.
    device : str, optional
        Default: the first GPU where there is one.

    Raises
    ------
    RuntimeError
        If none of the images can be read; some that cannot are `skipped`.
    """
    loaded = load_model(model, weights, num_classes=num_classes, input_size=input_size, mean=mean, std=std, seed=seed)
    where = _device(device)
    net = DeconvNet(loaded.model.to(where), loaded.input_size)
    net.graph.find(layer)  # an unknown one is refused before anything is read
    images = _images(loaded, data)
    folder = _folder(output, model, data) / _file_name(layer)
    names = _stems(images)
    rows: list[Projected] = []
    skipped: list[Skipped] = []
    for index in range(len(images)):
        image = _read(images, index)
        if isinstance(image, Skipped):
            skipped.append(image)
            continue
        record = net(image[None].to(where))
        chosen = torch.tensor(units) if units is not None else _strongest_units(record.maps[layer][0], strongest)
        found = _project(net, record, layer, chosen, gate)
        name = names[index]
        patch = pictures.patch(record.images[0].cpu(), loaded.mean, loaded.std)
        for unit, pixels, value, position, box in zip(*found.values(), strict=True):
            place = None if position is None else (int(position[0]), int(position[1]))
            file = folder / f"{name}-{unit}.png"
            shown = (0, 0, *patch.shape[:2]) if full else box
            picture = _picture(pixels, patch, shown, size)
            write(file, picture.save)
            rows.append(Projected(images.name(index), int(unit), float(value), place, Box(*map(int, box)), file))
        if npz:
            arrays = {key: value for key, value in found.items() if value[0] is not None}
            _save_arrays(folder / f"{name}.npz", input=record.images[0].cpu().numpy(), **arrays)
    if len(skipped) == len(images):
        raise RuntimeError(f"none of {len(images)} images could be read; {skipped[0].name}: {skipped[0].reason}")
    return ProjectResult(loaded, layer, rows, skipped)


def _read(images: ImageFiles, index: int) -> Tensor | Skipped:
    try:
        return image_of(images, index)
    except MemoryError:
        raise
    except Exception as error:  # whatever a reader makes of a broken file
        return Skipped(index, images.name(index), say(error))


def _project(net: DeconvNet, record: Record, layer: str, units: Tensor, gate: Gate) -> dict[str, Any]:
    """Of the one image of a record: units (U,), pixels (U, C, H, W), values (U,), positions (U, 2), boxes (U, 4)."""
    values, positions = net.strongest(record, layer, units)
    pixels = net.project(record, layer, units, gate=gate)[0].cpu().numpy()
    whole = (0, 0, *record.images.shape[2:])
    places = [None] * len(units) if positions is None else positions[0].cpu().numpy()
    boxes = [whole if place is None else tuple(net.box(layer, place)) for place in places]
    return dict(
        units=units.numpy(),
        pixels=pixels,
        values=values[0].cpu().numpy(),
        positions=places,
        boxes=np.array(boxes, dtype=np.int64).reshape(-1, 4),
    )


def _stems(images: ImageFiles) -> list[str]:
    """Names for the files of each image: its own without the suffix, numbered where two are called the same."""
    stems = [_file_name(path.stem) for path in images.paths]
    return [stem if stems.count(stem) == 1 else f"{i}-{stem}" for i, stem in enumerate(stems)]


def _strongest_units(maps: Tensor, count: int) -> Tensor:
    """Those of (K, h, w) or (K,) with the largest maxima, the strongest first."""
    values = maps.reshape(len(maps), -1).amax(1)
    return values.argsort(descending=True, stable=True)[:count].cpu()


def _picture(pixels: np.ndarray, patch: Picture, box: Sequence[int], size: int) -> Image.Image:
    """The projection beside the patch; its brightness is that of the pixels in the box."""
    shown = pictures.projection(pixels, pictures.white(pixels))
    left, right = (pictures.enlarge(pictures.crop(picture, box), size) for picture in (shown, patch))
    return Image.fromarray(pictures.beside(left, right))


def _save_arrays(path: Path, **arrays: Any) -> None:
    write(path, lambda part: np.savez(part, **arrays))


class _Normalised(ImageFiles):
    """Images for a network with a rule of its own; ``preprocessing`` then only serves to show them."""

    def __init__(self, files: PathLike | Sequence[PathLike], loaded: LoadedModel) -> None:
        super().__init__(files, loaded.input_size, loaded.mean, loaded.std, channels=len(loaded.mean))
        self._loaded = loaded

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        values, label = super().__getitem__(index)
        normalise = self._loaded.normalise
        assert normalise is not None
        mean, std = (torch.tensor(v)[:, None, None] for v in (self._loaded.mean, self._loaded.std))
        return normalise((values * std + mean)[None])[0], label


def _images(loaded: LoadedModel, data: PathLike | Sequence[PathLike]) -> ImageFiles:
    """The images, prepared for the network."""
    paths = [Path(data)] if isinstance(data, (str, os.PathLike)) else [Path(path) for path in data]
    if len(paths) == 1 and paths[0].suffix.lower() == ".txt":
        lines = paths[0].read_text(encoding="utf-8").splitlines()
        paths = [paths[0].parent / line.strip() for line in lines if line.strip()]
    files = paths[0] if len(paths) == 1 and paths[0].is_dir() else paths
    if loaded.normalise is not None:
        return _Normalised(files, loaded)
    return ImageFiles(files, loaded.input_size, loaded.mean, loaded.std, channels=len(loaded.mean))


def _mine(loaded: LoadedModel, images: ImageFiles, folder: Path, **how: Any) -> Mined:
    from zfcuda.deconv import mine

    return mine(DeconvNet(loaded.model, loaded.input_size), images, folder=folder, **how)


def _device(device: str | None) -> torch.device:
    """The one asked for, else a GPU where there is one: under ``torchrun`` each process of a machine its own."""
    if device or not torch.cuda.is_available():
        return torch.device(device or "cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def _folder(output: PathLike | None, model: str, data: PathLike | Sequence[PathLike]) -> Path:
    """Where results go: named after the model and the data unless told."""
    if output is not None:
        return Path(output)
    first = data if isinstance(data, (str, os.PathLike)) else data[0]
    return Path(f"{_file_name(Path(model).stem)}-{_file_name(Path(first).resolve().stem)}")


def _file_name(name: str) -> str:
    return re.sub("[^A-Za-z0-9._-]+", "_", name)
