"""What mining leaves: the strongest activations of every map, and all that their projections need.

On disk it is a folder::

    mined.json                     everything but the tensors, and the names of the files that hold them
    <layer>.<save>.safetensors     the tensors of one layer, by their names in `MinedLayer`

`mined.json` is one object::

    {
      "schema": 1,
      "save": 3,                                   how often this folder was written; part of the files' names
      "images_seen": 10000, "top": 9, "per_image": 1 or null, "batch_size": 32, "input_size": [224, 224],
      "gates": ["deconvnet"],
      "model": "9f86d081...",                      SHA-256 of the model's state dict
      "preprocessing": {"mean": [...], "std": [...]} or null,
      "classes": ["cat", ...] or null,
      "dataset": {...},                            what tells the data set from another
      "skipped": [{"index": 17, "name": "b/x.jpg", "reason": "..."}, ...],
      "sources": {"42": {"name": "a/y.jpg", "label": 0, "path": "/data/a/y.jpg", "size": [480, 640],
                         "box": [0, 80, 480, 560]}, ...},
      "layers": [{"file": "conv1.3.safetensors", "name": "conv1", "kind": "conv", "aliases": [], "channels": 96,
                  "size": [110, 110], "receptive_field": [7, 7], "jump": [2, 2], "start": [-1, -1],
                  "map_bytes": 4646400, "switch_bytes": 0}, ...]
    }

Absent values are null. In a safetensors file ``switches.pool1`` and ``positive.conv1`` are items of the two mappings.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import safetensors
import safetensors.torch
from torch import Tensor

from zfcuda.deconv.receptive_field import Layer

__all__ = ["Mined", "MinedLayer", "Preprocessing", "Skipped", "Source"]

SCHEMA = 1
DOCUMENT = "mined.json"

Tensors = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Skipped:
    """An image that could not be read: its index and name in the data set, and what the reader said."""

    index: int
    name: str
    reason: str


@dataclass(frozen=True)
class Source:
    """Where an image came from.

    Attributes
    ----------
    name : str
        For people: a path within the folder, or ``image 42``.
    label : int, str or None
        What the data set gave beside the image.
    path : str or None
        The file.
    size : (int, int) or None
        Height and width of the picture in the file.
    box : (int, int, int, int) or None
        Top, left, bottom and right of the part, in its pixels, that became the network's input.
    """

    name: str
    label: int | str | None = None
    path: str | None = None
    size: tuple[int, int] | None = None
    box: tuple[int, int, int, int] | None = None


@dataclass(frozen=True)
class Preprocessing:
    """``(pixels - mean) / std`` for each channel, with pixels in 0 … 255."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(eq=False)
class MinedLayer:
    """The strongest activations of every map of a layer, strongest first.

    ``K`` maps or units; equal values in the order of images, then of positions, row by row.

    Attributes
    ----------
    layer : Layer
        Its line of `DeconvNet.layers`.
    values : float32 (K, top)
        Always positive; 0 where an entry is missing.
    images : int64 (K, top)
        Index in the data set; -1 where missing.
    positions : int64 (K, top, 2) or None
        Row and column in the map; -1 where missing. None for fully connected units, which have none.
    patches : float16 (K, top, C, h, w) or None
        The receptive field of each, in values of the network's input; zero outside the image. None where they were not
        kept (see `mine`): for fully connected units, for example, they are the whole image.
    switches : mapping of str to uint8 (K, top, h, w, C)
        For each pool below, the switches of the window that the activation reaches; 255 outside the map. Empty where
        they were not kept: a projection then needs the images again.
    positive : mapping of str to uint8 (K, top, h, w, ceil(C / 8))
        For each rectified map below or of this layer, the same of ``not map <= 0``, eight channels a byte, the first in
        the lowest bit. Only where a gate asks for it.
    mean, sparsity : float32 (K,)
        Over the images: the mean of the map's maximum, and the fraction of them in which the map is nowhere positive.
    """

    layer: Layer
    values: Tensor
    images: Tensor
    positions: Tensor | None
    patches: Tensor | None
    mean: Tensor
    sparsity: Tensor
    switches: dict[str, Tensor] = field(default_factory=dict)
    positive: dict[str, Tensor] = field(default_factory=dict)

    @property
    def count(self) -> Tensor:
        """int64 (K,): the entries of each map. Fewer than `top`: it was positive in fewer places. 0: it is dead."""
        return (self.images >= 0).sum(1)

    def __repr__(self) -> str:
        maps, top = self.values.shape
        return f"MinedLayer({self.layer.name}: {maps} maps, top {top}; {_dead(self)})"

    def _repr_html_(self) -> str:
        from zfcuda.report import notebook

        return notebook.mined_layer_html(self)


@dataclass(eq=False, repr=False)
class Mined(Mapping[str, MinedLayer]):
    """The strongest activations over a data set: layers by name, and what they were mined from.

    A mapping from the names of layers, or their aliases, to `MinedLayer`.

    Attributes
    ----------
    layers : dict of str to MinedLayer
    images_seen : int
        Images that were run, the skipped ones left out.
    top, per_image, batch_size, input_size, gates
        As given to `mine`.
    skipped : list of Skipped
        In the order of their indices.
    sources : dict of int to Source
        Of every image in the lists, by its index.
    preprocessing : Preprocessing or None
        Where the data set knows it.
    classes : list of str or None
        Names of the labels 0, 1, …, where the data set knows them.
    model : str
        SHA-256 of the model's state dict: projections want the same weights.
    dataset : dict
        What tells the data set from another: number of images, digest of their names, preprocessing; in JSON's types.
    """

    layers: dict[str, MinedLayer]
    images_seen: int
    top: int
    per_image: int | None
    batch_size: int
    input_size: tuple[int, int]
    gates: tuple[str, ...]
    model: str = ""
    skipped: list[Skipped] = field(default_factory=list)
    sources: dict[int, Source] = field(default_factory=dict)
    preprocessing: Preprocessing | None = None
    classes: list[str] | None = None
    dataset: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> MinedLayer:
        if name in self.layers:
            return self.layers[name]
        for mined in self.layers.values():
            if name in mined.layer.aliases:
                return mined
        raise KeyError(f"layer {name!r} was not mined; there are {', '.join(self.layers)}")

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __repr__(self) -> str:
        skipped = f", {len(self.skipped)} skipped" if self.skipped else ""
        lines = (f"  {name}: {len(m.values)} maps of {m.layer.size}; {_dead(m)}" for name, m in self.items())
        return "\n".join([f"Mined(top {self.top} of {self.images_seen} images{skipped})", *lines])

    def _repr_html_(self) -> str:
        from zfcuda.report import notebook

        return notebook.mined_html(self)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the folder, whole or not at all.

        Until the last step, the renaming of ``mined.json``, a folder that was there before stays readable as it was;
        afterwards the tensors of the former ``mined.json`` are deleted.

        Parameters
        ----------
        folder : path
            Made if it does not exist.
        """
        document = {
            "images_seen": self.images_seen,
            "top": self.top,
            "per_image": self.per_image,
            "batch_size": self.batch_size,
            "input_size": self.input_size,
            "gates": self.gates,
            "model": self.model,
            "preprocessing": self.preprocessing and dataclasses.asdict(self.preprocessing),
            "classes": self.classes,
            "dataset": self.dataset,
            "skipped": [dataclasses.asdict(s) for s in self.skipped],
            "sources": {str(i): dataclasses.asdict(s) for i, s in sorted(self.sources.items())},
            "layers": [dataclasses.asdict(m.layer) for m in self.values()],
        }
        write_folder(Path(folder), document, {name: _tensors(m) for name, m in self.items()})

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Mined:
        """Read a folder that `save` wrote; the tensors are mapped from the files, and read when used.

        Raises
        ------
        FileNotFoundError
            If there is no ``mined.json``, or a file that it names is missing.
        RuntimeError
            If a file is damaged, or of another version of the format.
        """
        try:
            document, tensors = read_folder(Path(folder))
            layers = {}
            for line in document["layers"]:
                layer = Layer(**{f.name: _tuples(line[f.name]) for f in dataclasses.fields(Layer)})
                layers[layer.name] = _from_tensors(layer, tensors[layer.name])
            preprocessing = document["preprocessing"]
            return cls(
                layers,
                document["images_seen"],
                document["top"],
                document["per_image"],
                document["batch_size"],
                _tuples(document["input_size"]),
                _tuples(document["gates"]),
                document["model"],
                [Skipped(**s) for s in document["skipped"]],
                {int(i): Source(**{k: _tuples(v) for k, v in s.items()}) for i, s in document["sources"].items()},
                preprocessing and Preprocessing(**{k: _tuples(v) for k, v in preprocessing.items()}),
                document["classes"],
                document["dataset"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(Path(folder) / DOCUMENT, error) from None


def write_folder(folder: Path, document: dict[str, Any], tensors: Tensors) -> None:
    """Write ``document``, whose "layers" tell the name of each, and the tensors of each layer, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    former = _files(folder)
    save = former["save"] + 1
    files = {name: f"{quote(name, safe='')}.{save}.safetensors" for name in tensors}
    for name, file in files.items():
        contents = {key: tensor.contiguous() for key, tensor in tensors[name].items()}
        safetensors.torch.save_file(contents, folder / f"{file}.part")
        _replace(folder / f"{file}.part", folder / file)
    lines = [{"file": files[line["name"]], **line} for line in document["layers"]]
    part = folder / f"{DOCUMENT}.part"
    part.write_text(
        json.dumps({"schema": SCHEMA, "save": save, **document, "layers": lines}, indent=1, allow_nan=False)
    )
    _replace(part, folder / DOCUMENT)
    for file in former["files"]:
        (folder / file).unlink(missing_ok=True)


def read_document(folder: Path) -> dict[str, Any]:
    """The document that `write_folder` wrote."""
    path = folder / DOCUMENT
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {DOCUMENT}; it must be a folder that mining has finished")
    document = _parse(path)
    if document.get("schema") != SCHEMA:
        raise RuntimeError(
            f"{path} has schema {document.get('schema')!r}; this version of zfcuda reads {SCHEMA}: mine again"
        )
    return document


def read_folder(folder: Path) -> tuple[dict[str, Any], Tensors]:
    """The document and the tensors that `write_folder` wrote."""
    document, path = read_document(folder), folder / DOCUMENT
    tensors = {}
    for line in document["layers"]:
        file = folder / line["file"]
        if not file.is_file():
            raise FileNotFoundError(f"{path} names {file.name}, which is missing: copy the whole folder")
        try:
            tensors[line["name"]] = safetensors.torch.load_file(file)
        except safetensors.SafetensorError as error:
            raise _damaged(file, error) from None
    return document, tensors


def _files(folder: Path) -> dict[str, Any]:
    """The number of the last save of a folder, and its files."""
    if not (folder / DOCUMENT).is_file():
        return {"save": 0, "files": []}
    document = _parse(folder / DOCUMENT)
    return {"save": document["save"], "files": [Path(line["file"]).name for line in document["layers"]]}


def _parse(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
    except ValueError as error:
        raise _damaged(path, error) from None
    if not isinstance(document, dict):
        raise _damaged(path, "it is not an object")
    return document


def _damaged(path: Path, error: object) -> RuntimeError:
    return RuntimeError(f"{path} is damaged ({error}); mine again, or restore it from a copy")


def _replace(source: Path, target: Path) -> None:
    """Rename after the bytes are on the disk, so that no crash leaves a name without them."""
    with open(source, "rb") as file:
        os.fsync(file.fileno())
    os.replace(source, target)


def _tensors(mined: MinedLayer) -> dict[str, Tensor]:
    tensors = {name: getattr(mined, name) for name in ("values", "images", "positions", "patches", "mean", "sparsity")}
    for kind in ("switches", "positive"):
        tensors |= {f"{kind}.{name}": tensor for name, tensor in getattr(mined, kind).items()}
    return {name: tensor.cpu() for name, tensor in tensors.items() if tensor is not None}


def _from_tensors(layer: Layer, tensors: dict[str, Tensor]) -> MinedLayer:
    switches, positive = (
        {name.removeprefix(kind): tensor for name, tensor in tensors.items() if name.startswith(kind)}
        for kind in ("switches.", "positive.")
    )
    values, images, mean, sparsity = (tensors[name] for name in ("values", "images", "mean", "sparsity"))
    positions, patches = tensors.get("positions"), tensors.get("patches")
    return MinedLayer(layer, values, images, positions, patches, mean, sparsity, switches, positive)


def _tuples(value: Any) -> Any:
    """JSON has lists only."""
    return tuple(value) if isinstance(value, list) else value


def _dead(mined: MinedLayer) -> str:
    counts = mined.count
    dead, few = int((counts == 0).sum()), int(((counts > 0) & (counts < mined.values.shape[1])).sum())
    return f"{dead} dead, {few} with few entries" if dead or few else "none dead"
