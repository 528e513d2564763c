"""The emulator's own safety net: each injected bug is reported, for what it is, under every order of the threads.

The reports come from the access checks, so they do not depend on luck: a lost atomic and a missing barrier before
an asynchronous refill leave the numbers right under most schedules.
"""

from __future__ import annotations

import pytest
import torch

from simt.backend import ORDERS
from simt.harness import Emulated, Out

RAW, WAR, WAW = (f"{a} after {b} without order" for a, b in (("read", "write"), ("write", "read"), ("write", "write")))

#: function, bug -> the kind of the report. Where there are two, the order of the threads decides which comes first.
BUGS = {
    ("transpose", 1): f"uninitialised read|{RAW}",  # no barrier after the fill
    ("transpose", 2): f"{RAW}|{WAR}",  # no barrier before the refill
    ("transpose", 3): "out of bounds",  # reads one element beyond the matrix
    ("transpose", 4): "out of bounds",  # the tile's stride is too large
    ("transpose", 8): "uninitialised read",  # a column that nobody filled
    ("transpose", 9): "write to an input",
    ("transpose", 10): "divergent barrier",
    ("transpose", 11): "barrier after exit|deadlock",
    ("transpose", 17): WAW,  # two blocks write the same tile
    ("histogram", 5): "misaligned access",  # of an int4
    ("histogram", 6): RAW,  # += for atomicAdd
    ("histogram", 12): "deadlock",  # half of the warp stays away from a shuffle
    ("histogram", 13): "warp mask",  # a lane that its own mask does not name
    ("histogram", 15): "deadlock",  # the same shuffle, from two places
    ("swap", 14): RAW,  # a shuffle for a __syncwarp
    ("swap", 16): RAW,  # a __syncwarp of half a warp
    ("swap", 18): RAW,  # a __syncwarp for another warp
    ("teams", 19): f"uninitialised read|{RAW}",  # a barrier of a team for one of the block
    ("teams", 20): RAW,  # a barrier of a warp for one of the team
    ("teams", 21): f"uninitialised read|{RAW}|{WAR}",  # what another team has written, behind a barrier of one's own
    ("teams", 22): "divergent barrier",
    ("teams", 23): "barrier after exit|deadlock",
    ("teams", 24): f"{WAR}|{RAW}",  # no barrier before the next turn
    ("teams", 25): "team barrier",  # of another number of threads
    ("product", 1): WAR,  # no barrier before the asynchronous refill
    ("product", 2): "access to a pending asynchronous copy",  # waits for too few groups
    ("product", 3): RAW,  # no barrier after the wait
    ("product", 4): "misaligned access",  # of a copy's source
    ("product", 6): "misaligned access",  # of an ldmatrix row
    ("product", 7): "asynchronous copies in flight",
}


@pytest.fixture(scope="module")
def kernels() -> dict[str, Emulated]:
    bugs, product = Emulated("bugs"), Emulated("product")
    return {"transpose": bugs, "histogram": bugs, "swap": bugs, "teams": bugs, "product": product}


def run(kernels: dict[str, Emulated], function: str, bug: int, order: str) -> bool:
    """Run a kernel; True if its result is right."""
    generator = torch.Generator().manual_seed(bug)

    def integers(*size: int) -> torch.Tensor:
        return torch.randint(0, 16, size, dtype=torch.int32, generator=generator)

    call = kernels[function]
    if function == "transpose":
        source, out = integers(16, 16).float(), torch.empty(16, 16)
        call("transpose", bug, 16, source, Out(out), order=ORDERS[order])
        return torch.equal(out, source.T)
    if function == "histogram":
        values, counts, total = integers(500), torch.empty(16, dtype=torch.int32), torch.empty(1, dtype=torch.int32)
        call("histogram", bug, 500, values, Out(counts), Out(total), order=ORDERS[order])
        return torch.equal(counts, torch.bincount(values, minlength=16).int()) and total.item() == 500
    if function == "swap":
        values, out = integers(64), torch.empty(64, dtype=torch.int32)
        call("swap", bug, values, Out(out), order=ORDERS[order])
        return torch.equal(out, values.view(-1, 2).flip(1).flatten())
    if function == "teams":
        values, out = integers(5, 64), torch.empty(5, 64, dtype=torch.int32)
        call("teams", bug, values, Out(out), order=ORDERS[order])
        return torch.equal(out, (values + torch.arange(64)).flip(1).int())
    a, b, c = integers(40, 64).bfloat16(), integers(64, 8).bfloat16(), torch.empty(40, 8)
    call("product", bug, 1, 40, 64, 128, a, b, Out(c), order=ORDERS[order])
    return torch.equal(c, a.float() @ b.float())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("function", ["transpose", "histogram", "swap", "teams", "product"])
def test_the_right_kernel_passes(kernels, function, order):
    assert run(kernels, function, 0, order)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("function", "bug"), BUGS)
def test_a_bug_is_reported(kernels, function, bug, order):
    with pytest.raises(RuntimeError, match=f"^emulator: ({BUGS[function, bug]}): ") as report:
        run(kernels, function, bug, order)
    assert f"{function}_kernel" in str(report.value)  # which kernel,
    assert ".cu:" in str(report.value)  # and where


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("function", "bug"), [("product", 5)])
def test_a_wrong_fragment_makes_wrong_numbers(kernels, function, bug, order):
    assert not run(kernels, function, bug, order)


def test_a_forgotten_element_is_found(kernels):
    source, out = torch.ones(16, 16), torch.zeros(16, 16)
    kernels["transpose"]("transpose", 7, 16, source, Out(out))
    assert (out == 0).sum() == 4  # one element of each tile
