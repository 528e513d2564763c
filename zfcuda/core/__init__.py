"""The compiled core: which module serves which device, and how to call it.

A backend is a compiled module with the functions of ``csrc/ops.h``: ``_cpu_<level>`` for each
instruction-set level and ``_cuda``. They know nothing of torch; this module turns tensors into addresses
and adds the device, the current stream and the number of threads to each call.
"""

from __future__ import annotations

import importlib
import platform
from functools import cache
from types import ModuleType
from typing import Any

import torch  # before any backend: they share the OpenMP runtime that torch has loaded
from torch import Tensor

DTYPES = {torch.float32: 0, torch.float64: 1}
GATES = {"none": 0, "deconvnet": 1, "backprop": 2, "guided": 3}


@cache
def cpu() -> ModuleType:
    """The CPU module of the best instruction-set level that this machine runs."""
    baseline = importlib.import_module("zfcuda.core._cpu_baseline")
    if platform.machine() != "x86_64":
        return baseline
    level = {"x86-64-v4": "v4", "x86-64-v3": "v3"}.get(baseline.machine(), "baseline")
    return importlib.import_module(f"zfcuda.core._cpu_{level}")


@cache
def cuda() -> ModuleType:
    """The CUDA module.

    Raises
    ------
    RuntimeError
        If zfcuda was built without CUDA kernels.
    """
    try:
        return importlib.import_module("zfcuda.core._cuda")
    except ModuleNotFoundError:
        raise RuntimeError(
            "zfcuda was built for the CPU only, but was given a CUDA tensor; reinstall with "
            "ZFCUDA_CUDA=on (see `zfcuda info`), or move the tensor to the CPU"
        ) from None


#: Where a device type finds its module. The tests put the emulator in the place of "cpu".
BACKENDS = {"cpu": cpu, "cuda": cuda}


def _backend(device: torch.device) -> ModuleType:
    if device.type not in BACKENDS:
        raise RuntimeError(
            f"zfcuda runs on {' and '.join(BACKENDS)} tensors, not on {device.type}; move the tensor to one of them"
        )
    return BACKENDS[device.type]()


def _exec(device: torch.device) -> tuple[int, int, int]:
    if device.type == "cuda":
        return device.index, torch.cuda.current_stream(device).cuda_stream, 0
    return 0, 0, torch.get_num_threads()


def _address(argument: Any) -> Any:
    return argument.data_ptr() if isinstance(argument, Tensor) else argument


def run(function: str, like: Tensor, *arguments: Any) -> None:
    """Call ``function`` of ``csrc/ops.h`` on the device of ``like``, on its current stream.

    Tensors among the arguments become addresses; they must be dense, checked and on one device.
    """
    call = getattr(_backend(like.device), function)
    call(*map(_address, arguments), _exec(like.device))


def room(function: str, like: Tensor, *arguments: Any) -> Tensor:
    """As many uninitialised bytes as ``function`` answers to these arguments."""
    size = getattr(_backend(like.device), function)(*arguments, _exec(like.device))
    return torch.empty(size, dtype=torch.uint8, device=like.device)


def workspace(function: str, like: Tensor, *arguments: Any) -> Tensor:
    """The scratch memory that ``function`` asks for with these arguments, uninitialised."""
    return room(f"{function}_workspace", like, *arguments)
