"""What notebooks show: small tables and pictures, with every name escaped."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

import zfcuda
from zfcuda.deconv import Mined, MinedLayer
from zfcuda.deconv.projections import Projections
from zfcuda.report import notebook

EVIL = "<script>alert('x')</script>&amp;"


class Parsed(HTMLParser):
    """Tags that all close, the rows of the table, and the sources of images."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.images: list[str] = []
        self.tags: set[str] = set()
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag == "img":
            self.images.append(dict(attributes)["src"])
            return
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def named(name: str) -> torch.nn.Module:
    net = torch.nn.Sequential()
    net.add_module(name, torch.nn.Conv2d(3, 5, 3, padding=1))
    net.add_module("pool", torch.nn.MaxPool2d(2))
    return net


def mined_layer(layer, maps: int = 3) -> MinedLayer:
    values = torch.tensor([[4.0, 2.0], [1.0, 0.0], [0.0, 0.0]]).repeat(-(-maps // 3), 1)[:maps]
    images = torch.where(values > 0, 7, -1)
    return MinedLayer(layer, values, images, None, None, values.mean(1), torch.full((maps,), 0.25))


@pytest.fixture
def layers():
    return zfcuda.DeconvNet(named(EVIL), (8, 6)).layers


def test_layers_are_a_table_and_still_a_tuple(layers):
    assert isinstance(layers, tuple) and layers[0].name == EVIL
    page = Parsed(layers._repr_html_())
    assert page.rows[0] == list(notebook.LAYER_COLUMNS)
    assert page.rows[1][:5] == [EVIL, "conv", "5", "8 x 6", "3"] and page.rows[2][:5] == [
        "pool",
        "pool",
        "5",
        "4 x 3",
        "4",
    ]
    assert page.rows[1][6] == "960 B"  # 5 maps of 8 x 6 float32
    assert "script" not in page.tags


def test_mined_is_a_line_for_each_layer(layers):
    mined = Mined({EVIL: mined_layer(layers[0])}, 100, 2, 1, 32, (8, 6), ("deconvnet",))
    page = Parsed(mined._repr_html_())
    assert page.rows[1] == [EVIL, "3", "8 x 6", "1", "1", "4"] and "script" not in page.tags
    assert "2 strongest of every map over 100 images" in mined._repr_html_()


def test_a_mined_layer_shows_its_first_maps_and_says_how_many_there_are(layers):
    page = Parsed(mined_layer(layers[0])._repr_html_())
    assert page.rows[1:] == [["0", "3", "25%", "4 2"], ["1", "0.5", "25%", "1"], ["2", "0", "25%", "dead"]]
    many = mined_layer(layers[0], 500)._repr_html_()
    assert (
        len(Parsed(many).rows) == notebook.SHOWN + 1
        and f"500 maps, 2 strongest of each; the first {notebook.SHOWN}" in many
    )
    assert len(many) < 20_000


def test_projections_are_pictures_zero_as_grey():
    pixels = torch.zeros(3, 3, 4, 4)
    pixels[1, :, 0, 0], pixels[1, :, 3, 3] = 2, -2
    boxes = torch.tensor([[0, 0, 4, 4]] * 3)
    shown = Projections(pixels, torch.tensor([5, 6, 7]), torch.tensor([0, 1, 2]), boxes)._repr_html_()
    page = Parsed(shown)
    assert len(page.images) == 3 and "map 6, no. 2" in shown and "3 projections" in shown
    decoded = [np.asarray(Image.open(io.BytesIO(base64.b64decode(s.partition(",")[2])))) for s in page.images]
    assert all(s.startswith("data:image/png;base64,") for s in page.images)
    assert (decoded[0] == 128).all()
    assert decoded[1][0, 0, 0] == 255 and decoded[1][-1, -1, 0] == 1 and decoded[1][0, -1, 0] == 128
    assert not re.search("https?:", shown)


@pytest.mark.parametrize(
    "count, text",
    [(None, ""), (0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (200 * 2**20, "200 MiB"), (2**31, "2 GiB")],
)
def test_bytes_in_words(count, text):
    assert notebook.bytes_text(count) == text
