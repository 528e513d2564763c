"""Calls the kernels of ``tests/simt/kernels``, on the emulator or on a GPU."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simt import build
from simt.backend import ORDERS, Order, configure, register

KERNELS = Path(__file__).parent / "kernels"


class Out:
    """An argument that the kernel writes."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


class Emulated:
    """One file of kernels on the emulator; a report raises RuntimeError."""

    device = "cpu"

    def __init__(self, name: str, fast: bool = False):
        path = build.library(f"{name}_fast" if fast else name, [KERNELS / f"{name}.cu"], fast)
        self.library, self.arch = build.controls(path), 86

    def __call__(self, function: str, *arguments: Any, order: Order = ORDERS["forward"]) -> None:
        configure(self.library, order, self.arch)
        for i, argument in enumerate(arguments):
            if isinstance(argument, (Tensor, Out)):
                tensor = argument.tensor if isinstance(argument, Out) else argument
                name = f"argument {i} of {function}"
                register(self.library, tensor.data_ptr(), tensor.nbytes, isinstance(argument, Out), name)
        try:
            _call(self.library, function, arguments)
        finally:
            self.library.zf_simt_forget()


class OnGpu:
    """The same file compiled by nvcc for the GPU of this machine."""

    device = "cuda"

    def __init__(self, name: str):
        path = build.FOLDER / f"{name}_gpu.so"
        path.parent.mkdir(parents=True, exist_ok=True)
        compile_for_gpu(name, path, "native")
        self.library = ctypes.CDLL(str(path))

    def __call__(self, function: str, *arguments: Any) -> None:
        _call(self.library, function, arguments)
        torch.cuda.synchronize()


def compile_for_gpu(name: str, out: Path, arch: str) -> None:
    """A shared library of one file of kernels by nvcc, for ``arch`` ("native", "sm_80" …)."""
    toolkit = build.build.find_toolkit()
    assert toolkit, "no nvcc"
    includes = [f"-I{toolkit.include}", f"-I{build.ROOT / 'csrc'}", f"-I{build.ROOT / 'csrc/cuda'}"]
    flags = ["-std=c++17", f"-arch={arch}", "-shared", "-Xcompiler", "-fPIC", f"-L{toolkit.libraries}"]
    subprocess.run([toolkit.nvcc, *flags, *includes, KERNELS / f"{name}.cu", "-o", out], check=True)


def _call(library: ctypes.CDLL, function: str, arguments: tuple[Any, ...]) -> None:
    call = getattr(library, function)
    call.restype = ctypes.c_char_p
    tensors = (a.tensor if isinstance(a, Out) else a for a in arguments)
    message = call(*(ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a for a in tensors))
    if message:
        raise RuntimeError(message.decode())
