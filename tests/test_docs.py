"""The reference has every operator, and the page of choices too."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from zfcuda import nn, ops

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.mark.parametrize(
    ("page", "entry"),
    [("reference/ops.md", r"^\.\. auto\w+:: (\w+)$"), ("choosing.md", r"`~zfcuda\.ops\.(\w+)`")],
)
def test_every_operator_is_on_the_page(page, entry):
    assert set(re.findall(entry, (DOCS / page).read_text(), re.MULTILINE)) == set(ops.__all__)


def test_every_module_is_among_the_choices():
    assert set(re.findall(r"`~zfcuda\.nn\.(\w+)`", (DOCS / "choosing.md").read_text())) == set(nn.__all__)
