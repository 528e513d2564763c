"""What mining found, and its projections, as plain arrays: ``.npz`` files and one JSON; docs/schema.md describes them.

Numpy and a JSON parser are enough to read them.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

import zfcuda
from zfcuda.deconv.deconvnet import Gate
from zfcuda.deconv.mined import Mined
from zfcuda.report.folder import check_target, file_name, whole_folder
from zfcuda.report.tiles import Painter

__all__ = ["export"]

DOCUMENT = "export.json"
SCHEMA = 1
MAPS = 16  # projected together


def export(
    mined: Mined, model: torch.nn.Module, folder: str | Path, *, gate: Gate = "deconvnet", dataset: Any = None
) -> Path:
    """Write lists, statistics, patches and projections as arrays.

    Parameters
    ----------
    mined, model, gate, dataset
        As in `zfcuda.report.gallery.gallery`.
    folder : path
        New, empty, or an earlier export, which is replaced. Written whole or not at all.

    Returns
    -------
    Path
        Of ``export.json``.

    Raises
    ------
    FileExistsError
        If ``folder`` holds anything but an export.
    TypeError, ValueError, RuntimeError
        If ``mined``, ``model`` and ``dataset`` do not belong together.
    """
    folder = Path(folder).absolute()
    check_target(folder, DOCUMENT)
    painter = Painter(mined, model, gate, dataset)
    with whole_folder(folder) as part:
        layers = []
        for number, (name, layer) in enumerate(mined.items()):
            file = f"{file_name(number, name)}.npz"
            np.savez(part / file, **_arrays(painter, name))
            layers.append({"file": file, **dataclasses.asdict(layer.layer)})
        document = {
            "schema": SCHEMA,
            "zfcuda": zfcuda.__version__,
            "gate": gate,
            "images_seen": mined.images_seen,
            "top": mined.top,
            "input_size": mined.input_size,
            "preprocessing": mined.preprocessing and dataclasses.asdict(mined.preprocessing),
            "classes": mined.classes,
            "sources": {str(image): dataclasses.asdict(source) for image, source in sorted(mined.sources.items())},
            "layers": layers,
        }
        (part / DOCUMENT).write_text(json.dumps(document, indent=1, allow_nan=False), encoding="utf-8")
    return folder / DOCUMENT


def _arrays(painter: Painter, name: str) -> dict[str, Any]:
    """The arrays of a layer; what is missing from a list is zero, or -1 where it is an index."""
    mined = painter.mined[name]
    maps, top = mined.values.shape
    arrays: dict[str, Any] = {
        "values": mined.values.numpy(),
        "images": mined.images.numpy(),
        "mean": mined.mean.numpy(),
        "sparsity": mined.sparsity.numpy(),
        "boxes": np.full((maps, top, 4), -1, np.int64),
    }
    if mined.positions is not None:
        arrays["positions"] = mined.positions.numpy()
    for start in range(0, maps, MAPS):
        tiles = painter.tiles(name, range(start, min(start + MAPS, maps)))
        if "projections" not in arrays:
            arrays["projections"] = np.zeros((maps, top, *tiles.pixels.shape[1:]), np.float16)
            arrays["patches"] = np.zeros((maps, top, *tiles.values.shape[1:]), np.float16)
        arrays["boxes"][tiles.units, tiles.ranks] = tiles.boxes
        arrays["projections"][tiles.units, tiles.ranks] = tiles.pixels
        arrays["patches"][tiles.units, tiles.ranks] = tiles.values
    return arrays
