"""The processes that mine together."""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist
from torch import Tensor

__all__ = ["Ranks", "is_first"]


def is_first() -> bool:
    """Whether this is rank 0, of an initialised `torch.distributed` or of ``torchrun``, or the only process."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"


class Ranks:
    """The ranks of an initialised `torch.distributed`, those of ``torchrun``, or this process alone.

    What they exchange lies in main memory, so they use gloo, whatever the process group of the model.
    """

    rank, size = 0, 1

    def __enter__(self) -> Ranks:
        self._started = False
        self._group: dist.ProcessGroup | None = None  # the initialised one
        if not dist.is_available():
            return self
        if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ:
            dist.init_process_group("gloo")
            self._started = True
        if dist.is_initialized():
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
            if self.size > 1 and dist.get_backend() != "gloo":
                self._group = dist.new_group(backend="gloo")
        return self

    def __exit__(self, *exception: object) -> None:
        if self._started:
            dist.destroy_process_group()
        elif self._group is not None:
            dist.destroy_process_group(self._group)

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, on each of them."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def sum(self, tensor: Tensor) -> None:
        """Add up the tensors of all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self._group)
