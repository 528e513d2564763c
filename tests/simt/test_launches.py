"""What a GPU refuses, the emulator refuses; votes and shuffles are those of the CUDA programming guide."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest
import torch

from simt.backend import ORDERS, Emulator
from simt.harness import Emulated, Out

LIMITS = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB of shared memory a block


@pytest.fixture(scope="module")
def kernels() -> Emulated:
    return Emulated("launches")


def store(kernels, grid=(1, 1, 1), block=(1, 1, 1), static_kib=0, dynamic=0, arch=86) -> None:
    kernels.arch = arch
    out = torch.empty(2)
    kernels("store", *grid, *block, static_kib, dynamic, Out(out))
    assert out.tolist() == [block[0], grid[0]]


@pytest.mark.parametrize("block", [(1024, 1, 1), (1, 1024, 1), (16, 1, 64), (33, 1, 1)])
def test_blocks_that_fit(kernels, block):
    store(kernels, block=block)


@pytest.mark.parametrize("block", [(0, 1, 1), (1025, 1, 1), (1, 1, 65), (32, 33, 1), (1 << 16, 1 << 16, 1)])
def test_blocks_that_do_not(kernels, block):
    with pytest.raises(RuntimeError, match="invalid launch: a block has"):
        store(kernels, block=block)


@pytest.mark.parametrize("grid", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (1, 65536, 1), (1, 1, 65536), (1 << 31, 1, 1)])
def test_grids_that_do_not_fit(kernels, grid):
    with pytest.raises(RuntimeError, match=r"invalid launch: (an empty grid|a grid has)"):
        store(kernels, grid=grid)


@pytest.mark.parametrize("arch", LIMITS)
def test_shared_memory_of_each_architecture(kernels, arch):
    limit = LIMITS[arch] * 1024
    store(kernels, dynamic=limit, arch=arch)
    with pytest.raises(RuntimeError, match="too much shared memory"):
        store(kernels, dynamic=limit + 1, arch=arch)
    with pytest.raises(RuntimeError, match="more than the architecture has"):
        store(kernels, static_kib=32, dynamic=limit, arch=arch)
    store(kernels, static_kib=32, dynamic=16 * 1024, arch=arch)
    with pytest.raises(RuntimeError, match="without the attribute"):  # 32 + 17 KiB, neither more than 48
        store(kernels, static_kib=32, dynamic=17 * 1024, arch=arch)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("positive", [0, 1, 31, 32, 40, 64])
def test_votes(kernels, order, positive):
    values = (torch.arange(64) < positive).int()
    out = torch.empty(64, 6, dtype=torch.int32)
    kernels("votes", values, Out(out), order=ORDERS[order])
    for thread in range(64):
        warp = values[thread // 32 * 32 :][:32]
        block = [positive, positive > 0, positive == 64]
        assert out[thread].tolist() == [*block, warp.sum(), warp.any(), warp.all()]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("width", [4, 32])
@pytest.mark.parametrize("by", [0, 1, 3, 17])
def test_shuffles(kernels, order, by, width):
    values, out = torch.randperm(64).int(), torch.empty(64, 4, dtype=torch.int32)
    kernels("shuffles", by, width, values, Out(out), order=ORDERS[order])
    for thread in range(64):
        segment, lane = thread // width * width, thread % width
        up, down = lane - by, lane + by
        other = thread % 32 ^ by  # as the guide has it: an earlier segment may be read, a later one not
        xor = thread // 32 * 32 + other if other < thread % 32 // width * width + width else thread
        sources = [segment + by % width, segment + up if up >= 0 else thread]
        sources += [segment + down if down < width else thread, xor]
        assert out[thread].tolist() == values[sources].tolist()


def test_a_forgotten_element_of_an_output_is_reported():
    kernels = Emulated("bugs")

    def max_pool2d(bug, _, __, source, out, exec):
        kernels.library.transpose(bug, 16, ctypes.c_void_p(source), ctypes.c_void_p(out))

    module = SimpleNamespace(__file__=kernels.library._name, max_pool2d=max_pool2d)
    emulator = Emulator(module)
    source, out = torch.randn(16, 16), torch.empty(16, 16)
    with pytest.raises(RuntimeError, match="unwritten output"):
        emulator.max_pool2d(7, 0, 0, emulator.address(source), emulator.address(out), ())
