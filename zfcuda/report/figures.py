"""The paper's Fig. 2 as a figure for papers: PNG, or PDF with text as text.

Pictures are embedded pixel by pixel; labels are vectors. Figures are made without pyplot: nothing global changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure

from zfcuda.deconv.deconvnet import Gate
from zfcuda.deconv.mined import Mined
from zfcuda.report import pictures
from zfcuda.report.pictures import Picture
from zfcuda.report.tiles import Painter

__all__ = ["book", "fig2", "save"]

WIDTH = 7.0  # inches: across both columns of most journals
COLUMNS = 4  # blocks in a row, on either side
PAGE = 24  # maps on a page of a book
DPI = 300
FORMATS = (".pdf", ".png", ".svg")


def fig2(
    mined: Mined,
    model: torch.nn.Module,
    layer: str,
    units: Sequence[int] | None = None,
    *,
    gate: Gate = "deconvnet",
    dataset: Any = None,
) -> Figure:
    """Maps of a layer as in the paper's Fig. 2: blocks of projections on the left, of the patches on the right.

    Parameters
    ----------
    mined : Mined
    model : torch.nn.Module
        The network that was mined.
    layer : str
    units : sequence of int, optional
        Which maps; default all of them.
    gate, dataset
        As in `zfcuda.report.gallery.gallery`.

    Returns
    -------
    matplotlib.figure.Figure
        Save it with `save`.

    Raises
    ------
    KeyError
        For a layer that was not mined.
    IndexError
        For a map that the layer does not have.
    ValueError
        If ``units`` is empty.
    """
    painter = Painter(mined, model, gate, dataset)
    return _figure(painter, layer, _checked(mined, layer, units))


def book(
    mined: Mined, model: torch.nn.Module, layer: str, path: str | Path, *, gate: Gate = "deconvnet", dataset: Any = None
) -> Path:
    """All maps of a layer as a PDF of many pages; see `fig2` for the arguments. Written whole or not at all."""
    path = Path(path)
    if path.suffix != ".pdf":
        raise ValueError(f"path is {str(path)!r}; a book of many pages must end in .pdf")
    painter = Painter(mined, model, gate, dataset)
    units = _checked(mined, layer, None)
    part = path.with_name(f".part-{path.name}")
    try:
        with matplotlib.rc_context({"pdf.fonttype": 42}), PdfPages(part) as pages:
            for start in range(0, len(units), PAGE):
                pages.savefig(_figure(painter, layer, units[start : start + PAGE]), dpi=DPI)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure as .pdf or .svg, with text as text, or as .png at 300 dots an inch; whole or not at all."""
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ValueError(f"path is {str(path)!r}; it must end in one of {', '.join(FORMATS)}")
    part = path.with_name(f".part-{path.name}")
    try:
        with matplotlib.rc_context({"pdf.fonttype": 42, "svg.fonttype": "none"}):
            figure.savefig(part, dpi=DPI)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _checked(mined: Mined, layer: str, units: Sequence[int] | None) -> list[int]:
    count = len(mined[layer].values)
    chosen = list(range(count) if units is None else units)
    if not chosen:
        raise ValueError("units is empty; name at least one map")
    for unit in chosen:
        if not 0 <= unit < count:
            raise IndexError(f"units has {unit}; layer {layer!r} has maps 0 to {count - 1}")
    return chosen


def _figure(painter: Painter, layer: str, units: list[int]) -> Figure:
    tiles = painter.tiles(layer, units)
    rows = math.ceil(len(units) / COLUMNS)
    gap, label, head = 0.08, 0.16, 0.42  # inches
    side = (WIDTH - gap * (2 * COLUMNS + 3)) / (2 * COLUMNS)  # of a block
    height = head + rows * (side + label) + gap
    figure = Figure(figsize=(WIDTH, height))
    middle = WIDTH / 2 + gap / 2

    def write(x: float, y: float, text: str, **style: Any) -> None:
        figure.text(x / WIDTH, y / height, text, **style)

    write(gap, height - 0.18, f"{layer}: projections", fontsize=9, va="center")
    write(middle + gap, height - 0.18, "patches", fontsize=9, va="center")
    for i, unit in enumerate(units):
        row, column = divmod(i, COLUMNS)
        bottom = height - head - (row + 1) * (side + label) + label
        mine = tiles.units == unit
        for start, shown in ((0.0, tiles.projections), (middle, tiles.patches)):
            left = start + gap + column * (side + gap)
            axes = figure.add_axes((left / WIDTH, bottom / height, side / WIDTH, side / height))
            _block(axes, list(shown[mine]), painter.mined.top)
            write(left, bottom + side + 0.03, str(unit), fontsize=6, va="bottom")
    return figure


def _block(axes: Axes, shown: list[Picture], top: int) -> None:
    axes.set_axis_off()
    if not shown:
        axes.text(0.5, 0.5, "dead", fontsize=6, color="0.4", ha="center", va="center")
        return
    across = math.ceil(math.sqrt(top))
    empty = [0 * shown[0] + 255] * (top - len(shown))
    gap = max(1, max(shown[0].shape) // 30)
    axes.imshow(pictures.grid([*shown, *empty], across, gap), interpolation="nearest")
