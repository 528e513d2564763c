"""What a projection was asked for, with its arguments checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from zfcuda import core

__all__ = [
    "GATES",
    "Asked",
    "Gate",
    "Overlap",
    "Start",
    "Units",
    "check_gate",
    "gather",
    "is_single",
    "strongest_positions",
    "unit_index",
]

Units = int | Sequence[int] | Sequence[Sequence[int]] | Tensor
Start = Literal["value"] | float | Tensor
Gate = Literal["deconvnet", "backprop", "guided"]
Overlap = Literal["sum", "overwrite"]
GATES = ("deconvnet", "backprop", "guided")


class Asked(NamedTuple):
    """Units (N, U), their positions (N, U, 2), or None where they have none, and starts (N, U)."""

    units: Tensor
    positions: Tensor | None
    starts: Tensor
    gate: str
    overlap: str

    @staticmethod
    def of(
        map_: Tensor,
        layer: str,
        units: Units,
        position: tuple[int, int] | Tensor | None,
        start: Start,
        gate: str,
        overlap: str,
    ) -> Asked:
        """The arguments of `DeconvNet.project` for the map (N, K, h, w) or (N, K) of its layer."""
        check_gate(gate)
        if overlap not in ("sum", "overwrite"):
            raise ValueError(f"overlap is {overlap!r}; it must be 'sum' or 'overwrite'")
        index, single = unit_index(map_, layer, units), is_single(units)
        if position is None:
            positions = strongest_positions(map_, index)
        else:
            positions = _positions(map_, layer, index, position, single)
        return Asked(index, positions, _starts(map_, index, positions, start, single), gate, overlap)

    @property
    def flat_positions(self) -> Tensor:
        """(N * U, 2)."""
        assert self.positions is not None
        return self.positions.flatten(0, 1)


def check_gate(gate: str) -> None:
    """Raise ValueError unless ``gate`` is one."""
    if gate not in GATES:
        raise ValueError(f"gate is {gate!r}; it must be one of {', '.join(map(repr, GATES))}")


def is_single(units: Units) -> bool:
    return isinstance(units, int) or (isinstance(units, Tensor) and units.dim() == 0)


def unit_index(map_: Tensor, layer: str, units: Units) -> Tensor:
    """Units as an int64 tensor (N, U), checked."""
    index = torch.as_tensor(units, device=map_.device)
    if index.numel() and (index.is_floating_point() or index.dtype == torch.bool):
        raise TypeError(f"units has dtype {index.dtype}; it must be integers")
    batch, count = map_.shape[:2]
    index = index.long().reshape(1, 1) if index.dim() == 0 else index.long()
    if index.dim() > 2 or (index.dim() == 2 and index.shape[0] not in (1, batch)):
        raise RuntimeError(
            f"units has shape {tuple(index.shape)}; it must be an int, (U,), or (N, U) with N = {batch} images"
        )
    outside = (index < 0) | (index >= count)
    if not core.capturing(index) and outside.any():
        wrong = index[outside]
        raise IndexError(f"units has {int(wrong[0])}; layer {layer!r} has units 0 to {count - 1}")
    return index.expand(batch, index.shape[-1])


def strongest_positions(map_: Tensor, index: Tensor) -> Tensor | None:
    """(N, U, 2): the first maximum of each map in row-major order."""
    if map_.dim() == 2:
        return None
    images = torch.arange(len(map_), device=map_.device)[:, None]
    flat = map_[images, index].flatten(2).argmax(2)
    return torch.stack((flat // map_.shape[3], flat % map_.shape[3]), -1)


def _positions(map_: Tensor, layer: str, index: Tensor, position: tuple[int, int] | Tensor, single: bool) -> Tensor:
    """Given positions as (N, U, 2), checked."""
    if map_.dim() == 2:
        raise ValueError(f"position is {position!r}; units of layer {layer!r} have none: leave it out")
    given = torch.as_tensor(position, device=map_.device)
    if given.is_floating_point():
        raise TypeError(f"position has dtype {given.dtype}; it must be integers")
    where = _broadcast("position", given.long(), (*index.shape, 2), single)
    y, x = where.unbind(-1)
    outside = (where < 0).any(-1) | (y >= map_.shape[2]) | (x >= map_.shape[3])
    if not core.capturing(where) and outside.any():
        wrong = where[outside]
        raise IndexError(
            f"position has {tuple(wrong[0].tolist())}; maps of layer {layer!r} have {map_.shape[2]} rows "
            f"and {map_.shape[3]} columns"
        )
    return where


def _starts(map_: Tensor, index: Tensor, positions: Tensor | None, start: Start, single: bool) -> Tensor:
    """What to start from, as (N, U)."""
    if isinstance(start, str):
        if start != "value":
            raise ValueError(f"start is {start!r}; it must be 'value', a number or a tensor")
        return gather(map_, index, positions)
    given = torch.as_tensor(start, dtype=map_.dtype, device=map_.device)
    return _broadcast("start", given, tuple(index.shape), single)


def _broadcast(name: str, given: Tensor, shape: tuple[int, ...], single: bool) -> Tensor:
    """``given`` expanded to (N, U, …), or from (N, …) where there is a single unit."""
    wanted = shape[:1] + shape[2:] if single else shape
    try:
        expanded = given.expand(wanted)
    except RuntimeError:
        raise RuntimeError(f"{name} has shape {tuple(given.shape)}; it must broadcast to {wanted}") from None
    return expanded.unsqueeze(1) if single else expanded


def gather(map_: Tensor, index: Tensor, positions: Tensor | None) -> Tensor:
    """(N, U): the activations at the positions."""
    images = torch.arange(len(map_), device=map_.device)[:, None]
    where = (images, index) if positions is None else (images, index, *positions.unbind(-1))
    return map_[where]
