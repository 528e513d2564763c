"""Results as tables for the terminal, and as plain facts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from zfcuda.deconv.mined import Skipped
from zfcuda.jobs import GalleryResult, LayersResult, MineResult, ProjectResult
from zfcuda.models import LoadedModel
from zfcuda.report.notebook import LAYER_COLUMNS, MINED_COLUMNS, layer_cells, mined_cells

SHOWN = 20  # images that could not be read


def of_model(loaded: LoadedModel) -> str:
    """What is looked at: the network, where its weights are from, and what images go through."""
    height, width = loaded.input_size
    if loaded.normalise is not None:
        prepared = "less their mean colour, at unit contrast"
    else:
        prepared = f"(pixels - {_numbers(loaded.mean)}) / {_numbers(loaded.std)}"
    lines = [f"[bold]{escape(loaded.name)}[/]: weights {escape(loaded.weights)}; images {height} x {width}, {prepared}"]
    if loaded.random:
        lines.append(
            "[yellow]! The weights are random:[/] pictures show an untrained network. Give trained ones with --weights"
        )
    return "\n".join(lines)


def _numbers(values: Sequence[float]) -> str:
    """One number where they are all equal."""
    return " ".join(f"{v:g}" for v in (values if len(set(values)) > 1 else values[:1]))


def of_layers(result: LayersResult) -> list[Any]:
    return [of_model(result.loaded), _table(LAYER_COLUMNS, map(layer_cells, result.layers), left=2)]


def of_mined(result: MineResult | GalleryResult) -> list[Any]:
    mined = result.mined
    table = _table(MINED_COLUMNS, [mined_cells(name, layer) for name, layer in mined.items()])
    return [
        of_model(result.loaded),
        table,
        *of_skipped(mined.skipped),
        f"{mined.images_seen} images; the lists: {escape(str(result.folder))}",
    ]


def of_skipped(skipped: Sequence[Skipped]) -> list[str]:
    """The first images that could not be read, and why."""
    if not skipped:
        return []
    more = [f"  and {len(skipped) - SHOWN} more"] if len(skipped) > SHOWN else []
    lines = [f"  {escape(s.name)}: {escape(s.reason)}" for s in skipped[:SHOWN]]
    return [f"[yellow]! Images that could not be read: {len(skipped)}[/]", *lines, *more]


def skipped_facts(skipped: Sequence[Skipped]) -> list[dict[str, Any]]:
    return [{"index": s.index, "name": s.name, "reason": s.reason} for s in skipped]


def mined_facts(result: MineResult | GalleryResult) -> dict[str, Any]:
    mined = result.mined
    return {
        "folder": result.folder,
        "images_seen": mined.images_seen,
        "skipped": skipped_facts(mined.skipped),
        "layers": [
            {"name": name, "maps": len(layer.values), "dead": int((layer.count == 0).sum())}
            for name, layer in mined.items()
        ],
    }


def of_projected(result: ProjectResult) -> list[Any]:
    columns = ("picture", "image", "unit", "activation", "row, column", "top left bottom right")
    rows = []
    for row in result.rows:
        place = "" if row.position is None else f"{row.position[0]}, {row.position[1]}"
        box = " ".join(map(str, row.box))
        rows.append((str(row.file), row.image, str(row.unit), f"{row.value:.4g}", place, box))
    return [of_model(result.loaded), _table(columns, rows, left=2), *of_skipped(result.skipped)]


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> Table:
    """A table whose first column is never cut; the first ``left`` columns are text, the others numbers."""
    table = Table(box=None)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < left else "right", no_wrap=number == 0)
    for row in rows:
        table.add_row(*map(escape, row))
    return table
