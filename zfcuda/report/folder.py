"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["check_target", "file_name", "whole_folder"]


def file_name(number: int, layer: str) -> str:
    """A name for the files of a layer, whatever the layer's name: ``03-features.0``."""
    return f"{number:02d}-{re.sub('[^A-Za-z0-9._-]', '_', layer)}"


def check_target(folder: Path, mark: str) -> None:
    """Refuse to put something in the place of what we did not write: only the file ``mark`` tells ours.

    Raises
    ------
    FileExistsError
        If ``folder`` is a file, or holds anything and no ``mark``.
    """
    if folder.is_dir() and ((folder / mark).is_file() or not any(folder.iterdir())):
        return
    if folder.exists():
        raise FileExistsError(f"folder is {str(folder)!r}, which holds other things; name a new or an empty folder")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside ``folder`` to write to; takes its place at the end, or vanishes if anything fails."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    part, old = (folder.with_name(f".{folder.name}.{what}-{os.getpid()}") for what in ("part", "old"))
    part.mkdir()
    try:
        yield part
        if folder.exists():
            folder.rename(old)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
