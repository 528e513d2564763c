"""What an operator gives: tensors that it allocates, or the caller's, after ``out=``, which must fit exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zfcuda import core
from zfcuda.ops._common import check_device, check_shape, tensor


@dataclass(frozen=True)
class Result:
    """A tensor of this size on the device of ``like``, and of its dtype but for another one given.

    The layout is one of the two dense ones, or ``torch.preserve_format``: the strides of ``like``, whose size it has.
    """

    like: Tensor
    size: Sequence[int]
    layout: torch.memory_format = torch.contiguous_format
    dtype: torch.dtype | None = None

    def allocate(self) -> Tensor:
        """Uninitialised memory."""
        if self.layout == torch.preserve_format:
            return torch.empty_like(self.like, dtype=self.dtype)
        return core.empty(self.size, self.like, self.dtype, self.layout)

    def check(self, name: str, out: Tensor) -> None:
        """Raise RuntimeError unless ``out``, the argument called ``name``, is what would have been allocated."""
        dtype = self.dtype or self.like.dtype
        if out.dtype != dtype:
            raise RuntimeError(f"{name} has dtype {out.dtype}; it must be {dtype}")
        check_shape(name, out, self.size, "the result's shape")
        check_device(name, out, self.like)
        if not out.is_contiguous(memory_format=self.layout):
            raise RuntimeError(
                f"{name} has strides {out.stride()}; it must be dense in the memory format of the first argument: "
                f"allocate it with memory_format={self.layout}"
            )


def outputs(out: Any, count: int) -> list[Tensor]:
    """``out`` as a list of ``count`` tensors.

    Raises
    ------
    TypeError
        If it is not one tensor, or a tuple or list of ``count`` > 1 of them.
    """
    if count == 1:
        return [tensor("out", out)]
    if not isinstance(out, (tuple, list)) or len(out) != count:
        raise TypeError(f"out is a {type(out).__name__}; it must be a tuple of {count} tensors")
    return [tensor(f"out[{i}]", value) for i, value in enumerate(out)]


def refuse_gradients(name: str, *tensors: Tensor) -> None:
    """Raise RuntimeError if autograd would have to record what is written into ``out``, as torch does."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise RuntimeError(
            f"zfcuda.ops.{name} with out= is not differentiable, but one of its tensors requires grad: leave out= "
            "away, or call it under torch.no_grad()"
        )


def check_apart(outs: dict[str, Tensor], inputs: dict[str, Tensor]) -> None:
    """Raise RuntimeError if an output shares memory with another one or with an input."""
    if pair := meeting(outs, inputs):
        raise RuntimeError(f"{pair[0]} shares memory with {pair[1]}; it must have its own: allocate it anew")


def meeting(outs: dict[str, Tensor], inputs: dict[str, Tensor]) -> tuple[str, str] | None:
    """The names of an output and of what it shares memory with, another one or an input, if there are any."""
    seen = {name: _extent(value) for name, value in inputs.items() if value.numel()}
    for name, value in outs.items():
        begin, end = _extent(value)
        for other, (from_, to) in seen.items():
            if value.numel() and begin < to and from_ < end:
                return name, other
        seen[name] = begin, end
    return None


def _extent(value: Tensor) -> tuple[int, int]:
    """The addresses between which a tensor's elements lie."""
    begin = value.data_ptr()
    if value.is_contiguous():
        return begin, begin + value.nbytes
    last = sum((n - 1) * step for n, step in zip(value.shape, value.stride(), strict=True))
    return begin, begin + (last + 1) * value.element_size()
