"""The examples of the README run as they stand, one after the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

README = Path(__file__).resolve().parents[1] / "README.md"


def test_examples_run_and_give_the_sizes_they_state() -> None:
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert names["logits"].shape == (1, 1000)
    assert sum(p.numel() for p in names["model"].parameters()) == 62_357_608
    assert names["pixels"].shape == (2, 2, 3, 224, 224)
    assert names["signal"].shape == names["maps"].shape
    assert names["image"].shape == names["x"].shape == names["x"].grad.shape
