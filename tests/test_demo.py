"""The demo, stage by stage on small inputs; and the whole of it, as a user runs it (-m slow)."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import zfcuda
from zfcuda.cli import main
from zfcuda.demo import Recipe, Sizes, data, run, strongest
from zfcuda.demo.baseline import colour_statistics
from zfcuda.demo.first_layer import typical_patches
from zfcuda.demo.folder import Stages, write
from zfcuda.demo.training import Training, augment, narrow_zfnet, train

TINY = Recipe(steps=6, size=64, widths=(6, 8, 8, 8, 8), fc_width=16, crops=2)
FEW = Sizes(train=48, held_out=32, baseline=48, mined=(128,))


@pytest.fixture(scope="module")
def photographs() -> list[data.Photograph]:
    return data.load_photographs()


@pytest.fixture(scope="module")
def mined(photographs):
    """A network, the windows of a grid, their crops, and the strongest activations."""
    deconvnet = zfcuda.DeconvNet(narrow_zfnet(TINY, 8).eval())
    windows = data.grid_windows(photographs[:2], 128)
    pixels = data.cut(photographs, windows, TINY.size)
    return deconvnet, windows, pixels, strongest.strongest_everywhere(deconvnet, pixels)


def columns(windows: list[data.Window], photo: int) -> set[int]:
    return {x for w in windows if w.photo == photo for x in range(w.left, w.left + w.side)}


def test_held_out_windows_share_no_column_with_training_windows(photographs):
    draw = np.random.default_rng(0)
    known = data.sample_windows(photographs, 800, draw, held_out=False)
    asked = data.sample_windows(photographs, 320, draw, held_out=True)
    for photo, photograph in enumerate(photographs):
        assert columns(known, photo) and columns(asked, photo)
        assert not columns(known, photo) & columns(asked, photo)
        for window in (w for w in known + asked if w.photo == photo):
            left, top, right, bottom = window.box
            assert left >= 0 and top >= 0 and right <= photograph.image.width and bottom <= photograph.image.height


def test_the_turns_of_a_window_have_the_same_colours(photographs):
    windows = data.sample_windows(photographs, 32, np.random.default_rng(1), held_out=False)
    turned = data.turn(data.cut(photographs, windows, 48))
    features = colour_statistics(turned).reshape(data.TURNS, len(windows), -1)
    for turn in features[1:]:
        np.testing.assert_allclose(turn, features[0], rtol=1e-6)
    labels = data.labels(torch.tensor([window.photo for window in windows])).view(data.TURNS, -1)
    assert all(len(set(column)) == data.TURNS for column in labels.T.tolist())
    assert (labels // data.TURNS == torch.tensor([window.photo for window in windows])).all()


def test_normalised_crops_have_no_mean_colour_and_unit_contrast(photographs):
    windows = data.sample_windows(photographs, 32, np.random.default_rng(2), held_out=False)
    crops = data.normalise(data.cut(photographs, windows, 48))
    torch.testing.assert_close(crops.mean((2, 3)), torch.zeros(32, 3), atol=1e-4, rtol=0)
    contrast = crops.square().mean((1, 2, 3)).sqrt()
    assert (contrast > 0.8).all() and (contrast <= 1).all()


def test_augmentation_keeps_grey_grey_and_mean_colours_zero():
    draw = torch.Generator().manual_seed(0)
    crops = torch.randn(16, 3, 9, 9, generator=draw, dtype=torch.float64).float()
    crops -= crops.mean((2, 3), keepdim=True)
    torch.testing.assert_close(augment(crops, draw).mean((2, 3)), torch.zeros(16, 3), atol=1e-5, rtol=0)
    grey = crops.mean(1, keepdim=True).expand_as(crops)
    changed = augment(grey, draw)
    torch.testing.assert_close(changed, changed.mean(1, keepdim=True).expand_as(changed))


def test_layer_1_starts_at_what_the_crops_consist_of():
    """Crops of grey stripes, upright or (turned) level, give grey filters of stripes, upright or level."""
    draw = np.random.default_rng(0)
    x = np.arange(32)
    waves = [np.sin(2 * np.pi * (x / draw.uniform(5, 9) + draw.uniform())) for _ in range(40)]
    stripes = torch.tensor(np.array(waves))[:, None, None].expand(-1, 3, 32, -1)
    filters = typical_patches((stripes * 100 + 128).round().byte(), 8, 7, seed=0)
    torch.testing.assert_close(filters.square().mean((1, 2, 3)), torch.ones(8))
    torch.testing.assert_close(filters, filters.mean(1, keepdim=True).expand_as(filters), atol=0.05, rtol=0)
    along, across = (filters.diff(dim=dim).square().mean((1, 2, 3)) for dim in (2, 3))
    level = along > across
    assert 0 < level.sum() < 8
    assert (torch.minimum(along, across) < 0.05 * torch.maximum(along, across)).all()


def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr("zfcuda.demo.training.CHECKPOINT_EVERY", 2)
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (10, 3, 64, 64), generator=draw, dtype=torch.uint8)
    photos = torch.arange(10) % 2
    whole = train(TINY, 8, pixels, photos, Stages(tmp_path / "whole"))

    def stop(training: Training) -> None:
        torch.rand(3)  # whoever else draws random numbers does not matter
        if training.step == 5:
            raise KeyboardInterrupt

    stopped = Stages(tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        train(TINY, 8, pixels, photos, stopped, stop)
    resumed: list[int] = []
    again = train(TINY, 8, pixels, photos, stopped, resumed=resumed.append)
    assert resumed == [4] and again.step == TINY.steps and again.loss == whole.loss
    for name, parameter in whole.net.state_dict().items():
        assert torch.equal(again.net.state_dict()[name], parameter), name


def test_a_checkpoint_of_another_recipe_is_not_used(tmp_path):
    stages = Stages(tmp_path)
    stages.save("training", {"seed": 0}, {"step": 3})
    assert stages.load("training", {"seed": 0}) == {"step": 3}
    assert stages.load("training", {"seed": 1}) is None
    assert stages.load("accuracy", {"seed": 0}) is None


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "figure.png"
    write(path, lambda part: part.write_text("old"))

    def fail(part: Path) -> None:
        part.write_text("half of the n")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write(path, fail)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("layer", strongest.LAYERS)
def test_mining_finds_the_strongest_of_every_map_in_every_crop(mined, layer):
    deconvnet, _, pixels, found = mined
    for crop in range(0, len(pixels), 17):
        record = deconvnet(data.normalise(pixels[crop : crop + 1]))
        torch.testing.assert_close(found[layer]["values"][:, crop], record.maps[layer][0].amax((1, 2)))
        at_position = record.maps[layer][0].flatten(1).gather(1, found[layer]["positions"][:, crop, None])[:, 0]
        torch.testing.assert_close(at_position, found[layer]["values"][:, crop])


@pytest.mark.parametrize("layer", strongest.LAYERS)
def test_the_nine_are_the_strongest_that_lie_apart(mined, layer):
    deconvnet, windows, _, found = mined
    nines = strongest.strongest_nine(deconvnet, layer, found[layer], windows, TINY.size)
    width = next(info.size[1] for info in deconvnet.layers if info.name == layer)
    assert any(nines)

    def place(spot: strongest.Spot) -> tuple[int, strongest.Square]:
        box = strongest.patch_box(deconvnet, layer, spot.row, spot.column, TINY.size)
        return windows[spot.crop].photo, strongest.in_photograph(box, windows[spot.crop], TINY.size)

    def apart(one: strongest.Spot, other: strongest.Spot) -> bool:
        (photo, square), (other_photo, other_square) = place(one), place(other)
        return photo != other_photo or strongest.overlap(square, other_square) <= strongest.OVERLAP

    for index, spots in enumerate(nines):
        assert len(spots) <= strongest.NINE
        everything = [
            strongest.Spot(value, crop, *divmod(position, width))
            for crop, (value, position) in enumerate(
                zip(found[layer]["values"][index].tolist(), found[layer]["positions"][index].tolist(), strict=True)
            )
        ]
        for i, one in enumerate(spots):
            assert one in everything and one.value > 0
            assert all(apart(one, other) for other in spots[:i])
        # Whatever was passed over is weaker than all, not positive, or too near to a stronger one.
        for spot in everything:
            if spot not in spots and spot.value > 0:
                stronger = [other for other in spots if other.value >= spot.value]
                assert len(stronger) == strongest.NINE or not all(apart(spot, other) for other in stronger)


class References(HTMLParser):
    """Everything that a page points to, and what a stranger's screen reader needs."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.images: list[dict[str, str | None]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.sources += [given[key] for key in ("src", "srcset", "data") if given.get(key)]
        self.links += [given["href"]] if given.get("href") else []
        self.ids |= {given["id"]} if given.get("id") else set()
        self.images += [given] if tag == "img" else []


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """The folder of a whole run on tiny sizes."""
    output = tmp_path_factory.mktemp("demo") / "out"
    run(output, TINY, FEW)
    return output


def test_the_page_is_complete_and_needs_no_network(tiny):
    html = (tiny / "index.html").read_text(encoding="utf-8")
    page = References(html)
    assert not re.search(r"https?:|//\w|@import|url\(", html)
    for target in page.sources + [link for link in page.links if not link.startswith("#")]:
        assert (tiny / target).is_file(), target
    assert {link[1:] for link in page.links if link.startswith("#")} <= page.ids
    pictured = sum(len(list((tiny / "maps" / layer).iterdir())) for layer in strongest.LAYERS)
    assert len(page.images) == pictured + 1  # and the filters
    for image in page.images:
        assert image["alt"] and image["loading"] == "lazy"
        if "width" in image:
            assert Image.open(tiny / image["src"]).size == (int(image["width"]), int(image["height"]))
    assert "prefers-color-scheme: dark" in html


def test_every_map_is_on_the_page_or_named_dead(tiny):
    html = (tiny / "index.html").read_text(encoding="utf-8")
    for layer, width in zip(strongest.LAYERS, TINY.widths, strict=True):
        section = html[html.index(f'id="{layer}"') :].partition("</section>")[0]
        shown = {int(index) for index in re.findall(r"<b>Map (\d+)</b>", section)}
        dead = re.search(r"dead:</strong> map ([\d, ]+)", section)
        named = {int(index) for index in dead[1].split(",")} if dead else set()
        assert shown | named == set(range(width)) and not shown & named


def test_a_second_run_takes_over_and_repairs(tiny, capsys):
    page = (tiny / "index.html").read_text(encoding="utf-8")
    kept = (tiny / "maps/conv1").stat().st_mtime_ns
    lost = next((tiny / "maps/conv2").iterdir())
    picture = lost.read_bytes()
    lost.unlink()
    run(tiny, TINY, FEW)
    said = capsys.readouterr().out
    assert "Training: taken from the earlier run" in said and "Pictures of layer 1: taken" in said
    assert "Pictures of layer 2: taken" not in said
    assert lost.read_bytes() == picture and (tiny / "maps/conv1").stat().st_mtime_ns == kept
    assert (tiny / "index.html").read_text(encoding="utf-8") == page
    assert not list(tiny.rglob(".part-*"))


def test_another_recipe_is_trained_again(tiny, tmp_path, capsys):
    run(tmp_path, TINY, FEW)
    capsys.readouterr()
    run(tmp_path, replace(TINY, seed=1), FEW)
    assert "earlier run" not in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_as_a_user_runs_it(tmp_path):
    output = tmp_path / "demo"
    first = CliRunner().invoke(main, ["demo", "--output", str(output)], catch_exceptions=False)
    assert first.exit_code == 0
    right, colours, chance = map(float, re.search(r"([\d.]+) % right.*?([\d.]+) %.*?([\d.]+) %", first.output).groups())
    assert chance < colours < 25 < right  # no classifier of colour statistics exceeds 25 %
    again = CliRunner().invoke(main, ["demo", "--output", str(output)], catch_exceptions=False)
    assert again.exit_code == 0
    assert "Training: taken from the earlier run" in again.output and f"{right} % right" in again.output
    assert all((output / f"{layer}.png").is_file() for layer in strongest.LAYERS)
