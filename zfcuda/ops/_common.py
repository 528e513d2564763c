"""What every operator shares: checks with their messages, memory formats, output sizes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zfcuda import core


def pair(name: str, value: int | Sequence[int]) -> list[int]:
    """``value`` for height and width, from one integer or two.

    Raises
    ------
    TypeError
        If it is neither.
    """
    values = list(value) if isinstance(value, Sequence) else [value]
    values = values * 2 if len(values) == 1 else values
    if len(values) != 2 or not all(isinstance(v, (int, torch.SymInt)) for v in values):
        raise TypeError(f"{name} is {value!r}; it must be an int or two ints (height, width)")
    return values


def require(condition: bool, message: str) -> None:
    """Raise torch's error type for a bad tensor or size: ``RuntimeError(message)``."""
    if not condition:
        raise RuntimeError(message)


def check_tensor(name: str, tensor: Tensor, rank: int = 4, like: Tensor | None = None) -> None:
    """Check type, rank, dtype and device of a floating-point argument; ``like`` is the first one."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; it must be a torch.Tensor")
    require(
        tensor.dim() == rank,
        f"{name} has shape {tuple(tensor.shape)}; it must have {rank} dimensions"
        + (" (batch, channels, height, width): add a batch dimension with unsqueeze(0)" if rank == 4 else ""),
    )
    supported = " or ".join(str(d) for d in core.DTYPES)
    require(tensor.dtype in core.DTYPES, f"{name} has dtype {tensor.dtype}; it must be {supported}: convert it with .to()")
    if like is not None:
        require(tensor.dtype == like.dtype, f"{name} has dtype {tensor.dtype}; it must be {like.dtype} like the input: convert it with .to()")
        check_device(name, tensor, like)


def check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    """Check that an argument lies where the first one does."""
    require(tensor.device == like.device, f"{name} is on {tensor.device}; it must be on {like.device} like the input: move it with .to()")


def memory_format(tensor: Tensor) -> torch.memory_format:
    """The dense layout an operator computes ``tensor`` in and gives its output: channels_last where the
    channels are the innermost dimension, contiguous elsewhere."""
    if tensor.is_contiguous():
        return torch.contiguous_format
    return torch.channels_last if tensor.stride(1) == 1 and tensor.size(1) > 1 else torch.contiguous_format
