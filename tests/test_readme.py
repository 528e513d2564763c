"""The examples of the README and of the guide run as they stand, one after the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]


def run_examples(page: Path) -> dict[str, Any]:
    """The names that the page's Python blocks leave behind."""
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(block, str(page), "exec"), names)
    return names


def test_examples_of_the_guide(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_examples(ROOT / "docs/guide.md")
    assert names["mined"]["conv4"].values.shape == (8, 9)
    assert len(names["found"].pixels) == int(names["mined"]["conv4"].count.sum())
    assert (tmp_path / "conv4.pdf").stat().st_size > 1000


def test_examples_run_and_give_the_sizes_they_state() -> None:
    names = run_examples(ROOT / "README.md")
    assert names["logits"].shape == (1, 1000)
    assert sum(p.numel() for p in names["model"].parameters()) == 62_357_608
    assert names["pixels"].shape == (2, 2, 3, 224, 224)
    assert names["signal"].shape == names["maps"].shape
    assert names["image"].shape == names["x"].shape == names["x"].grad.shape
