"""How results look in a notebook: small HTML tables, without scripts, in the notebook's own colours."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from zfcuda.report import pictures

if TYPE_CHECKING:
    from zfcuda.deconv import Layer, Mined, MinedLayer
    from zfcuda.deconv.projections import Projections

__all__ = [
    "LAYER_COLUMNS",
    "MINED_COLUMNS",
    "bytes_text",
    "layer_cells",
    "layers_html",
    "mined_cells",
    "mined_html",
    "mined_layer_html",
    "projections_html",
]

LAYER_COLUMNS = ("layer", "kind", "maps", "size", "receptive field", "jump", "map", "switches")
MINED_COLUMNS = ("layer", "maps", "size", "dead", "few entries", "strongest")
SHOWN = 24  # maps of a layer, or projections, in a notebook's cell
CELL = 64  # side of a picture


def layer_cells(layer: Layer) -> tuple[str, ...]:
    """A line of `LAYER_COLUMNS`; empty where nothing is known or there is no such thing."""
    sides = [_size(pair) for pair in (layer.size, layer.receptive_field, layer.jump)]
    maps = "" if layer.channels is None else str(layer.channels)
    return (layer.name, layer.kind, maps, *sides, bytes_text(layer.map_bytes), bytes_text(layer.switch_bytes))


def layers_html(layers: Iterable[Layer]) -> str:
    """The layers of a network, a line each."""
    return _table(LAYER_COLUMNS, [layer_cells(layer) for layer in layers])


def mined_cells(name: str, layer: MinedLayer) -> tuple[str, ...]:
    """A line of `MINED_COLUMNS`."""
    count = layer.count
    dead, few = int((count == 0).sum()), int(((count > 0) & (count < layer.values.shape[1])).sum())
    strongest = f"{float(layer.values.max()):.4g}" if dead < len(count) else ""
    return (name, str(len(count)), _size(layer.layer.size), str(dead), str(few), strongest)


def mined_html(mined: Mined) -> str:
    """What was mined, a line for each layer."""
    skipped = f", {len(mined.skipped)} skipped" if mined.skipped else ""
    title = f"Mined: {mined.top} strongest of every map over {mined.images_seen} images{skipped}"
    return _table(MINED_COLUMNS, [mined_cells(name, layer) for name, layer in mined.items()], title)


def mined_layer_html(mined: MinedLayer) -> str:
    """The first maps of a layer with their statistics and strongest values."""
    maps, top = mined.values.shape
    rows = []
    for unit, count in enumerate(mined.count[:SHOWN].tolist()):
        values = " ".join(f"{v:.3g}" for v in mined.values[unit, :count].tolist())
        mean, silent = float(mined.mean[unit]), float(mined.sparsity[unit])
        rows.append((str(unit), f"{mean:.3g}", f"{silent:.0%}", values or "dead"))
    title = f"{mined.layer.name}: {maps} maps, {top} strongest of each{_rest(maps)}"
    return _table(("map", "mean of maxima", "never positive in", "strongest"), rows, title)


def projections_html(projections: Projections) -> str:
    """The first projections as pictures, each on its own scale, zero as grey."""
    count = len(projections.pixels)
    cells = []
    for pixels, unit, rank in zip(projections.pixels[:SHOWN].cpu(), projections.units, projections.ranks, strict=False):
        picture = pictures.projection(pixels, pictures.white(pixels))
        cells.append(
            f'<figure style="display:inline-block;margin:2px;text-align:center">{_image(picture)}'
            f"<figcaption><small>map {int(unit)}, no. {int(rank) + 1}</small></figcaption></figure>"
        )
    return f"<div><p>{count} projections{_rest(count)}</p>{''.join(cells)}</div>"


def _rest(count: int) -> str:
    return f"; the first {SHOWN} are shown" if count > SHOWN else ""


def _image(picture: np.ndarray) -> str:
    out = io.BytesIO()
    Image.fromarray(pictures.enlarge(picture, CELL)).save(out, "PNG")
    return f'<img alt="projection" src="data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}">'


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> str:
    caption = f"<caption>{escape(title)}</caption>" if title else ""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _size(pair: Sequence[int] | None) -> str:
    if pair is None:
        return ""
    return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]} x {pair[1]}"


def bytes_text(count: int | None) -> str:
    """A number of bytes in words; empty for None."""
    if count is None:
        return ""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}" if size < 100 else f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.3g} GiB"
