"""NumPy's, CuPy's and other libraries' arrays as arguments, by DLPack: no copy in, no copy out, on their stream."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["on_arrays"]

#: A CUDA device, to DLPack.
_DL_CUDA = 2


def on_arrays(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call ``function``, of whose arguments none is a tensor, with tensors in the place of arrays.

    It then returns arrays of the kind of the first one. Without any the call is an ordinary one, and will be refused.

    Raises
    ------
    TypeError
        If arrays of two kinds meet, or an array cannot be a tensor.
    """
    first = next((a for a in (*args, *kwargs.values()) if _is_array(a)), None)
    if first is None:
        return function(*args, **kwargs)
    kind = type(first)
    writes = function.__name__.endswith("_")
    with _stream_of(first):
        tensors = [_with_tensors(a, kind, writes) for a in args]
        named = {name: _with_tensors(a, kind, writes or name == "out") for name, a in kwargs.items()}
        results = function(*tensors, **named)
        return tuple(_array(r, first) for r in results) if isinstance(results, tuple) else _array(results, first)


def _is_array(value: Any) -> bool:
    return hasattr(value, "__dlpack__") and not isinstance(value, (Tensor, np.generic))


def _stream_of(array: Any) -> AbstractContextManager[Any]:
    """Torch works on the stream that is current in CuPy, so that neither waits for the other."""
    kind, device = array.__dlpack_device__()
    library = _library(array)
    if int(kind) != _DL_CUDA or not hasattr(library, "cuda"):
        return nullcontext()
    pointer = library.cuda.get_current_stream().ptr
    where = torch.device("cuda", device)
    if pointer == 0:  # which ExternalStream takes for none
        return torch.cuda.stream(torch.cuda.default_stream(where))
    return torch.cuda.stream(torch.cuda.ExternalStream(pointer, where))


def _library(array: Any) -> Any:
    return importlib.import_module(type(array).__module__.partition(".")[0])


def _with_tensors(value: Any, kind: type, written: bool) -> Any:
    """An argument, with a tensor for an array; ``written`` forbids that it is a copy."""
    if isinstance(value, (tuple, list)):
        return type(value)(_with_tensors(v, kind, written) for v in value)
    if not _is_array(value):
        return value
    if type(value) is not kind:
        raise TypeError(f"an argument is a {_name(type(value))}, another a {_name(kind)}; give arrays of one library")
    try:
        # Such as image[..., ::-1], which ends the process within torch.
        if any(step < 0 for step in getattr(value, "strides", None) or ()):
            raise BufferError("it has negative strides")
        return torch.from_dlpack(value)
    except BufferError as error:
        return _copied(value, error, written)


def _copied(array: Any, reason: BufferError, written: bool) -> Tensor:
    """What has strides or a byte order that torch does not know, or may not be written to, in memory of its own."""
    if written:
        raise TypeError(f"an array is to be written into, but {reason}; give one that torch can share memory with")
    try:
        return torch.from_dlpack(array.astype(array.dtype.newbyteorder("="), copy=True))
    except BufferError as error:
        raise TypeError(f"an array of dtype {array.dtype} cannot be a tensor: {error}") from error


def _array(tensor: Tensor, like: Any) -> Any:
    """The tensor's memory, as an array of the kind of ``like``."""
    if isinstance(like, np.ndarray):
        return tensor.numpy()  # NumPy takes older versions of DLPack for memory that it may not write to
    library = like.__array_namespace__() if hasattr(like, "__array_namespace__") else _library(like)
    return library.from_dlpack(tensor)


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
