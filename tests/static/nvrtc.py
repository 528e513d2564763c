"""NVRTC, called as CuPy's RawModule calls it; that needs no driver."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tools import ROOT, build, fetch

#: How the sources of csrc/cuda compile under NVRTC; the CUDA headers' folder comes from the toolkit, or from CuPy.
OPTIONS = ("-std=c++17", "-default-device", f"-I{ROOT}/csrc/cuda/nvrtc", f"-I{ROOT}/csrc/cuda")


@dataclass(frozen=True)
class Version:
    """Of the compiler: pip's packages, the headers first in their place, the architectures."""

    packages: tuple[str, ...]
    archs: tuple[int, ...]


VERSIONS = {
    "13.0": Version(
        ("nvidia-cuda-nvrtc==13.0.*", *(p for p in build.NVCC_PACKAGES if "runtime" in p or "cccl" in p or "crt" in p)),
        (75, 80, 86, 89, 90, 100, 120),
    ),
    # pip's nvcc of 12.4 is only its assembler, so that this is as near as pip comes to the oldest compiler supported.
    "12.4": Version(
        tuple(f"nvidia-cuda-{name}-cu12==12.4.*" for name in ("nvrtc", "runtime", "cccl", "nvcc")),
        (75, 80, 86, 89, 90),
    ),
}


class CompileError(Exception):
    """What NVRTC said."""


class Nvrtc:
    """The library of one version."""

    def __init__(self, version: str):
        self.archs = VERSIONS[version].archs
        folder = fetch(*VERSIONS[version].packages)
        self.includes = tuple(f"-I{path}" for path in sorted(folder.glob("nvidia/*/include")))
        (builtins,) = (path for path in folder.rglob("libnvrtc-builtins.so.*") if ".alt" not in path.name)
        ctypes.CDLL(str(builtins))  # else it is looked for on the loader's path
        (library,) = (path for path in folder.rglob("libnvrtc.so.*") if ".alt" not in path.name)
        self.library = ctypes.CDLL(str(library))

    def compile(self, code: str, name: str, target: str, options: Sequence[str] = OPTIONS) -> str:
        """The PTX of ``code`` for "compute_80", or nothing but the assurance for "sm_80"."""
        program, size = ctypes.c_void_p(), ctypes.c_size_t()
        self.library.nvrtcCreateProgram(ctypes.byref(program), code.encode(), name.encode(), 0, None, None)
        given = [option.encode() for option in (*options, *self.includes, f"--gpu-architecture={target}")]
        arguments = (program, len(given), (ctypes.c_char_p * len(given))(*given))
        # NVRTC 12.4 leaves the thread another locale, by which Python would read files.
        with ThreadPoolExecutor(1) as thread:
            failed = thread.submit(self.library.nvrtcCompileProgram, *arguments).result()
        what = "ProgramLog" if failed else "PTX"
        getattr(self.library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        getattr(self.library, f"nvrtcGet{what}")(program, text)
        self.library.nvrtcDestroyProgram(ctypes.byref(program))
        if failed:
            raise CompileError(text.value.decode())
        return text.value.decode()


def sources() -> list[Path]:
    """All but target.cu, which speaks to the CUDA runtime alone."""
    return sorted(set((ROOT / "csrc/cuda").glob("*.cu")) - {ROOT / "csrc/cuda/target.cu"})
