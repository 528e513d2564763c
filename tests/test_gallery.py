"""The gallery in a browser: what a reader sees, clicks and types; and what is written, or not.

Every page is watched: nothing may appear in the console, and no request may leave the gallery's folder.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote, unquote, urlparse

import browsers
import galleries
import numpy as np
import pytest
import torch
from galleries import AWKWARD, CLASSES, DEAD, FEW, FEW_COUNT, LAYERS, NAMES
from PIL import Image

from zfcuda.deconv import DeconvNet
from zfcuda.deconv.mined import Mined, MinedLayer, Source
from zfcuda.models import zfnet
from zfcuda.report import pictures
from zfcuda.report.gallery import gallery
from zfcuda.report.tiles import Painter


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with browsers.chromium() as running:
        yield running


class Reader:
    """A page of one gallery, with what it said and asked for."""

    def __init__(self, browser, folder: Path, **options) -> None:
        self.folder = folder
        self.context = browser.new_context(**{"viewport": {"width": 1300, "height": 850}, **options})
        self.page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        watched = browsers.watch(self.page)
        self.said: list[str] = watched.said
        self.asked: list[str] = watched.asked

    def open(self, address: str = ""):
        self.page.goto((self.folder / "index.html").as_uri() + address)
        return self.page

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def cards(self) -> list[str]:
        """What the cards in the document are, in their order: ``conv1 3``."""
        labels = self.page.locator(".card").evaluate_all("cards => cards.map((card) => card.ariaLabel)")
        return [re.match(r"(.*) map (\d+),", label).expand(r"\1 \2") for label in labels]

    def until(self, expression: str, argument=None) -> None:
        self.page.wait_for_function(expression, arg=argument)

    def settle(self, count: int) -> list[str]:
        """The cards, once there are so many."""
        self.until("count => document.querySelectorAll('.card').length === count", count)
        return self.cards()

    def check(self) -> None:
        assert self.said == []
        for url in self.asked:
            if url.startswith("data:"):
                continue
            parts = urlparse(url)
            path = Path(unquote(parts.path))
            assert parts.scheme == "file" and self.folder in path.parents and path.is_file(), url


@pytest.fixture
def read(browser, shelf) -> Iterator:
    """``read(options)`` gives a reader of the small gallery; at the end its console and requests are checked."""
    readers: list[Reader] = []

    def new(folder: Path | None = None, **options) -> Reader:
        readers.append(Reader(browser, folder or shelf.folder, **options))
        return readers[-1]

    yield new
    for reader in readers:
        reader.context.close()
        reader.check()


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> SimpleNamespace:
    """A small gallery with its control, and all that it was made from."""
    folder = tmp_path_factory.mktemp("shelf")
    (folder / "files").mkdir()
    model, images, mined = galleries.small(folder / "files")
    index = gallery(mined, model, folder / "a gallery #1", control=True, dataset=images, title="<b>It</b> & co",
                    progress=False)  # fmt: skip
    return SimpleNamespace(model=model, images=images, mined=mined, folder=index.parent, painter=Painter(mined, model))


def address(layer: str, *rest: int) -> str:
    return "#" + "/".join([quote(layer, safe=""), *map(str, rest)])


def names(mined: Mined, layer: str, unit: int) -> set[str]:
    return {mined.sources[i].name for i in mined[layer].images[unit].tolist() if i >= 0}


def labels(mined: Mined, layer: str, unit: int) -> set[str]:
    return {CLASSES[mined.sources[i].label] for i in mined[layer].images[unit].tolist() if i >= 0}


# What is shown


def test_the_overview_names_every_layer_and_its_dead(read):
    page = read().open()
    assert page.locator("h1").first.inner_text() == "<b>It</b> & co" and page.title() == "<b>It</b> & co"
    assert page.locator(".row h2 a").all_inner_texts() == list(LAYERS)
    assert page.locator(".row", has_text=AWKWARD).locator("a", has_text="1 dead").count() == 1
    reader = page.locator("canvas")
    assert reader.count() == len(LAYERS) + 1  # and the filters


def test_a_click_on_the_overview_opens_that_map(read, shelf):
    reader = read()
    page = reader.open()
    plate = page.locator("[data-overview='0']")
    reader.until("() => document.querySelector(\"[data-overview='0']\").clientHeight > 30")
    plate.click(position={"x": 160, "y": 20})  # seven cells of 62.5 pixels, with gaps of 2
    page.locator("#map[open]").wait_for()
    assert page.locator("#map-title").inner_text() == "conv1 2"
    reader.press("Escape")
    page.locator("#home").wait_for()


@pytest.mark.parametrize("layer", LAYERS)
def test_every_map_of_a_layer_is_there_with_its_nine_and_nine(read, shelf, layer):
    reader = read()
    page = reader.open(address(layer))
    count = len(shelf.mined[layer].values)
    assert reader.settle(count) == [f"{layer} {unit}" for unit in range(count)]
    for unit, card in enumerate(page.locator(".card").all()):
        entries = int(shelf.mined[layer].count[unit])
        assert card.locator(".cell:not(.none)").count() == 2 * entries
        assert card.locator(".block").count() == (2 if entries else 0)
    if layer == AWKWARD:
        assert "dead" in page.locator(".card").nth(DEAD).inner_text()
        assert f"{FEW_COUNT} only" in page.locator(".card").nth(FEW).inner_text()


def shown(page, locator) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(locator.screenshot(animations="disabled"))).convert("RGB"), float)


@pytest.mark.parametrize(
    ("layer", "unit", "rank"), [("conv1", 0, 0), (AWKWARD, FEW, 3), (AWKWARD, 11, 8), ("conv3", 4, 4)]
)
def test_a_cell_shows_its_own_picture(read, shelf, layer, unit, rank):
    """Every other picture of the layer is less like what is on the screen."""
    reader = read()
    page = reader.open(address(layer, unit))
    page.locator("#map[open]").wait_for()
    page.wait_for_load_state("networkidle")
    tiles = shelf.painter.tiles(layer, range(len(shelf.mined[layer].values)))
    for kind, tiled in (("Projections", tiles.projections), ("Patches", tiles.patches)):
        cell = page.locator(f"#blocks .block[aria-label^='{kind}'] .cell").nth(rank)
        # The first chosen cell wears a frame, within which everything is the picture.
        seen = shown(page, cell)[4:-4, 4:-4]
        size = seen.shape[1] + 8, seen.shape[0] + 8
        way = Image.Resampling.NEAREST if tiled.shape[1] < 40 else Image.Resampling.BILINEAR
        resized = [np.asarray(Image.fromarray(tile).resize(size, way), float)[4:-4, 4:-4] for tile in tiled]
        errors = np.array([np.abs(r - seen).mean() for r in resized])
        at = int(np.flatnonzero((tiles.units == unit) & (tiles.ranks == rank))[0])
        assert errors[at] < 12
        assert all(error > errors[at] or (tile == tiled[at]).all() for error, tile in zip(errors, tiled, strict=True))


def test_the_statistics_are_those_of_mining(read, shelf):
    page = read().open(address(AWKWARD, FEW))
    page.locator("#map[open]").wait_for()
    mined = shelf.mined[AWKWARD]
    facts = page.locator("#map-facts").inner_text()
    assert float(re.search(r"mean ([\d.e-]+)", facts)[1]) == pytest.approx(float(mined.mean[FEW]), rel=6e-3)
    active = float(re.search(r"active in ([\d.]+) %", facts)[1])
    assert active == pytest.approx(100 * (1 - float(mined.sparsity[FEW])), rel=6e-3)
    assert f"positive in {FEW_COUNT} places only" in facts
    listed = [float(text) for text in page.locator("#entries .value").all_inner_texts()]
    np.testing.assert_allclose(listed, mined.values[FEW, :FEW_COUNT], rtol=6e-3)


def test_a_dead_map_says_so_and_has_no_pictures(read):
    page = read().open(address(AWKWARD, DEAD))
    page.locator("#map[open]").wait_for()
    assert "dead" in page.locator("#map-facts").inner_text()
    assert page.locator("#map .cell").count() == 0 and page.locator("#source").is_hidden()


@pytest.mark.parametrize("rank", [0, 5])
def test_the_box_lies_where_the_activation_was_found(read, shelf, rank):
    reader = read()
    page = reader.open(address("conv3", 2, rank + 1))
    page.locator("#map[open]").wait_for()
    mined = shelf.mined["conv3"]
    source = shelf.mined.sources[int(mined.images[2, rank])]
    box = DeconvNet(shelf.model).box("conv3", mined.positions[2, rank].tolist()).clip(galleries.SIZE, galleries.SIZE)
    top, left, bottom, _ = source.box
    scale = (bottom - top) / galleries.SIZE
    expected = np.array(
        [top + box.top * scale, left + box.left * scale, top + box.bottom * scale, left + box.right * scale]
    )

    def measured(selector: str) -> np.ndarray:
        """In pixels of the source image."""
        image, place = page.locator("#canvas img").bounding_box(), page.locator(selector).bounding_box()
        ratio = source.size[1] / image["width"]
        y, x = (place["y"] - image["y"]) * ratio, (place["x"] - image["x"]) * ratio
        return np.array([y, x, y + place["height"] * ratio, x + place["width"] * ratio])

    np.testing.assert_allclose(measured("#canvas .box"), expected, atol=0.3)
    np.testing.assert_allclose(measured("#canvas .field"), source.box, atol=0.3)
    caption = page.locator("#caption").inner_text()
    assert source.name in caption and CLASSES[source.label] in caption
    rounded = [int(np.floor(side + 0.5)) for side in expected]
    assert f"rows {rounded[0]} to {rounded[2]}, columns {rounded[1]} to {rounded[3]}" in caption
    assert f"rows {box.top} to {box.bottom}, columns {box.left} to {box.right}" in caption
    before = page.locator("#canvas .box").bounding_box()
    reader.press("z")
    reader.until("() => document.getElementById('canvas').getAnimations().length === 0")
    after = page.locator("#canvas .box").bounding_box()
    assert after["width"] > 1.3 * before["width"]
    np.testing.assert_allclose(measured("#canvas .box"), expected, atol=0.3)
    reader.press("0")
    reader.until("() => document.getElementById('canvas').getAnimations().length === 0")
    assert page.locator("#canvas .box").bounding_box() == before


def test_the_wheel_zooms_about_the_pointer_and_dragging_moves(read):
    reader = read()
    page = reader.open(address("conv3", 1))
    stage = page.locator("#stage")
    stage.wait_for()
    place = stage.bounding_box()
    x, y = place["x"] + 0.25 * place["width"], place["y"] + 0.5 * place["height"]
    page.mouse.move(x, y)
    page.mouse.wheel(0, -300)
    still = "() => document.getElementById('canvas').getAnimations().length === 0 && "
    reader.until(still + "new DOMMatrix(getComputedStyle(document.getElementById('canvas')).transform).a > 2.6")
    seen = page.locator("#canvas").bounding_box()
    assert (x - seen["x"]) / seen["width"] == pytest.approx(0.25, abs=0.01)
    page.mouse.down()
    page.mouse.move(x + 40, y - 30, steps=4)
    page.mouse.up()
    moved = page.locator("#canvas").bounding_box()
    assert moved["x"] - seen["x"] == pytest.approx(40, abs=1) and moved["y"] - seen["y"] == pytest.approx(-30, abs=1)


def test_the_projection_in_its_place_covers_its_box(read, shelf):
    reader = read()
    page = reader.open(address("conv3", 0))
    page.locator("#map[open]").wait_for()
    reader.press("p")
    cell = page.locator("#canvas .cell")
    assert "-projections-" in cell.get_attribute("style")
    box, inside = cell.bounding_box(), page.locator("#canvas .box").bounding_box()
    assert box["x"] <= inside["x"] + 0.5 and box["x"] + box["width"] >= inside["x"] + inside["width"] - 0.5
    assert page.locator("[data-view=place]").get_attribute("aria-pressed") == "true"


def test_the_control_stands_beside_at_a_key(read, shelf):
    reader = read()
    page = reader.open(address("conv3", 2))
    page.locator("#map[open]").wait_for()
    assert page.locator("#blocks h3").all_inner_texts() == ["Projections", "Patches"]
    reader.press("c")
    assert page.locator("#blocks h3").all_inner_texts() == ["Projections", "Random weights", "Patches"]
    assert "similarity with random weights" in page.locator("#map-facts").inner_text()
    page.wait_for_load_state("networkidle")
    styles = [page.locator("#blocks .block").nth(i).locator(".cell").nth(1).get_attribute("style") for i in (0, 1)]
    assert "-projections-" in styles[0] and styles[1] == styles[0].replace("-projections-", "-control-")
    reader.press("c")
    assert page.locator("#blocks h3").count() == 2


# Finding


def fitting(mined: Mined, test, layers=LAYERS) -> list[str]:
    return [f"{layer} {unit}" for layer in layers for unit in range(len(mined[layer].values)) if test(layer, unit)]


@pytest.mark.parametrize(
    ("query", "test"),
    [
        ("conv3", lambda m, layer, unit: layer == "conv3"),
        (
            "conv3 4",
            lambda m, layer, unit: layer == "conv3" and (unit == 4 or any("4" in n for n in names(m, layer, unit))),
        ),
        ("layer:CONV map:2", lambda m, layer, unit: "conv" in layer and unit == 2),
        ("image:onerror", lambda m, layer, unit: NAMES[0] in names(m, layer, unit)),
        ("image:猫", lambda m, layer, unit: NAMES[2] in names(m, layer, unit)),
        ('class:"<b>dog</b> & co" map:1', lambda m, layer, unit: unit == 1 and CLASSES[1] in labels(m, layer, unit)),
        ("no such thing", lambda m, layer, unit: False),
    ],
)
def test_search_finds_what_fits_and_nothing_else(read, shelf, query, test):
    reader = read()
    page = reader.open()
    reader.press("/")
    page.keyboard.type(query)
    expected = fitting(shelf.mined, lambda layer, unit: test(shelf.mined, layer, unit))
    assert reader.settle(len(expected)) == expected
    count = page.locator("#count").inner_text()
    assert count.startswith(f"{len(expected)} of " if expected else "No map")
    reader.press("Escape")
    assert page.evaluate("document.activeElement.id") != "search"


def test_the_patches_that_the_search_names_are_marked(read, shelf):
    reader = read()
    page = reader.open(address("conv3") + "?q=" + quote(f'image:"{NAMES[2]}"'))
    mined, image = shelf.mined["conv3"], next(i for i, s in shelf.mined.sources.items() if s.name == NAMES[2])
    expected = [unit for unit in range(5) if image in mined.images[unit]]
    reader.settle(len(expected))
    for unit, card in zip(expected, page.locator(".card").all(), strict=True):
        marked = (
            card.locator(".block")
            .nth(1)
            .locator(".cell")
            .evaluate_all("cells => cells.flatMap((cell, rank) => cell.matches('.hit') ? [rank] : [])")
        )
        assert marked == (mined.images[unit] == image).nonzero().flatten().tolist()
        assert card.locator(".block").first.locator(".hit").count() == 0


@pytest.mark.parametrize("which", ["alive", "few", "dead"])
def test_filters_by_state(read, shelf, which):
    reader = read()
    page = reader.open(address(AWKWARD))
    page.locator("#show").select_option(which)
    counts = shelf.mined[AWKWARD].count
    fits = {"alive": counts > 0, "few": (counts > 0) & (counts < 9), "dead": counts == 0}[which]
    expected = [f"{AWKWARD} {unit}" for unit in fits.nonzero().flatten().tolist()]
    assert 0 < len(expected) < len(counts)
    assert reader.settle(len(expected)) == expected


def test_filters_by_class(read, shelf):
    reader = read()
    page = reader.open(address("conv3"))
    page.locator("#show").select_option("")
    page.locator("#class").select_option(CLASSES[2])
    expected = fitting(shelf.mined, lambda layer, unit: CLASSES[2] in labels(shelf.mined, layer, unit), ["conv3"])
    assert reader.settle(len(expected)) == expected


@pytest.mark.parametrize(
    ("key", "order"),
    [("max", lambda m: -m.values[:, 0]), ("mean", lambda m: -m.mean), ("active", lambda m: m.sparsity)],
)
def test_sorts(read, shelf, key, order):
    reader = read()
    page = reader.open(address(AWKWARD))
    page.locator("#sort").select_option(key)
    expected = order(shelf.mined[AWKWARD]).argsort(stable=True).tolist()
    reader.until("first => document.querySelector('.card')?.ariaLabel.includes(first)", f"map {expected[0]},")
    assert reader.cards() == [f"{AWKWARD} {unit}" for unit in expected]


# Addresses and keys


def test_addresses_lead_to_a_map_and_back_leads_out(read):
    reader = read()
    page = reader.open(address(AWKWARD, 6, 3))
    page.locator("#map[open]").wait_for()
    assert page.locator("#map-title").inner_text() == f"{AWKWARD} 6"
    assert page.locator("#entries button").nth(2).get_attribute("aria-current") == "true"
    reader.press("Escape")
    page.locator("#map[open]").wait_for(state="hidden")
    reader.settle(12)
    page.locator(".card").nth(2).click()
    page.locator("#map[open]").wait_for()
    assert page.url.endswith(address(AWKWARD, 2))
    page.go_back()
    page.locator("#map[open]").wait_for(state="hidden")
    assert page.locator("[aria-current=page]").inner_text() == AWKWARD


@pytest.mark.parametrize(
    "wrong", ["#nowhere", "#conv1/999", "#conv1/x/y", "#%E0%A4%A", "#/", "#conv1/-1", "#conv1/2/77"]
)
def test_wrong_addresses_do_no_harm(read, wrong):
    page = read().open(wrong)
    page.locator("main h1:visible").wait_for()


def test_keys_go_through_maps_images_and_layers(read, shelf):
    reader = read()
    page = reader.open(address("conv1"))
    reader.settle(7)
    page.locator(".card").first.focus()
    reader.press("ArrowRight", "ArrowRight", "ArrowLeft")
    assert page.evaluate("document.activeElement.ariaLabel").startswith("conv1 map 1,")
    reader.press("ArrowDown")
    columns = page.evaluate(
        "new Set([...document.querySelectorAll('.card')].map((c) => c.getBoundingClientRect().x)).size"
    )
    assert page.evaluate("document.activeElement.ariaLabel").startswith(f"conv1 map {1 + columns},")
    reader.press("Enter")
    page.locator("#map[open]").wait_for()
    title = page.locator("#map-title")
    assert title.inner_text() == f"conv1 {1 + columns}"
    reader.press("ArrowLeft")
    reader.until("text => document.getElementById('map-title').textContent === text", f"conv1 {columns}")
    chosen = page.locator("#entries [aria-current] .rank")
    reader.press("ArrowDown", "ArrowDown")
    assert chosen.inner_text() == "3"
    reader.press("8")
    assert chosen.inner_text() == "8"
    reader.press("ArrowUp")
    assert chosen.inner_text() == "7"
    reader.press("Escape")
    page.locator("#map[open]").wait_for(state="hidden")
    assert page.evaluate("document.activeElement.ariaLabel").startswith(f"conv1 map {columns},")  # where one was
    reader.press("]")
    page.locator("[aria-current=page]", has_text=AWKWARD).wait_for()
    reader.press("[")
    page.locator("[aria-current=page]", has_text="conv1").wait_for()
    reader.press("?")
    page.locator("#help[open]").wait_for()
    reader.press("Escape")
    page.locator("#help[open]").wait_for(state="hidden")


# Looks


def luminance(colour: str) -> float:
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def tokens(page) -> dict[str, float]:
    return {
        name: luminance(
            page.evaluate(f"getComputedStyle(document.documentElement).getPropertyValue('--{name}').trim()")
        )
        for name in ("paper", "raised", "tint", "ink", "soft", "accent")
    }


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(read, scheme):
    colours = tokens(read(color_scheme=scheme).open())
    assert (colours["paper"] > 0.5) == (scheme == "light")
    for text in ("ink", "soft", "accent"):
        for ground in ("paper", "raised", "tint"):
            low, high = sorted((colours[text], colours[ground]))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)  # WCAG AA


def test_the_theme_is_switched_and_kept(read):
    reader = read(color_scheme="light")
    page = reader.open()
    reader.press("d")
    assert tokens(page)["paper"] < 0.1
    page.reload()
    assert tokens(page)["paper"] < 0.1
    page.locator("#theme").click()
    assert tokens(page)["paper"] > 0.5


@pytest.mark.parametrize("where", ["", address("conv3"), address("conv3", 2)])
def test_a_phone_needs_no_sideways_scrolling(read, where):
    page = read(viewport={"width": 375, "height": 700}).open(where)
    page.wait_for_load_state("networkidle")
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 375
    assert page.evaluate("document.getElementById('map').scrollWidth") <= 375


def test_the_name_of_the_layer_is_in_sight_however_many_there_are(read):
    page = read(viewport={"width": 150, "height": 600}).open(address("conv3"))
    nav, tab = page.locator("nav.tabs"), page.locator("nav.tabs [aria-current]")
    assert nav.evaluate("nav => nav.scrollWidth > nav.clientWidth") and tab.inner_text() == "conv3"
    outer, inner = nav.bounding_box(), tab.bounding_box()
    assert outer["x"] <= inner["x"] and inner["x"] + inner["width"] <= outer["x"] + outer["width"]


@pytest.mark.parametrize("where", ["", address(AWKWARD), address("conv3", 2)])
def test_everything_has_a_name_for_those_who_listen(read, where):
    page = read().open(where)
    page.wait_for_load_state("networkidle")
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('button, a, input, select, [role=img], canvas')]
          .filter((node) => !(node.ariaLabel || node.textContent.trim() || node.labels?.length))
          .map((node) => node.outerHTML)"""
    )
    assert nameless == []
    assert page.locator("html").get_attribute("lang") == "en"


# Many maps


WIDTHS = (96, 256, 384, 384, 256)  # of ZFNet


def noise(model: torch.nn.Module, names: list[str], size: tuple[int, int], monkeypatch) -> Mined:
    """As if mined: random lists of every map, with pictures of noise. The page is what is tested."""
    draw = torch.Generator().manual_seed(0)
    lines = {line.name: line for line in DeconvNet(model, size).layers}
    layers = {}
    for name in names:
        line = lines[name]
        count, (high, wide) = line.channels, line.receptive_field
        values = torch.rand(count, 9, generator=draw).sort(1, descending=True).values
        which = torch.randint(0, 2000, (count, 9), generator=draw)
        positions = torch.stack([torch.randint(0, side, (count, 9), generator=draw) for side in line.size], -1)
        coarse = torch.randn(9, 3, -(-high // 4), -(-wide // 4), generator=draw)
        texture = torch.nn.functional.interpolate(coarse, (high, wide), mode="bilinear")
        patches = texture.half().expand(count, -1, -1, -1, -1)
        layers[name] = MinedLayer(line, values, which, positions, patches, values[:, 0], values[:, 1])

    def project(self, mined, layer, units=None, gate="deconvnet", dataset=None):
        found = mined[layer]
        units = torch.as_tensor(units).repeat_interleave(9)
        ranks = torch.arange(9).repeat(len(units) // 9)
        start = torch.tensor(found.layer.start) + found.positions[units, ranks] * torch.tensor(found.layer.jump)
        boxes = torch.cat([start, start + torch.tensor(found.layer.receptive_field)], 1)
        return SimpleNamespace(pixels=found.patches[units, ranks].float(), units=units, ranks=ranks, boxes=boxes)

    monkeypatch.setattr(DeconvNet, "project_mined", project, raising=False)
    used = {i for layer in layers.values() for i in layer.images.flatten().tolist()}
    return Mined(layers, 2000, 9, 1, 32, size, ("deconvnet",), sources={i: Source(f"{i}.png") for i in sorted(used)})


def test_of_thousands_of_maps_few_are_in_the_document(read, tmp_path, monkeypatch):
    """As many maps as ZFNet has, small ones."""
    modules = []
    for before, count in zip((3, *WIDTHS), WIDTHS, strict=False):
        modules += [torch.nn.Conv2d(before, count, 3), torch.nn.ReLU()]
    model = torch.nn.Sequential(*modules)
    mined = noise(model, ["0", "2", "4", "6", "8"], (22, 22), monkeypatch)
    folder = gallery(mined, model, tmp_path / "many", progress=False).parent
    reader = read(folder)
    page = reader.open()
    page.wait_for_load_state("networkidle")
    assert page.locator("*").count() < 300
    # What the page shows first: itself, its style, its script, and small pictures; no sheet, no data.
    assert not [url for url in reader.asked if re.search(r"-(projections|patches)-\d|/data/", url)]
    page.goto(page.url.split("#")[0] + "#4")
    reader.until("() => document.querySelectorAll('.card').length > 8")
    assert len(reader.cards()) < 80 and page.locator("*").count() < 3000
    for at in (0.3, 0.7, 1):
        page.evaluate("at => window.scrollTo(0, at * document.documentElement.scrollHeight)", at)
        reader.until(
            """() => [...document.querySelectorAll('.card')].some((card) => {
              const { top, bottom } = card.getBoundingClientRect(); return top < innerHeight / 2 && bottom > 0; })"""
        )
        assert len(reader.cards()) < 80
    assert "4 383" in reader.cards()
    sheets = [url for url in set(reader.asked) if "sheets/02-4-" in url]
    assert 0 < len(sheets) <= len(list((folder / "sheets").glob("02-4-*")))


@pytest.mark.slow
def test_the_gallery_of_zfnet_at_full_size(read, tmp_path, monkeypatch):
    model = zfnet()
    mined = noise(model, [f"conv{i}" for i in range(1, 6)], (224, 224), monkeypatch)
    began = time.perf_counter()
    folder = gallery(mined, model, tmp_path / "zfnet", dataset=Inputs(), progress=False).parent
    print(f"{time.perf_counter() - began:.1f} s to build")
    reader = read(folder)
    page = reader.open()
    paints = "() => performance.getEntriesByName('first-contentful-paint').map((entry) => entry.startTime)"
    reader.until(f"() => ({paints})().length > 0")
    print(f"{page.evaluate(paints)[0]:.0f} ms to the first paint")
    page.wait_for_load_state("networkidle")
    first = sum(Path(unquote(urlparse(url).path)).stat().st_size for url in reader.asked if url.startswith("file:"))
    whole = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{first / 1e6:.2f} MB before anything is clicked, {whole / 1e6:.0f} MB in all")
    assert first < 2_000_000 < 20_000_000 < whole
    page.goto(page.url.split("#")[0] + "#conv5/255/9")
    page.locator("#map[open]").wait_for()
    assert page.locator("#map .cell").count() == 18
    for key in ["ArrowLeft"] * 20:
        page.keyboard.press(key)
    reader.until("() => document.getElementById('map-title').textContent === 'conv5 235'")


class Inputs:
    """Network inputs of noise."""

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.randn(3, 224, 224, generator=torch.Generator().manual_seed(index))


# What is written


def test_files_hold_no_markup_of_names_and_no_paths(shelf):
    html = (shelf.folder / "index.html").read_text(encoding="utf-8")
    assert "<b>It</b>" not in html and "<i>2</i>" not in html
    everything = html + "".join(p.read_text(encoding="utf-8") for p in (shelf.folder / "data").iterdir())
    assert "onerror=alert" in everything and "<img src=x" not in everything and "</script><script>" not in everything
    source = next(iter(shelf.mined.sources.values()))
    assert str(Path(source.path).parent) not in everything
    assert not re.search(r"https?://", everything + (shelf.folder / "gallery.css").read_text())


def test_a_gallery_can_be_moved(read, shelf, tmp_path):
    moved = tmp_path / "elsewhere" / "ü b"
    shutil.copytree(shelf.folder, moved)
    page = read(moved).open(address("conv3", 1))
    page.locator("#map[open]").wait_for()
    page.wait_for_load_state("networkidle")
    assert page.locator("#canvas img").evaluate("image => image.naturalWidth") > 0


def test_a_missing_file_is_named_on_the_page(browser, shelf, tmp_path):
    shutil.copytree(shelf.folder, tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "data")
    reader = Reader(browser, tmp_path / "part")
    page = reader.open(address("conv3"))
    page.locator("#count", has_text="copy the whole folder").wait_for()
    reader.context.close()


def test_images_without_files_are_shown_as_the_network_saw_them(read, shelf, tmp_path):
    mined = Mined(**{**vars(shelf.mined), "sources": {}, "classes": None})
    with_data = gallery(mined, shelf.model, tmp_path / "with", dataset=shelf.images, progress=False).parent
    reader = read(with_data)
    page = reader.open(address("conv3", 1))
    page.locator("#map[open]").wait_for()
    page.wait_for_load_state("networkidle")
    image = int(mined["conv3"].images[1, 0])
    expected = pictures.patch(shelf.images[image].numpy(), galleries.MEAN, galleries.STD)
    written = np.asarray(Image.open(with_data / f"images/{image}-input.jpg"), float)
    assert np.abs(written - expected).mean() < 4
    assert page.locator("#canvas img").get_attribute("src") == f"images/{image}-input.jpg"
    assert f"image {image}" in page.locator("#caption").inner_text()


def test_images_that_are_not_known_leave_the_patch_in_its_place(read, shelf, tmp_path):
    gone = {i: Source(s.name, s.label, "/nowhere/gone.png", s.size, s.box) for i, s in shelf.mined.sources.items()}
    mined = Mined(**{**vars(shelf.mined), "sources": gone})
    page = read(gallery(mined, shelf.model, tmp_path / "without", progress=False).parent).open(address("conv3", 1))
    page.locator("#map[open]").wait_for()
    assert page.locator("#canvas img").count() == 0
    assert "-patches-" in page.locator("#canvas .cell").get_attribute("style")
    assert "not known" in page.locator("#caption").inner_text()


def test_copies_stand_upright_and_changed_files_are_not_shown(shelf, tmp_path):
    sources = dict(shelf.mined.sources)
    turned, changed, boxless = list(sources)[:3]
    draw = np.random.default_rng(0)
    corner = np.zeros((40, 60, 3), np.uint8)
    corner[:20, :30] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown a quarter turn clockwise
    Image.fromarray(corner).save(tmp_path / "turned.jpg", exif=exif)
    Image.fromarray(draw.integers(0, 255, (9, 9, 3), np.uint8)).save(tmp_path / "changed.png")
    sources[turned] = Source("turned", None, str(tmp_path / "turned.jpg"), (60, 40), (0, 0, 40, 40))
    sources[changed] = Source("changed", None, str(tmp_path / "changed.png"), (10, 10), (0, 0, 10, 10))
    sources[boxless] = Source("boxless", None, str(tmp_path / "changed.png"))
    mined = Mined(**{**vars(shelf.mined), "sources": sources})
    folder = gallery(mined, shelf.model, tmp_path / "gallery", dataset=shelf.images, progress=False).parent
    told = json.loads(re.search(r"receive\(\"sources\", (.*)\);", (folder / "data/sources.js").read_text())[1])
    upright = np.asarray(Image.open(folder / told[str(turned)]["shown"]), int)
    assert upright.shape == (60, 40, 3) and upright[:30, 20:].min() > 200 and upright[:30, :20].max() < 60
    assert told[str(changed)]["shown"] == told[str(changed)]["file"] == f"images/{changed}-input.jpg"
    assert told[str(boxless)]["shown"] == f"images/{boxless}-input.jpg"
    assert Image.open(folder / told[str(boxless)]["file"]).size == (9, 9)


def test_a_gallery_replaces_a_gallery_and_nothing_else(shelf, tmp_path):
    folder = tmp_path / "gallery"
    gallery(shelf.mined, shelf.model, folder, title="First", progress=False)
    (folder / "data" / "stale.js").touch()
    gallery(shelf.mined, shelf.model, folder, title="Second", progress=False)
    assert "Second" in (folder / "index.html").read_text() and not (folder / "data" / "stale.js").exists()
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.txt").write_text("years of work")
    for wrong in (other, other / "chapter.txt"):
        with pytest.raises(FileExistsError, match="holds other things"):
            gallery(shelf.mined, shelf.model, wrong, progress=False)
    assert (other / "chapter.txt").read_text() == "years of work"


def test_a_gallery_that_fails_leaves_nothing_and_the_former_one(shelf, tmp_path, monkeypatch):
    folder = tmp_path / "gallery"
    gallery(shelf.mined, shelf.model, folder, title="First", progress=False)
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    tiles = Painter.tiles

    def fail(self, layer, units):
        if layer == "conv3":
            raise OSError("disk full")
        return tiles(self, layer, units)

    monkeypatch.setattr(Painter, "tiles", fail)
    with pytest.raises(OSError, match="disk full"):
        gallery(shelf.mined, shelf.model, folder, title="Second", progress=False)
    with pytest.raises(OSError, match="disk full"):
        gallery(shelf.mined, shelf.model, tmp_path / "new", progress=False)
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before
    assert "First" in (folder / "index.html").read_text()


def test_what_does_not_belong_together_is_refused_before_anything_is_written(shelf, tmp_path):
    narrow = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 7, 2, 1), torch.nn.ReLU())
    renamed = Mined(**{**vars(shelf.mined), "layers": {"conv1": shelf.mined["conv1"]}})
    cases = [
        (shelf.mined, narrow, {}, ValueError, "conv1"),
        (
            renamed,
            torch.nn.Sequential(galleries.OrderedDict(conv1=narrow[0])),
            {},
            RuntimeError,
            "7 maps of layer 'conv1'",
        ),
        (Mined(**{**vars(shelf.mined), "layers": {}}), shelf.model, {}, ValueError, "no layers"),
        (galleries.small(tmp_path, (galleries.FC,))[2], shelf.model, {}, ValueError, "dataset"),
        (shelf.mined, shelf.model, {"gate": "open"}, ValueError, "gate"),
        (shelf.mined, shelf.model, {"gate": "guided"}, ValueError, "masks"),
        (shelf.mined, shelf.model, {"dataset": iter(shelf.images)}, TypeError, "__getitem__"),
        (Mined(**{**vars(shelf.mined), "model": "0" * 64}), shelf.model, {}, RuntimeError, "other weights"),
    ]
    for mined, model, options, error, says in cases:
        with pytest.raises(error, match=re.escape(says)):
            gallery(mined, model, tmp_path / "gallery", progress=False, **options)
        assert not list(tmp_path.glob("*gallery*"))


def test_fully_connected_units_are_shown_with_whole_images(read, shelf, tmp_path):
    (tmp_path / "files").mkdir()
    model, images, mined = galleries.small(tmp_path / "files", (galleries.FC,))
    folder = gallery(mined, model, tmp_path / "gallery", dataset=images, control=True, progress=False).parent
    reader = read(folder)
    page = reader.open(address(galleries.FC, int(mined[galleries.FC].count.argmax())))
    page.locator("#map[open]").wait_for()
    cell = Image.open(folder / f"sheets/00-{galleries.FC}-patches-0.jpg")
    assert cell.size[0] % 48 == 0
    box, field = page.locator("#canvas .box").bounding_box(), page.locator("#canvas .field").bounding_box()
    assert box["width"] == pytest.approx(field["width"], abs=0.5)
    data = json.loads(
        re.search(r"receive\(\"[^\"]+\", (.*)\);", (folder / f"data/00-{galleries.FC}.js").read_text())[1]
    )
    assert data["positions"] is None and len(data["values"]) == 6
