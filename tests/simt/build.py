"""Compiles CUDA sources for the emulator: `_simt`, which checks every access, and `_simt_fast`, which does not."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
import sysconfig
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import filelock

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
FOLDER = ROOT / "build/simt"

sys.path.insert(0, str(ROOT / "csrc"))
import build  # noqa: E402  (csrc/build.py)

#: The kernels; target.cu speaks to the CUDA runtime, control.cpp stands in its place.
KERNELS = sorted(set((ROOT / "csrc/cuda").glob("*.cu")) - {ROOT / "csrc/cuda/target.cu"})

#: How the kernels (and only they) are compiled: with the hooks, without, and counting what runs.
CHECKED = ["-O2", "-fsanitize=thread,alignment", "--param=tsan-instrument-func-entry-exit=0"]
FAST = ["-DZF_SIMT_FAST"]
COVERAGE = [*FAST, "-DZF_SIMT_COVERAGE", "--coverage", "-O1", "-fno-inline"]

#: Where that leaves its counts.
COUNTS = FOLDER / "_simt_coverage"

fetch_nvcc = build.fetch_nvcc


@cache
def _cuda_headers() -> Path:
    toolkit = build.find_toolkit()
    if toolkit is None:
        raise RuntimeError(
            "the emulator needs CUDA's headers (cuda_fp16.h, vector_types.h): install a CUDA toolkit, or "
            f"pip install --target build/cuda {' '.join(build.NVCC_PACKAGES)}"
        )
    return toolkit.include


def _objects(kernels: Sequence[Path], flags: Sequence[str], runtime: Sequence[str] = ()) -> list[Any]:
    includes = [f"-I{HERE}", f"-I{ROOT / 'csrc/cuda'}", "-isystem", str(_cuda_headers())]
    common = ["-DZF_SIMT", *includes, "-g1", *(flag for flag in flags if flag.startswith("-D"))]
    # -march=native so that fmaf is an instruction, as on a GPU.
    kernel = ["-x", "c++", *common, "-march=native", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized", *flags]
    return [*((path, "cxx", kernel) for path in kernels), (HERE / "runtime.cpp", "cxx", [*common, *runtime])]


def library(name: str, kernels: Sequence[Path], fast: bool = False) -> Path:
    """A shared library of the emulator with ``kernels``; without bindings, for ctypes."""
    return _make(build.Module(name, _objects(kernels, FAST if fast else CHECKED)))


def backend(fast: bool = False, coverage: bool = False) -> ModuleType:
    """The module that implements ``csrc/ops.h`` with the kernels of ``csrc/cuda`` on the emulator.

    ``fast`` leaves the checks out. ``coverage`` counts lines and branches (and checks nothing either).
    """
    name, flags = ("_simt_fast", FAST) if fast else ("_simt", CHECKED)
    if coverage:
        name, flags = "_simt_coverage", COVERAGE
    objects = _objects(KERNELS, flags, ["-DZF_SIMT_BACKEND"])
    path = _make(build.extension(name, objects, ["--coverage"] if coverage else []))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def forget_coverage() -> None:
    """Delete the counts of earlier runs."""
    for counts in COUNTS.rglob("*.gcda"):
        counts.unlink()


def controls(path: str | Path) -> ctypes.CDLL:
    """The C functions of the emulator in a module or library."""
    found = ctypes.CDLL(str(path))
    found.zf_simt_configure.argtypes = [ctypes.c_int, ctypes.c_uint64, ctypes.c_int, ctypes.c_int, ctypes.c_int]
    found.zf_simt_register.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_char_p]
    found.zf_simt_unwritten.argtypes = [ctypes.c_void_p]
    found.zf_simt_unwritten.restype = ctypes.c_int64
    found.zf_simt_banks.restype = ctypes.c_char_p
    return found


def _make(module: build.Module) -> Path:
    """Build in a folder of its own, one process at a time; ninja decides what is new."""
    folder = FOLDER / module.name
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / "lock"):
        build.ninja([module], folder, folder / "objects")
    return folder / (module.name + sysconfig.get_config_var("EXT_SUFFIX"))
