"""NVIDIA's tools that only the tests use, fetched from pip into build/tools; the library depends on none of them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import filelock

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build/tools"

sys.path.insert(0, str(ROOT / "csrc"))
import build  # noqa: E402  (csrc/build.py)

#: The disassembler. There is none of build.NVCC_PACKAGES' version; 13.2, the oldest on PyPI, reads its cubins.
NVDISASM = "nvidia-cuda-nvdisasm==13.2.*"


def fetch(*packages: str) -> Path:
    """A folder with the packages of pip, and nothing else; they are fetched once.

    Raises
    ------
    RuntimeError
        If pip cannot.
    """
    folder = FOLDER / re.sub(r"[^\w.-]+", "_", packages[0])
    FOLDER.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{folder}.lock"):
        if not folder.exists():
            fetched = folder.with_suffix(".part")
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", fetched]
            done = subprocess.run([*pip, *packages], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"pip could not fetch {' '.join(packages)}:\n{done.stderr}")
            fetched.rename(folder)
    return folder


def nvdisasm() -> Path:
    """The disassembler: beside nvcc in a toolkit, else from pip."""
    toolkit = build.find_toolkit()
    beside = toolkit.include.parent / "bin/nvdisasm" if toolkit else None
    return beside if beside and beside.exists() else next(fetch(NVDISASM).glob("nvidia/cu*/bin/nvdisasm"))
