"""What every operator shares: checks with their messages, memory formats, output sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from zfcuda import core

#: Switches are one byte.
MAX_WINDOW = 256

MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)


def pair(name: str, value: int | Sequence[int]) -> list[int]:
    """``value`` for height and width, from one integer or two.

    Raises
    ------
    TypeError
        If it is neither.
    """
    values: list[Any] = list(value) if isinstance(value, (tuple, list)) else [value]
    values = values * 2 if len(values) == 1 else values
    if len(values) != 2 or not all(map(_is_int, values)):
        raise TypeError(f"{name} is {value!r}; it must be an int or two ints (height, width)")
    return values


def integers(name: str, value: Sequence[int]) -> list[int]:
    """``value`` as a list if it is a sequence of integers, else TypeError."""
    if not isinstance(value, (tuple, list)) or not all(map(_is_int, value)):
        raise TypeError(f"{name} is {value!r}; it must be a sequence of ints")
    return list(value)


def integer(name: str, value: int) -> int:
    """``value`` itself if it is an integer, else TypeError."""
    if not _is_int(value):
        raise TypeError(f"{name} is {value!r}; it must be an int")
    return value


def flag(name: str, value: bool) -> bool:
    """``value`` itself if it is a bool, else TypeError."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; it must be a bool")
    return value


def number(name: str, value: float) -> float:
    """``value`` as a float if it is a real number, else TypeError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}; it must be a float")
    return float(value)


def tensor(name: str, value: Any, optional: bool = False) -> Any:
    """``value`` itself if it is a tensor (or None where that is allowed), else TypeError."""
    if not isinstance(value, Tensor) and not (optional and value is None):
        wanted = "a torch.Tensor or None" if optional else "a torch.Tensor"
        raise TypeError(f"{name} is a {type(value).__name__}; it must be {wanted}")
    return value


def option(name: str, value: str, choices: Sequence[str]) -> str:
    """``value`` itself if it is one of ``choices``, else ValueError."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, choices))}")
    return value


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def check_tensor(name: str, value: Tensor, rank: int = 4, like: Tensor | None = None) -> None:
    """Check rank, dtype and device of a floating-point argument; ``like`` is the operator's first one.

    Raises
    ------
    RuntimeError
        If one of them is wrong, or a dimension other than the batch is empty.
    """
    if value.dim() != rank:
        hint = " (batch, channels, height, width): add a batch dimension with unsqueeze(0)" if rank == 4 else ""
        raise RuntimeError(f"{name} has shape {tuple(value.shape)}; it must have {rank} dimensions{hint}")
    if value.dtype not in core.DTYPES:
        supported = ", ".join(map(str, core.DTYPES))
        raise RuntimeError(f"{name} has dtype {value.dtype}; it must be one of {supported}: convert it with .to()")
    if rank == 4 and 0 in value.shape[1:]:
        raise RuntimeError(
            f"{name} has shape {tuple(value.shape)}; only the batch (dimension 0) may be empty: "
            "give every other dimension at least one element"
        )
    if like is not None:
        if value.dtype != like.dtype:
            raise RuntimeError(
                f"{name} has dtype {value.dtype}; it must be {like.dtype} like the first argument: "
                "convert it with .to()"
            )
        check_device(name, value, like)


def check_device(name: str, value: Tensor, like: Tensor) -> None:
    """Check that an argument lies where the operator's first one does."""
    if value.device != like.device:
        raise RuntimeError(
            f"{name} is on {value.device}; it must be on {like.device} like the first argument: move it with .to()"
        )


def check_shape(name: str, value: Tensor, shape: Sequence[int], why: str) -> None:
    """Check that ``value`` has exactly ``shape``, which ``why`` explains."""
    if tuple(value.shape) != tuple(shape):
        raise RuntimeError(f"{name} has shape {tuple(value.shape)}; it must be {tuple(shape)}, {why}")


def check_at_least(minimum: int, **arguments: Sequence[int]) -> None:
    """Check that both numbers of every argument are at least ``minimum``, and that sums of them are no overflow."""
    for name, values in arguments.items():
        for value in values:
            if value < minimum:
                raise RuntimeError(f"{name} is {tuple(values)}; both numbers must be at least {minimum}")
            if value >= 1 << 31:
                raise RuntimeError(f"{name} is {tuple(values)}; both numbers must be less than 2^31")


def memory_format(value: Tensor) -> torch.memory_format:
    """The dense layout in which an operator computes ``value`` and gives its output.

    channels_last where the channels are the innermost dimension, contiguous elsewhere. The strides of
    dimensions of size one never matter, for they may differ between a tensor and its fake.
    """
    if value.is_contiguous() or value.size(1) == 1 or value.stride(1) != 1:
        return torch.contiguous_format
    outer = all(n == 1 or step >= value.size(1) for n, step in zip(value.shape[2:], value.stride()[2:], strict=True))
    return torch.channels_last if outer else torch.contiguous_format  # not outer: expanded over the plane


def dense(value: MaybeTensor, layout: torch.memory_format = torch.contiguous_format) -> MaybeTensor:
    """``value`` in one of the two dense layouts: itself where it has it already."""
    return None if value is None else value.contiguous(memory_format=layout)
