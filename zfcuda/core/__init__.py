"""The compiled core: which module serves which device, and how to call it.

A backend is a compiled module with the functions of ``csrc/ops.h``: ``_cpu_<level>`` for each
instruction-set level and ``_cuda``. They know nothing of torch; this module turns tensors into addresses
and adds the device, the current stream and the number of threads to each call.
"""

from __future__ import annotations

import importlib
import platform
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any

import torch  # before any backend: they share the OpenMP runtime that torch has loaded
from torch import Tensor

DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
#: Precision of csrc/ops.h: how CUDA's convolutions multiply float32.
PRECISIONS = {"ieee": 0, "3xtf32": 1, "tf32": 2}
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


#: What the user asked for; None leaves it to torch. Of the process: backward passes run in threads of their own.
_precision: str | None = None


def set_precision(mode: str | None) -> str | None:
    """Set the numeric mode of CUDA's convolutions, None for torch's, and return the one before."""
    global _precision
    before, _precision = _precision, mode
    return before


def cuda_precision() -> int:
    """Precision of csrc/ops.h for CUDA: what was set, else what torch allows cuDNN in convolutions."""
    if _precision is not None:
        return PRECISIONS[_precision]
    new = getattr(torch.backends.cudnn, "conv", None)  # since torch 2.9
    allowed = torch.backends.cudnn.allow_tf32 if new is None else new.fp32_precision == "tf32"
    return PRECISIONS["tf32" if allowed else "ieee"]


def _exec(device: torch.device) -> tuple[int, int, int, int]:
    if device.type == "cuda":
        return device.index, torch.cuda.current_stream(device).cuda_stream, 0, cuda_precision()
    return 0, 0, torch.get_num_threads(), PRECISIONS["ieee"]


def precision(like: Tensor) -> int:
    """The mode in which :func:`run` computes where ``like`` is."""
    return _exec(like.device)[-1]


def _address(argument: Any) -> Any:
    return argument.data_ptr() if isinstance(argument, Tensor) else argument


def run(function: str, like: Tensor, *arguments: Any, precision: int | None = None) -> None:
    """Call ``function`` of ``csrc/ops.h`` on the device of ``like``, on its current stream.

    Tensors among the arguments become addresses; they must be dense, checked and on one device. ``precision`` is the
    present one unless given.
    """
    call = getattr(_backend(like.device), function)
    *where, present = _exec(like.device)
    call(*map(_address, arguments), (*where, present if precision is None else precision))
    if record := _recording():
        record.calls.append(_Call(function, arguments))


def empty(
    size: Sequence[int],
    like: Tensor,
    dtype: torch.dtype | None = None,
    layout: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """An uninitialised tensor for :func:`run` to write, on the device and by default of the dtype of ``like``."""
    tensor = torch.empty(size, dtype=dtype or like.dtype, device=like.device, memory_format=layout)
    if record := _recording():
        record.allocated.append(tensor)
    return tensor


def room(function: str, like: Tensor, *arguments: Any) -> Tensor:
    """As many uninitialised bytes as ``function`` answers to these arguments."""
    size = getattr(_backend(like.device), function)(*arguments, _exec(like.device))
    return empty([size], like, dtype=torch.uint8)


def workspace(function: str, like: Tensor, *arguments: Any) -> Tensor:
    """The scratch memory that ``function`` asks for with these arguments, uninitialised."""
    return room(f"{function}_workspace", like, *arguments)


def capturing(like: Tensor) -> bool:
    """Whether work on this tensor's device is being recorded into a CUDA graph, so that its values cannot be read."""
    return like.is_cuda and torch.cuda.is_current_stream_capturing()


def find(function: str, like: Tensor, *arguments: Any) -> int:
    """The index that ``function`` finds and writes as its last argument, -1 for none; waits for the device."""
    found = empty([1], like, dtype=torch.int64)
    run(function, like, *arguments, found)
    if record := _recording():
        record.calls[-1].found = found
    return int(found)


# ---------------------------------------------------------------- calls that can be repeated


@dataclass
class _Call:
    """A kernel's name and arguments; for those of :func:`find` the tensor with their answer."""

    function: str
    arguments: tuple[Any, ...]
    found: Tensor | None = None


@dataclass
class Record:
    """What a call of an operator came to, on this thread: kernels, and the tensors allocated for them."""

    calls: list[_Call] = field(default_factory=list)
    allocated: list[Tensor] = field(default_factory=list)

    def teach(
        self, memo: Any, key: bytes, arguments: tuple[Any, ...], result: Any, written: Iterable[Tensor] = ()
    ) -> None:
        """Let ``memo`` repeat the call that had ``arguments``, of which it has ``written`` some.

        Not if a kernel read, or the call returned, a tensor that is neither an argument nor allocated for it: something
        else computed that, such as a copy into other strides. Nor if a GPU's kernel had to find nothing, which the host
        cannot see, or is not asked to while a graph is captured.
        """
        results = result if isinstance(result, tuple) else (result,)
        inputs = [a for a in arguments if isinstance(a, Tensor)]
        used = {id(t) for call in self.calls for t in call.arguments if isinstance(t, Tensor)}
        made = [t for t in self.allocated if id(t) in used and t.numel()]
        numbers: dict[int, int | None] = {id(t): None for t in self.allocated}  # nothing is at an empty one
        numbers |= {id(t): n for n, t in enumerate([*inputs, *made])}
        first = len(inputs)
        places = [n - first for t in results if (n := numbers.get(id(t))) is not None and n >= first]
        if not self.calls or not used <= numbers.keys() or len(places) != len(results):
            return
        if not {id(t) for t in written} <= used:
            return
        like = inputs[0]
        if like.is_cuda and (any(call.found is not None for call in self.calls) or capturing(like)):
            return
        prepare = _backend(like.device).prepare
        steps = []
        for call in self.calls:
            slots = tuple(numbers[id(a)] if isinstance(a, Tensor) else a for a in call.arguments)
            steps.append((prepare(call.function, slots), -1 if call.found is None else numbers[id(call.found)]))
        small = sum(t.numel() * t.element_size() for t in (*inputs, *made)) <= _SMALL
        memo.learn(
            key,
            steps,
            list(map(_allocation, made)),
            places,
            not isinstance(result, tuple),
            small,
        )


#: Bytes of all tensors up to which a kernel takes less time than another thread needs to get the GIL.
_SMALL = 1 << 15


def _allocation(tensor: Tensor) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
    """A function and arguments for it that allocate a tensor like this one."""
    if tensor.is_cpu and _empty_strided_cpu:
        return _empty_strided_cpu, (tuple(tensor.shape), tensor.stride(), tensor.dtype)
    prototype = torch.empty_like(tensor)
    prototype.untyped_storage().resize_(0)
    return torch.empty_like, (prototype,)


#: What compiled graphs allocate by: half the time of ``torch.empty_strided``.
_empty_strided_cpu = getattr(torch._C._dynamo.guards, "_empty_strided_cpu", None)


_THREAD = threading.local()


def _recording() -> Record | None:
    return getattr(_THREAD, "record", None)


@contextmanager
def recording() -> Iterator[Record]:
    """Writes down what this thread runs and allocates."""
    outer, _THREAD.record = _recording(), Record()
    try:
        yield _THREAD.record
    finally:
        _THREAD.record = outer


def memo(guards: list[Callable[[], Any]]) -> Any:
    """A ``Memo`` of ``csrc/memo.h``; None with a torch before 2.10, which gives no C function that reads tensors."""
    exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if exchange is None:
        return None
    types, modes = (Tensor, torch.nn.Parameter), (torch.is_grad_enabled, torch.get_num_threads, cuda_precision)
    return cpu().Memo(types, guards, *modes, vars(torch.autograd.forward_ad), exchange)
