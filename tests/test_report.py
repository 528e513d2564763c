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

from zfcuda.deconv import DeconvNet
from zfcuda.report import control, export, figures
from zfcuda.report.tiles import Painter


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


def test_with_the_images_the_control_is_the_shuffled_networks_own_projection(found):
    against = control.Control(found.mined, found.model, dataset=[(image, 0) for image in found.images])
    tiles = Painter(found.mined, found.model).tiles("conv3", [1])
    net = DeconvNet(control.shuffled(found.model))
    mined = found.mined["conv3"]
    for rank, pixels in enumerate(against.pixels("conv3", tiles)):
        image, position = found.images[mined.images[1, rank]][None], mined.positions[1, rank][None]
        expected = net.project(image, "conv3", 1, position, start=1.0)[0].numpy()
        top, left, bottom, right = tiles.boxes[rank]
        for y, x in ((8, 8), (max(top, 0) - top, 3), (5, max(left, 0) - left)):
            if 0 <= top + y < galleries.SIZE and 0 <= left + x < galleries.SIZE:
                np.testing.assert_allclose(pixels[:, y, x], expected[:, top + y, left + x], atol=1e-6)
        assert np.abs(pixels).sum() == pytest.approx(
            np.abs(expected[:, max(top, 0) : bottom, max(left, 0) : right]).sum(), rel=1e-5
        )


def test_a_trained_and_a_shuffled_network_are_told_apart_by_layer_1(found):
    """Where a projection is a filter, its likeness with a shuffled filter is chance."""
    against = control.Control(found.mined, found.model)
    tiles = Painter(found.mined, found.model).tiles("conv1", range(7))
    values = against.similarities(tiles, against.pixels("conv1", tiles))
    assert len(values) == len(tiles.units) and abs(np.nanmean(values)) < 0.5
    assert against.similarities(tiles, tiles.pixels) == pytest.approx([1.0] * len(values))
