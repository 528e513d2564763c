"""Figures for papers, exported arrays, and the weight-randomisation control."""

from __future__ import annotations

import json
import math
import re
from types import SimpleNamespace

import galleries
import numpy as np
import pytest
import torch
from galleries import AWKWARD, DEAD, LAYERS
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import spearmanr

from zfcuda.deconv import DeconvNet, again, mine
from zfcuda.deconv.graph import Graph
from zfcuda.report import control, export, figures
from zfcuda.report.tiles import Painter, windows


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> SimpleNamespace:
    model, images, mined = galleries.small(tmp_path_factory.mktemp("files"))
    return SimpleNamespace(model=model, images=images, mined=mined)


# Figures


def test_a_figure_names_its_maps_in_text(found, tmp_path):
    units = [4, 0, DEAD, 7, 11]
    figure = figures.fig2(found.mined, found.model, AWKWARD, units)
    svg = figures.save(figure, tmp_path / "figure.svg").read_text()
    texts = re.findall(r"<text[^>]*>(.*?)</text>", svg)
    assert [text for text in texts if text.isdigit()] == [str(unit) for unit in units for _ in range(2)]
    assert texts.count("dead") == 2 and svg.count("<image") == 2 * (len(units) - 1)
    assert not list(tmp_path.glob(".*"))


def test_the_pictures_of_a_figure_are_the_tiles(found, tmp_path):
    figure = figures.fig2(found.mined, found.model, "conv3", [2])
    tiles = Painter(found.mined, found.model).tiles("conv3", [2])
    for axes, shown in zip(figure.axes, (tiles.projections, tiles.patches), strict=True):
        block = np.asarray(axes.images[0].get_array())
        side = shown.shape[1]
        gap = (block.shape[0] - 3 * side) // 2
        for rank, tile in enumerate(shown):
            y, x = rank // 3 * (side + gap), rank % 3 * (side + gap)
            np.testing.assert_array_equal(block[y : y + side, x : x + side], tile)


def test_a_png_has_300_dots_an_inch(found, tmp_path):
    figure = figures.fig2(found.mined, found.model, "conv1")
    with Image.open(figures.save(figure, tmp_path / "figure.png")) as png:
        assert png.info["dpi"] == pytest.approx((300, 300), abs=0.1)
        assert png.width == 300 * figures.WIDTH


def test_a_book_has_all_maps_of_a_layer(found, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "PAGE", 5)
    path = figures.book(found.mined, found.model, AWKWARD, tmp_path / "book.pdf")
    pages = path.read_bytes()
    assert pages.startswith(b"%PDF") and len(re.findall(rb"/Type /Page\b", pages)) == math.ceil(12 / 5)
    assert b"/Type3" not in pages.replace(b" ", b"")  # fonts that journals accept
    assert list(tmp_path.iterdir()) == [path]


def test_wrong_figures_are_refused_before_anything_is_written(found, tmp_path):
    cases = [
        (lambda: figures.fig2(found.mined, found.model, "conv9"), KeyError, "conv9"),
        (lambda: figures.fig2(found.mined, found.model, "conv3", []), ValueError, "empty"),
        (lambda: figures.fig2(found.mined, found.model, "conv3", [5]), IndexError, "maps 0 to 4"),
        (lambda: figures.book(found.mined, found.model, "conv3", tmp_path / "a.png"), ValueError, ".pdf"),
        (lambda: figures.save(figures.fig2(found.mined, found.model, "conv3"), tmp_path / "a.gif"), ValueError, ".png"),
    ]
    for call, error, says in cases:
        with pytest.raises(error, match=says):
            call()
    assert not list(tmp_path.iterdir())


# Tiles


def test_tiles_are_the_same_from_what_mining_kept(found):
    """`mine` keeps windows of switches; the oracle's lists come from whole maps."""
    dataset = [(image, i % 3) for i, image in enumerate(found.images)]
    mined = mine(found.model, dataset, list(LAYERS), batch_size=8, progress=False)
    mined.preprocessing = found.mined.preprocessing
    for layer in LAYERS:
        units = range(len(mined[layer].values))
        ours, oracle = (Painter(each, found.model).tiles(layer, units) for each in (mined, found.mined))
        for name in ("units", "ranks", "boxes"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(oracle, name))
        np.testing.assert_allclose(ours.pixels, oracle.pixels, atol=1e-5 * np.abs(oracle.pixels).max())
        for name in ("projections", "patches"):
            difference = getattr(ours, name).astype(int) - getattr(oracle, name)
            assert np.abs(difference).max() <= 1


class Residual(torch.nn.Module):
    """A sum, through which there is only the dense path, whose projections are whole images."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Conv2d(3, 6, 5, 2, 2), torch.nn.Conv2d(6, 6, 3, padding=1)
        self.third = torch.nn.Conv2d(6, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        return self.third((self.second(x) + x).relu()).relu()


def test_tiles_behind_a_sum_are_receptive_fields_too(found):
    torch.manual_seed(0)
    model, dataset = Residual().eval(), list(found.images)
    mined = mine(model, dataset, ["third"], batch_size=8, progress=False)
    painter, against = Painter(mined, model, dataset=dataset), control.Control(mined, model, dataset=dataset)
    tiles = painter.tiles("third", range(4))
    line, net = mined["third"].layer, DeconvNet(model)
    assert tiles.pixels.shape[2:] == line.receptive_field == tiles.projections.shape[1:3] == tiles.patches.shape[1:3]
    assert against.pixels("third", tiles).shape == tiles.pixels.shape
    assert list(zip(tiles.units, tiles.ranks, strict=True)) == [
        (unit, rank) for unit in range(4) for rank in range(int(mined["third"].count[unit]))
    ]
    for pixels, box, unit, rank in zip(tiles.pixels, tiles.boxes, tiles.units, tiles.ranks, strict=True):
        position = mined["third"].positions[unit, rank]
        assert tuple(box) == net.box("third", position.tolist())
        whole = net.project(found.images[mined["third"].images[unit, rank]][None], "third", int(unit), position[None])
        assert np.abs(pixels).sum() == pytest.approx(float(whole.abs().sum()), rel=1e-4)  # nothing was cut off


# Data


def test_what_is_exported_is_read_by_numpy_and_json(found, tmp_path):
    document = export.export(found.mined, found.model, tmp_path / "data")
    read = json.loads(document.read_text(encoding="utf-8"))
    assert [layer["name"] for layer in read["layers"]] == list(LAYERS)
    assert read["sources"].keys() == {str(image) for image in found.mined.sources}
    assert read["input_size"] == [galleries.SIZE, galleries.SIZE] and read["classes"] == galleries.CLASSES
    net = DeconvNet(found.model, (galleries.SIZE, galleries.SIZE))
    for line in read["layers"]:
        arrays = np.load(document.parent / line["file"])
        mined = found.mined[line["name"]]
        for name in ("values", "images", "positions", "mean", "sparsity"):
            np.testing.assert_array_equal(arrays[name], getattr(mined, name).numpy())
        np.testing.assert_array_equal(arrays["patches"], mined.patches.numpy())
        missing = mined.images.numpy() < 0
        assert not arrays["projections"][missing].any() and (arrays["boxes"][missing] == -1).all()
        unit, rank = np.argwhere(~missing)[-1]
        assert tuple(arrays["boxes"][unit, rank]) == net.box(line["name"], mined.positions[unit, rank].tolist())
        whole = net.project(
            found.images[mined.images[unit, rank]][None], line["name"], int(unit), mined.positions[unit, rank][None]
        )[0]
        top, left, bottom, right = net.box(line["name"], mined.positions[unit, rank].tolist())
        inside = whole[:, max(top, 0) : bottom, max(left, 0) : right]
        shown = arrays["projections"][unit, rank][:, max(-top, 0) :, max(-left, 0) :]
        shown = shown[:, : inside.shape[1], : inside.shape[2]]
        np.testing.assert_allclose(shown, inside.numpy(), atol=2e-3 * float(inside.abs().max()))


def test_an_export_replaces_an_export_and_nothing_else(found, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").touch()
    with pytest.raises(FileExistsError, match="holds other things"):
        export.export(found.mined, found.model, tmp_path / "thesis")
    first = export.export(found.mined, found.model, tmp_path / "data").read_bytes()
    assert export.export(found.mined, found.model, tmp_path / "data").read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "thesis"]


# The control


def test_shuffling_keeps_every_weight_and_no_order(found):
    before = {name: p.detach().clone() for name, p in found.model.named_parameters()}
    random = dict(control.shuffled(found.model).named_parameters())
    for name, trained in before.items():
        assert torch.equal(dict(found.model.named_parameters())[name], trained)  # the model itself is not touched
        torch.testing.assert_close(
            random[name].flatten().sort().values, trained.flatten().sort().values, rtol=0, atol=0
        )
        if trained.numel() > 50:
            together = torch.corrcoef(torch.stack((trained.flatten(), random[name].detach().flatten())))[0, 1]
            assert abs(together) < 5 / math.sqrt(trained.numel())


@given(st.integers(0, 1000), st.integers(0, 4))
def test_similarity_is_spearmans_of_the_strengths(seed, zeros):
    draw = np.random.default_rng(seed)
    one, other = draw.normal(size=(2, 3, 6, 7))
    one[:, :zeros], other[:, :, :zeros] = 0, 0  # ties
    whole = (0, 0, 6, 7)
    strengths = [np.abs(image).sum(0).ravel() for image in (one, other)]
    assert control.similarity(one, other, whole, (6, 7)) == pytest.approx(spearmanr(*strengths).statistic)
    assert control.similarity(one, -2 * one, whole, (6, 7)) == pytest.approx(1)


def test_similarity_leaves_out_what_lies_outside_the_image():
    draw = np.random.default_rng(0)
    one, other = draw.normal(size=(2, 3, 5, 5))
    inside = control.similarity(one[:, 2:, :4], other[:, 2:, :4], (0, 6, 3, 10), (8, 10))
    assert control.similarity(one, other, (-2, 6, 3, 11), (8, 10)) == pytest.approx(inside)
    assert math.isnan(control.similarity(one, 0 * other, (0, 0, 5, 5), (8, 8)))


@pytest.mark.parametrize("layer", LAYERS)
def test_with_the_images_the_control_is_the_shuffled_networks_own_projection(found, layer):
    against = control.Control(found.mined, found.model, dataset=[(image, 0) for image in found.images])
    mined, net = found.mined[layer], DeconvNet(control.shuffled(found.model))
    tiles = Painter(found.mined, found.model).tiles(layer, range(len(mined.values)))
    shown = against.pixels(layer, tiles)
    assert len(shown) == len(tiles.units) == int(mined.count.sum())
    for pixels, unit, rank, (top, left, bottom, right) in zip(
        shown, tiles.units, tiles.ranks, tiles.boxes, strict=True
    ):
        image, position = found.images[mined.images[unit, rank]][None], mined.positions[unit, rank]
        whole = net.project(image, layer, int(unit), tuple(position.tolist()), start=1.0, dense=True)[0].numpy()
        expected = np.pad(whole, ((0, 0), (64, 64), (64, 64)))[:, 64 + top : 64 + bottom, 64 + left : 64 + right]
        np.testing.assert_allclose(pixels, expected, atol=1e-6)


class Read(torch.utils.data.Dataset):
    """Images that count how often each is read."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images, self.times = images, [0] * len(images)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.times[index] += 1
        return self.images[index], 0


def all_of(against: control.Control, painter: Painter) -> list[np.ndarray]:
    """The control of all maps, two of them at a time, as a gallery asks for them."""
    return [
        against.pixels(layer, painter.tiles(layer, [unit, unit + 1]))
        for layer in LAYERS
        for unit in range(0, len(against.mined[layer].values) - 1, 2)
    ]


@pytest.mark.parametrize("gate", ["deconvnet", "guided"])
def test_the_control_runs_each_image_in_the_lists_once(found, gate, monkeypatch):
    dataset, run = Read(found.images), []
    mined = mine(found.model, dataset, list(LAYERS), gates=[gate], batch_size=8, progress=False)
    painter = Painter(mined, found.model, gate)
    against = control.Control(mined, found.model, gate, dataset)
    dataset.times, forward = [0] * len(dataset), Graph.run
    monkeypatch.setattr(
        Graph, "run", lambda self, images, *rest: run.append(len(images)) or forward(self, images, *rest)
    )
    pictures = all_of(against, painter)
    listed = {i for layer in LAYERS[1 if gate == "deconvnet" else 0 :] for i in mined[layer].images.flatten().tolist()}
    assert dataset.times == [int(i in listed) for i in range(len(dataset))]  # a first layer's filters need no image
    assert sum(run) == len(listed - {-1})
    for memory in (0, 3 * 7 * 12**2):  # nothing is remembered, a few images are
        monkeypatch.setattr(again, "MEMORY", memory)
        for ours, other in zip(
            pictures, all_of(control.Control(mined, found.model, gate, dataset), painter), strict=True
        ):
            np.testing.assert_allclose(ours, other, atol=1e-6)
    assert max(dataset.times) > 2


@pytest.mark.parametrize("gate", ["deconvnet", "guided"])
def test_whole_maps_go_down_from_one_pass_of_each_image(found, gate):
    torch.manual_seed(0)
    model, dataset = Residual().eval(), Read(found.images)
    mined = mine(model, dataset, ["third"], gates=[gate], batch_size=8, progress=False)
    painter, layer = Painter(mined, model, gate, dataset), mined["third"]
    against, net = control.Control(mined, model, gate, dataset), DeconvNet(control.shuffled(model))
    dataset.times = [0] * len(dataset)
    for unit in range(4):
        tiles = painter.tiles("third", [unit])
        for pixels, rank, place in zip(against.pixels("third", tiles), tiles.ranks, tiles.boxes, strict=True):
            image, position = found.images[layer.images[unit, rank]][None], layer.positions[unit, rank][None]
            whole = net.project(image, "third", unit, position, start=1.0, gate=gate)
            np.testing.assert_allclose(pixels, windows([whole[0].numpy()], place[None])[0], atol=1e-6)
    assert max(dataset.times) == 2  # once in either network


def test_layers_whose_windows_were_not_kept_run_each_image_once(found):
    """The same pictures as from what mining keeps where it may."""
    dataset = Read(found.images)
    kept, bare = (
        mine(found.model, dataset, list(LAYERS), batch_size=8, progress=False, memory=memory) for memory in (2**30, 0)
    )
    assert kept["conv3"].switches and not bare["conv3"].switches and bare["conv1"].patches is None
    dataset.times = [0] * len(dataset)
    net = DeconvNet(found.model)
    passes = again.Passes(net, bare, dataset, masks=False)
    for layer in LAYERS:
        for unit in range(len(bare[layer].values)):
            ours, theirs = (net.project_mined(m, layer, [unit], dataset=d) for m, d in ((bare, passes), (kept, None)))
            order = ours.ranks.argsort()
            assert torch.equal(ours.ranks[order], theirs.ranks) and torch.equal(ours.boxes[order], theirs.boxes)
            torch.testing.assert_close(ours.pixels[order], theirs.pixels)
    assert max(dataset.times) == 1


def test_a_trained_and_a_shuffled_network_are_told_apart_by_layer_1(found):
    """Where a projection is a filter, its likeness with a shuffled filter is chance."""
    against = control.Control(found.mined, found.model)
    tiles = Painter(found.mined, found.model).tiles("conv1", range(7))
    values = against.similarities(tiles, against.pixels("conv1", tiles))
    assert len(values) == len(tiles.units) and abs(np.nanmean(values)) < 0.5
    assert against.similarities(tiles, tiles.pixels) == pytest.approx([1.0] * len(values))
