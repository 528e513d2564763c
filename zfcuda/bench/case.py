"""What is timed: a case is one piece of work, its contenders do it in their own ways, in one numeric mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import zfcuda

__all__ = ["FORMATS", "MODES", "Built", "Case", "Contender", "Mode", "Outputs", "Setting", "Unavailable"]

Call = Callable[[], Any]

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Unavailable(Exception):
    """A contender that cannot take part; the message says why, and what would help."""


@dataclass(frozen=True)
class Mode:
    """How the factors of a product are rounded: the dtype of the tensors, and what is allowed with float32 ones."""

    name: str
    dtype: torch.dtype = torch.float32
    allow_tf32: bool = False
    torch_has_it: bool = True

    @contextmanager
    def active(self) -> Iterator[None]:
        """With cuDNN's autotuner on: it runs in each contender's first calls, which are not timed."""
        cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
        before = cudnn.benchmark, cudnn.allow_tf32, products.allow_tf32
        cudnn.benchmark, cudnn.allow_tf32, products.allow_tf32 = True, self.allow_tf32, self.allow_tf32
        try:
            # None leaves ours to torch's setting, as users have it.
            with zfcuda.set_fp32_precision("3xtf32" if self.name == "3xtf32" else None):
                yield
        finally:
            cudnn.benchmark, cudnn.allow_tf32, products.allow_tf32 = before

    def require_torch(self) -> None:
        if not self.torch_has_it:
            raise Unavailable(f"torch has no {self.name}")


MODES = {
    mode.name: mode
    for mode in (
        Mode("ieee"),
        Mode("3xtf32", torch_has_it=False),
        Mode("tf32", allow_tf32=True),
        Mode("bf16", torch.bfloat16),
        Mode("fp16", torch.float16),
    )
}


@dataclass(frozen=True)
class Setting:
    """Where and how much.

    ``kind`` is what decides which rivals and which clock are meant, "cpu" or "cuda"; it is the device's type but where
    the tests let a processor stand in for a GPU.
    """

    device: torch.device
    kind: str
    threads: int
    quick: bool = False
    batch: int = 8
    state: Path = Path("build")  # where a trained network is kept for the next run

    def normal(self, *shape: int, mode: Mode = MODES["ieee"], layout: torch.memory_format | None = None) -> Tensor:
        """Normal values, the same ones for the same shape; never zeros, on which some processors are faster."""
        draw = torch.Generator().manual_seed(sum(shape))
        tensor = torch.randn(shape, generator=draw).to(self.device, mode.dtype)
        return tensor if layout is None else tensor.contiguous(memory_format=layout)


@dataclass(frozen=True)
class Outputs:
    """What a contender computed, for comparison: tensors, and where a pool found its maxima (y · width + x)."""

    values: Sequence[Tensor]
    indices: Tensor | None = None
    maps: Tensor | None = None  # of a reference only: what was pooled

    @staticmethod
    def of(result: Any) -> Outputs:
        return Outputs([result] if isinstance(result, Tensor) else list(result))


@dataclass
class Contender:
    """One way to do the work of a case.

    Attributes
    ----------
    prepare
        Makes the call that is timed; an exception names the contender as one that could not take part.
    reused
        Makes the call that writes into buffers that it keeps, where that is another call.
    read
        The result of a call as `Outputs`; None where it is meant to be another one, of which `lacks` tells.
    family
        Those that are the same rival with another batch or format share it.
    pieces
        How many units of the case a call does.
    slow_start
        Takes seconds to prepare, so `--quick` leaves it out.
    graph
        Can be captured into a CUDA graph.
    lacks
        What it leaves undone beside ours.
    """

    name: str
    prepare: Callable[[], Call]
    ours: bool = False
    reused: Callable[[], Call] | None = None
    read: Callable[[Any], Outputs] | None = Outputs.of
    family: str = ""
    pieces: int = 1
    slow_start: bool = False
    graph: bool = True
    lacks: str = ""


@dataclass
class Built:
    """A case with its tensors: the contenders, and the work of the first images in float64."""

    contenders: list[Contender]
    reference: Callable[[], Outputs] | None = None


@dataclass(frozen=True)
class Case:
    """A piece of work.

    ``flops`` and ``bytes`` are the least that one unit takes without reducing the number of multiplications: useful
    work, each input read and each output written once. 0 where nobody has counted.
    """

    group: str
    name: str
    mode: Mode
    build: Callable[[Setting, Mode], Built]
    flops: int = 0
    bytes: int = 0
    unit: str = "call"
    quick: bool = True
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def key(self) -> str:
        return f"{self.group}/{self.name}/{self.mode.name}"
