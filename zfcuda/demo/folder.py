"""The demo's output folder: files appear whole or not at all, and a finished stage is found again."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def write(path: Path, save: Callable[[Path], object]) -> None:
    """Let `save` write to a name beside `path`, then put the result in its place.

    The name keeps the suffix, from which image writers take the format.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part-{path.name}")
    try:
        save(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


class Stages:
    """The results of the stages, each kept with the settings that it depends on.

    A result is a dict of tensors, numbers, strings and containers of them. Found under other settings, it is
    not used.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, name: str, settings: dict[str, Any], result: dict[str, Any]) -> None:
        write(self._path(name), lambda part: torch.save({"settings": settings, "result": result}, part))

    def load(self, name: str, settings: dict[str, Any]) -> dict[str, Any] | None:
        """The result, or None where there is none for these settings."""
        path = self._path(name)
        if not path.exists():
            return None
        kept = torch.load(path, weights_only=True)
        return kept["result"] if kept["settings"] == settings else None

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.pt"
