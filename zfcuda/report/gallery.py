"""The gallery: every map with its strongest activations, as a folder of static files.

It opens from the disk, needs no server and no network, and may be moved or zipped::

    index.html  gallery.css  gallery.js    the page; what it first shows stands in index.html
    data/sources.js                        names, classes and boxes of the images
    data/<layer>.js                        values, images, positions and statistics of a layer
    sheets/<layer>-projections-<n>.jpg     pictures of a few maps, one beside the other; -patches-, -control-
    sheets/<layer>-overview.jpg            the strongest projection of every map, small
    images/<index>.jpg                     reduced copies of the files of the images in the lists
    images/<index>-input.jpg               what the network saw, of images without a file

Pages that are opened from a disk may neither fetch files nor import modules, so data are scripts that call a function
of the page. Absolute paths of the source images are not in it.
"""

from __future__ import annotations

import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import zfcuda
from zfcuda.deconv.deconvnet import Gate
from zfcuda.deconv.mined import Mined, MinedLayer, Source
from zfcuda.images import eight_bits
from zfcuda.report import pictures
from zfcuda.report.control import Control
from zfcuda.report.folder import check_target, file_name, whole_folder
from zfcuda.report.pictures import Picture
from zfcuda.report.tiles import Painter, Tiles

__all__ = ["gallery"]

MARK = "gallery.json"  # says that a folder is a gallery, which another may replace
SCHEMA = 1

CELL = 160  # longest side of a picture on a sheet, at most
SHEET_PIXELS = 1_500_000  # of a sheet, about: small enough to decode while scrolling
SMALL = 16  # cells up to this size go into PNG sheets: JPEG's blocks of 8 x 8 would show
OVERVIEW = 48  # side of a picture of the overview
SOURCE = 448  # longest side of the copies of the images
JPEG: dict[str, Any] = dict(
    quality=85, subsampling=0
)  # colours of projections are fine-grained, so none are subsampled


#: The path of an image's file, or the image's index where it has none; and the size it had.
File = tuple[str | int, tuple[int, int] | None]


def gallery(
    mined: Mined,
    model: torch.nn.Module,
    folder: str | Path,
    *,
    control: bool = False,
    gate: Gate = "deconvnet",
    dataset: Any = None,
    title: str | None = None,
    progress: bool = True,
) -> Path:
    """Write the gallery of what was mined: for every map its projections beside their patches (Fig. 2).

    Parameters
    ----------
    mined : Mined
        What `zfcuda.deconv.mine` returned, or `Mined.load` read.
    model : torch.nn.Module
        The network that was mined.
    folder : path
        Where to write: new, empty, or an earlier gallery, which is replaced. Written whole or not at all.
    control : bool
        Beside every projection that of the same network with shuffled weights, and how similar the two are; see
        `zfcuda.report.control`.
    gate : {"deconvnet", "backprop", "guided"}
        As in `DeconvNet.project`.
    dataset : map-style dataset, optional
        The one that was mined. Needed for layers whose patches or switches were not kept (fully connected ones). With
        it images without a file are shown, and the control runs each image in the lists once through the shuffled
        network, where without it there is no forward pass.
    title : str, optional
        Heading of the page; default the name of the model's class.
    progress : bool
        Bars with the time left, if a terminal or a notebook watches.

    Returns
    -------
    Path
        Of ``index.html``.

    Raises
    ------
    FileExistsError
        If ``folder`` holds anything but a gallery.
    TypeError, ValueError, RuntimeError
        If ``mined``, ``model`` and ``dataset`` do not belong together.
    """
    folder = Path(folder).absolute()
    check_target(folder, MARK)
    painter = Painter(mined, model, gate, dataset)
    against = Control(mined, model, gate, dataset) if control else None
    with whole_folder(folder) as part, _bar(progress) as bar:
        for name in ("data", "sheets", "images"):
            (part / name).mkdir()
        writer = _Writer(part, painter, against, bar)
        layers = [writer.layer(number, name) for number, name in enumerate(mined)]
        sources = writer.sources()
        _script(part / "data/sources.js", "sources", sources)
        summary = {
            "schema": SCHEMA,
            "title": title or type(model).__name__,
            "version": zfcuda.__version__,
            "images": mined.images_seen,
            "skipped": len(mined.skipped),
            "input": list(mined.input_size),
            "top": mined.top,
            "per_image": mined.per_image,
            "gate": gate,
            "control": None if against is None else "own" if dataset is not None else "recorded",
            "classes": sorted({source["label"] for source in sources.values() if source["label"] is not None}),
            "filters": writer.filters(),
            "layers": layers,
        }
        _page(part, summary)
    return folder / "index.html"


@dataclass(frozen=True)
class Sheets:
    """How the pictures of a layer lie on its sheets: in blocks of ``across`` by ``across`` cells, a block a map.

    A cell starts at multiples of ``pitch``, its size rounded up to blocks of JPEG so that neighbours do not meet in
    one; the rest repeats its edge.
    """

    cell: tuple[int, int]
    across: int
    maps: int

    @property
    def pitch(self) -> tuple[int, int]:
        return (-(-self.cell[0] // 8) * 8, -(-self.cell[1] // 8) * 8)

    @property
    def per_sheet(self) -> int:
        """Maps on a sheet."""
        block = self.across**2 * self.pitch[0] * self.pitch[1]
        return max(1, min(SHEET_PIXELS // block, self.maps))

    @property
    def columns(self) -> int:
        """Blocks in a row."""
        return math.ceil(math.sqrt(self.per_sheet))

    @property
    def suffix(self) -> str:
        return "png" if max(self.cell) <= SMALL else "jpg"

    def size(self) -> tuple[int, int]:
        rows = -(-self.per_sheet // self.columns)
        return rows * self.across * self.pitch[0], self.columns * self.across * self.pitch[1]

    def paint(self, tiles: NDArray[np.uint8], units: NDArray[Any], ranks: NDArray[Any]) -> Picture:
        """The sheet of these tiles (n, h, w, 3); the place of a missing one is grey."""
        sheet = np.full((*self.size(), 3), pictures.GREY, np.uint8)
        (height, width), (down, right) = self.cell, self.pitch
        for tile, unit, rank in zip(tiles, units % self.per_sheet, ranks, strict=True):
            y = (unit // self.columns * self.across + rank // self.across) * down
            x = (unit % self.columns * self.across + rank % self.across) * right
            edges = ((0, down - height), (0, right - width), (0, 0))
            sheet[y : y + down, x : x + right] = np.pad(_resized(tile, self.cell), edges, mode="edge")
        return sheet


class _Writer:
    """Writes the parts of one gallery."""

    def __init__(self, folder: Path, painter: Painter, control: Control | None, bar: Progress) -> None:
        self.folder, self.painter, self.control, self.bar = folder, painter, control, bar
        self.mined = painter.mined
        maps = sum(len(layer.values) for layer in self.mined.values())
        self.maps_done = bar.add_task("Projections", total=maps)
        self.images = [(i, self.mined.sources.get(i, Source(f"image {i}"))) for i in self._in_lists()]
        self.files = {_file(image, source): image for image, source in reversed(self.images)}
        self.images_done = bar.add_task("Images", total=len(self.files))

    def layer(self, number: int, name: str) -> dict[str, Any]:
        """Sheets and data of a layer; returns what the page's summary says of it."""
        mined = self.mined[name]
        slug = file_name(number, name)
        sheets = Sheets(self._cell(mined), math.ceil(math.sqrt(self.mined.top)), len(mined.values))
        overview = _Overview(len(mined.values), sheets.cell)
        similar: dict[tuple[int, int], float] = {}
        for sheet, units in enumerate(_chunks(len(mined.values), sheets.per_sheet)):
            tiles = self.painter.tiles(name, units)
            self._save(f"{slug}-projections-{sheet}", sheets, tiles, tiles.projections)
            self._save(f"{slug}-patches-{sheet}", sheets, tiles, tiles.patches)
            if self.control is not None:
                random = self.control.pixels(name, tiles)
                self._save(f"{slug}-control-{sheet}", sheets, tiles, pictures.projections(random))
                entries = zip(tiles.units.tolist(), tiles.ranks.tolist(), strict=True)
                similar |= dict(zip(entries, self.control.similarities(tiles, random), strict=True))
            overview.add(tiles)
            self.bar.advance(self.maps_done, len(units))
        _save(overview.picture, self.folder / f"sheets/{slug}-overview.jpg")
        _script(self.folder / f"data/{slug}.js", name, _layer_data(mined, similar))
        return self._summary(name, slug, mined, sheets, overview, similar)

    def sources(self) -> dict[str, Any]:
        """Copies of the images in the lists, one of each file; returns what the page says of each image."""
        with ThreadPoolExecutor() as pool:
            copies = dict(zip(self.files, pool.map(self._copy, self.files, self.files.values()), strict=True))
        return {str(image): self._source(image, source, copies[_file(image, source)]) for image, source in self.images}

    def filters(self) -> dict[str, Any] | None:
        """The filters of the first layer, where it is a convolution of an image; None elsewhere."""
        first = self.painter.deconvnet.layers[0]
        weight = dict(self.painter.deconvnet.model.named_parameters()).get(f"{first.name}.weight")
        if weight is None or weight.dim() != 4 or weight.shape[1] not in (1, 3):
            return None
        shown = [pictures.projection(f, pictures.white(f)) for f in weight.detach().float().cpu().numpy()]
        columns = math.ceil(math.sqrt(len(shown)))
        _save(pictures.grid(shown, columns, gap=0), self.folder / "sheets/filters.png")
        return {
            "layer": first.name,
            "count": len(shown),
            "columns": columns,
            "cell": list(shown[0].shape[:2]),
            "src": "sheets/filters.png",
        }

    def _cell(self, mined: MinedLayer) -> tuple[int, int]:
        size = mined.layer.receptive_field or self.mined.input_size
        if mined.positions is None:
            size = self.mined.input_size
        ratio = min(1.0, CELL / max(size))
        return max(1, round(size[0] * ratio)), max(1, round(size[1] * ratio))

    def _save(self, name: str, sheets: Sheets, tiles: Tiles, shown: NDArray[np.uint8]) -> None:
        _save(sheets.paint(shown, tiles.units, tiles.ranks), self.folder / f"sheets/{name}.{sheets.suffix}")

    def _summary(
        self,
        name: str,
        slug: str,
        mined: MinedLayer,
        sheets: Sheets,
        overview: _Overview,
        similar: dict[tuple[int, int], float],
    ) -> dict[str, Any]:
        count, line = mined.count, mined.layer
        compared = [value for value in similar.values() if not math.isnan(value)]
        return {
            "name": name,
            "slug": slug,
            "kind": line.kind,
            "count": len(count),
            "dead": int((count == 0).sum()),
            "few": int(((count > 0) & (count < self.mined.top)).sum()),
            "size": line.size,
            "field": None if mined.positions is None else line.receptive_field,
            "jump": line.jump,
            "start": line.start,
            "sparsity": _short(float(mined.sparsity.mean())),
            "similarity": _short(float(np.median(compared))) if compared else None,
            "cell": sheets.cell,
            "pitch": sheets.pitch,
            "across": sheets.across,
            "columns": sheets.columns,
            "perSheet": sheets.per_sheet,
            "sheet": sheets.size(),
            "suffix": sheets.suffix,
            "overview": {
                "src": f"sheets/{slug}-overview.jpg",
                "columns": overview.columns,
                "cell": overview.cell,
            },
        }

    def _in_lists(self) -> list[int]:
        lists = [layer.images for layer in self.mined.values()]
        return sorted({int(i) for images in lists for i in images[images >= 0].unique()})

    def _source(self, image: int, source: Source, copied: str | None) -> dict[str, Any]:
        """What the page says of an image: `file`, a copy to open; `shown`, the picture that boxes are drawn on."""
        label = source.label
        if isinstance(label, int) and self.mined.classes is not None:
            label = self.mined.classes[label]
        # Without the part of the file that became the input, boxes are known in the input only.
        whole = copied is not None and source.box is not None
        shown = copied if whole else None
        if not whole and self.painter.dataset is not None:
            shown = f"images/{image}-input.jpg"
            _save(self.painter.picture(image), self.folder / shown)
        return {
            "name": source.name,
            "label": None if label is None else str(label),
            "file": copied or shown,
            "shown": shown,
            "size": source.size if whole else None,
            "box": source.box if whole else None,
        }

    def _copy(self, file: File, image: int) -> str | None:
        """A reduced copy of a file, named by its first image; None where there is none, or it is not as it was."""
        self.bar.advance(self.images_done)
        path, size = file
        name = f"images/{image}.jpg"
        try:
            if not isinstance(path, str):
                return None
            _reduced(path, size).save(self.folder / name, quality=85)
        except (OSError, ValueError, Image.DecompressionBombError):
            return None
        return name


class _Overview:
    """The strongest projection of every map of a layer, small."""

    def __init__(self, maps: int, cell: tuple[int, int]) -> None:
        ratio = OVERVIEW / max(cell)
        self.cell = max(8, round(cell[0] * ratio)), max(8, round(cell[1] * ratio))
        self.columns = math.ceil(math.sqrt(maps))
        rows = -(-maps // self.columns)
        self.picture = np.full((rows * self.cell[0], self.columns * self.cell[1], 3), pictures.GREY, np.uint8)

    def add(self, tiles: Tiles) -> None:
        height, width = self.cell
        for unit, tile in zip(tiles.units[tiles.ranks == 0], tiles.projections[tiles.ranks == 0], strict=True):
            y, x = unit // self.columns * height, unit % self.columns * width
            self.picture[y : y + height, x : x + width] = _resized(tile, self.cell)


def _layer_data(mined: MinedLayer, similar: dict[tuple[int, int], float]) -> dict[str, Any]:
    """The numbers of a layer, a row a map; rows are as long as the map has entries."""
    counts = mined.count.tolist()

    def rows(tensor: torch.Tensor) -> list[list[Any]]:
        return [row[:count] for row, count in zip(tensor.tolist(), counts, strict=True)]

    return {
        "values": [[_short(value) for value in row] for row in rows(mined.values)],
        "images": rows(mined.images),
        "positions": None if mined.positions is None else rows(mined.positions),
        "mean": [_short(value) for value in mined.mean.tolist()],
        "sparsity": [_short(value) for value in mined.sparsity.tolist()],
        "similarity": [[_short(similar[u, r]) for r in range(n)] for u, n in enumerate(counts)] if similar else None,
    }


def _file(image: int, source: Source) -> File:
    return source.path or image, source.size


def _reduced(path: str, size: tuple[int, int] | None) -> Image.Image:
    """The picture of a file, upright, at most `SOURCE` pixels wide and high."""
    with Image.open(path) as file:
        upright = ImageOps.exif_transpose(file)
        if size not in (None, (upright.height, upright.width)):
            raise OSError(f"{path} had size {size}")
        shown = eight_bits(upright).convert("RGB")
        shown.thumbnail((SOURCE, SOURCE))
        return shown


def _resized(picture: Picture, size: tuple[int, int]) -> Picture:
    if picture.shape[:2] == size:
        return picture
    return np.asarray(Image.fromarray(picture).resize((size[1], size[0]), Image.Resampling.BOX))


def _save(picture: Picture, path: Path) -> None:
    options = JPEG if path.suffix == ".jpg" else dict(compress_level=6)
    Image.fromarray(picture).save(path, **options)


def _chunks(count: int, size: int) -> list[range]:
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def _short(value: float) -> float | None:
    """Four significant digits; JSON has no NaN."""
    return None if math.isnan(value) else float(f"{value:.4g}")


def _script(path: Path, name: str, data: Any) -> None:
    path.write_text(f"zfcuda.receive({_json(name)}, {_json(data)});\n", encoding="utf-8")


def _json(data: Any) -> str:
    """JSON that may stand within a script of a page, whatever the names in it."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _page(folder: Path, summary: dict[str, Any]) -> None:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("zfcuda.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("gallery.html.j2").render(summary, summary=_json(summary), whole=_whole)
    (folder / "index.html").write_text(html, encoding="utf-8")
    templates = Path(__file__).parent / "templates"
    for name in ("gallery.css", "gallery.js"):
        shutil.copyfile(templates / name, folder / name)
    (folder / MARK).write_text(json.dumps({"schema": SCHEMA, "zfcuda": zfcuda.__version__}), encoding="utf-8")


def _whole(number: int) -> str:
    """Thousands apart, for people."""
    return f"{number:,}"


def _bar(progress: bool) -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not (progress and (console.is_terminal or console.is_jupyter)),
    )
