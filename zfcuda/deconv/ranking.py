"""The running lists of mining: the strongest entries of every map, and sums that no order of adding can change."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Entered", "ExactSums", "Ranking"]

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


class Entered(NamedTuple):
    """Candidates that entered a list: which they are, of which map, and where what belongs to them is kept."""

    candidates: Ints
    maps: Ints
    slots: Ints


class Ranking:
    """For each of ``maps`` maps its ``top`` strongest entries, strongest first.

    Equal values are in the order of images, then of positions. What belongs to an entry (its patch, its switches) stays
    where it is while others pass by: every entry has a *slot*, and one that enters takes that of one that leaves.

    Attributes
    ----------
    values, images, positions, slots : (maps, top)
        A missing entry has value 0 and image -1, and owns a slot too.
    """

    FIELDS = ("values", "images", "positions", "slots")

    def __init__(self, maps: int, top: int) -> None:
        self.values: Floats = np.zeros((maps, top), np.float32)
        self.images: Ints = np.full((maps, top), -1)
        self.positions: Ints = np.full((maps, top), -1)
        self.slots: Ints = np.tile(np.arange(top), (maps, 1))

    @property
    def weakest(self) -> Floats:
        """(maps,): what an entry of a later image must exceed."""
        return self.values[:, -1]

    def insert(self, maps: Ints, values: Floats, images: Ints, positions: Ints) -> Entered:
        """Offer candidates, all positive and in any order: one number of each array for each of them."""
        top = self.values.shape[1]
        touched, group = np.unique(maps, return_inverse=True)
        old = len(touched) * top
        groups = np.concatenate([np.repeat(np.arange(len(touched)), top), group.reshape(-1)])
        new = (values, images, positions, np.full(len(maps), -1))
        table = [np.concatenate([getattr(self, f)[touched].ravel(), n]) for f, n in zip(self.FIELDS, new, strict=True)]
        order = order_of(groups, *table[:3])
        first = np.searchsorted(groups[order], np.arange(len(touched)))
        kept = np.arange(len(order)) - first[groups[order]] < top
        # Of each map as many leave as enter; both are sorted by map.
        leaving, entering = order[~kept & (order < old)], order[kept & (order >= old)]
        table[3][entering] = table[3][leaving]
        for name, column in zip(self.FIELDS, table, strict=True):
            getattr(self, name)[touched] = column[order[kept]].reshape(-1, top)
        return Entered(entering - old, touched[groups[entering]], table[3][entering])


def order_of(groups: Ints, values: Floats, images: Ints, positions: Ints) -> Ints:
    """The rule: by value downwards, then by image, then by position."""
    return np.lexsort((positions, images, -values, groups))


class ExactSums:
    """Sums of float32 numbers without rounding, so that batches and ranks may be added in any order.

    A number is ``m · 2^(8 b - 173)`` with an integer ``m`` of at most 32 bits and its bin ``b``; the sum of each bin is
    an int64, exact for 2^31 numbers.
    """

    BITS = 8
    LOWEST = 173  # frexp's mantissa has 24 bits, its smallest exponent (of a subnormal number) is -148
    BINS = (128 + 149) // BITS + 1

    def __init__(self, count: int) -> None:
        self.bins: Ints = np.zeros((count, self.BINS), np.int64)

    def add(self, values: Floats) -> None:
        """Add finite numbers (n, count), n at most a million."""
        mantissa, exponent = np.frexp(values)
        bin_, shift = np.divmod(exponent + 149, self.BITS)
        integers = np.ldexp(mantissa.astype(np.float64), 24 + shift)
        place = np.arange(values.shape[1]) * self.BINS + bin_
        # The sums of these integers are exact in float64.
        self.bins += (
            np.bincount(place.ravel(), integers.ravel(), self.bins.size).astype(np.int64).reshape(-1, self.BINS)
        )

    def mean(self, count: int) -> Floats:
        """The sums divided by ``count``; zero where there is nothing."""
        totals: Any = [sum(int(m) << (self.BITS * b) for b, m in enumerate(row)) for row in self.bins.tolist()]
        return np.array([total / (max(count, 1) << self.LOWEST) for total in totals], np.float32)
