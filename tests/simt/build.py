"""Compiles CUDA sources for the emulator: `_simt`, which checks every access, and `_simt_fast`, which does not."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
import sysconfig
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType

import filelock

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
FOLDER = ROOT / "build/simt"

sys.path.insert(0, str(ROOT / "csrc"))
import build  # noqa: E402  (csrc/build.py)

#: The kernels; target.cu speaks to the CUDA runtime, control.cpp stands in its place.
KERNELS = sorted(set((ROOT / "csrc/cuda").glob("*.cu")) - {ROOT / "csrc/cuda/target.cu"})
RUNTIME = sorted(HERE.glob("*.cpp"))


@cache
def _cuda_headers() -> Path:
    toolkit = build.find_toolkit()
    if toolkit is None:
        raise RuntimeError(
            "the emulator needs CUDA's headers (cuda_fp16.h, vector_types.h): install a CUDA toolkit, or "
            f"pip install --target build/cuda {' '.join(build.NVCC_PACKAGES)}"
        )
    return toolkit.include


def _module(name: str, kernels: Sequence[Path], fast: bool, flags: Sequence[str], bindings: bool) -> build.Module:
    common = ["-DZF_SIMT", f"-I{HERE}", f"-I{ROOT / 'csrc/cuda'}", "-isystem", str(_cuda_headers()), "-g1"]
    if fast:
        common.append("-DZF_SIMT_FAST")
    # Only the kernels carry the hooks. -march=native so that fmaf is an instruction, as on a GPU.
    hooks = "-O2 -fsanitize=thread,alignment --param=tsan-instrument-func-entry-exit=0"
    kernel = ["-x", "c++", *common, "-march=native", "-Wno-unknown-pragmas", *([] if fast else hooks.split()), *flags]
    objects = [(path, "cxx", kernel) for path in kernels]
    objects += [(path, "cxx", [*common, "-DZF_SIMT_BACKEND"] if bindings else common) for path in RUNTIME]
    if bindings:
        objects.append(build.bindings(name))
    return build.Module(name, objects, ["-ldl", *(f for f in flags if f == "--coverage")])


def library(name: str, kernels: Sequence[Path], fast: bool = False, flags: Sequence[str] = ()) -> Path:
    """A shared library of the emulator with ``kernels``; without bindings, for ctypes."""
    return _make(_module(name, kernels, fast, flags, bindings=False))


def backend(fast: bool = False) -> ModuleType:
    """The module that implements ``csrc/ops.h`` with the kernels of ``csrc/cuda`` on the emulator."""
    name = "_simt_fast" if fast else "_simt"
    flags = ["--coverage"] if os.environ.get("ZF_SIMT_COVERAGE") and not fast else []
    path = _make(_module(name, KERNELS, fast, flags, bindings=True))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def controls(path: str | Path) -> ctypes.CDLL:
    """The C functions of the emulator in a module or library."""
    found = ctypes.CDLL(str(path))
    found.zf_simt_configure.argtypes = [ctypes.c_int, ctypes.c_uint64, ctypes.c_int, ctypes.c_int]
    found.zf_simt_register.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_char_p]
    found.zf_simt_unwritten.argtypes = [ctypes.c_void_p]
    found.zf_simt_unwritten.restype = ctypes.c_int64
    return found


def _make(module: build.Module) -> Path:
    """Build in a folder of its own, one process at a time; ninja decides what is new."""
    folder = FOLDER / module.name
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / "lock"):
        build.ninja([module], folder, folder / "objects")
    return folder / (module.name + sysconfig.get_config_var("EXT_SUFFIX"))
