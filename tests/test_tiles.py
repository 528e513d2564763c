"""Every instantiation of the CUDA products runs: each tile, layout, dtype and vector, results stored whole or not."""

from __future__ import annotations

import pytest
import test_conv2d_relu as conv
import test_conv2d_relu_max_pool2d as pooled
import test_deconv2d as deconv
import test_unpool_relu_deconv2d as unpooled
import torch
from oracles import HALVES, Sample, check_values, normal

from zfcuda import ops, reference

#: image channels, maps, size: groups of at most 16 result channels have a narrow tile, and four channels at a time,
#: or four results, want multiples of four. Sums of 20 channels and more are split by FMA (test_splits.py).
NARROW = [(3, 5, (5, 5)), (4, 8, (6, 6)), (4, 5, (6, 6))]
WIDE = [(20, 24, (6, 6)), (19, 21, (5, 5)), (3, 20, (5, 5)), (4, 21, (5, 5)), (20, 4, (6, 6)), (17, 4, (5, 5))]
WIDE += [(20, 20, (5, 5)), (19, 5, (5, 5))]

#: Filters whose columns stand apart: the tensor cores, which take halves, do not merge their rows.
APART = {"padding": 1, "dilation": (1, 2)}


def combined(test):
    test = pytest.mark.parametrize("shape", NARROW + WIDE, ids=str)(test)
    test = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])(test)
    return pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)(test)


def filters(channels, maps):
    return normal(maps, channels, 3, 3, seed=1)


@combined
def test_conv2d_relu(backend, shape, layout, dtype):
    channels, maps, size = shape
    sample = Sample([normal(2, channels, *size), filters(channels, maps), normal(maps, seed=2)], APART)
    check_values(ops.conv2d_relu, reference.conv2d_relu, conv.torchs, sample, backend.device, dtype, layout)


@combined
@pytest.mark.parametrize("gate", ["none", "guided"])
def test_deconv2d(backend, shape, layout, dtype, gate):
    channels, maps, size = shape
    sample = deconv.gated(gate, [normal(2, maps, *size), filters(channels, maps), normal(channels, seed=2)])
    check_values(ops.deconv2d, reference.deconv2d, deconv.torchs, sample, backend.device, dtype, layout)


@combined
def test_conv2d_relu_max_pool2d(backend, shape, layout, dtype):
    channels, maps, size = shape
    tensors = [normal(2, channels, *size), filters(channels, maps), normal(maps, seed=2)]
    sample = Sample(tensors, {**APART, **pooled.POOL})
    operator = ops.conv2d_relu_max_pool2d
    oracle = pooled.rounding(dtype) if dtype in HALVES else reference.conv2d_relu_max_pool2d
    check_values(operator, oracle, pooled.torchs, sample, backend.device, dtype, layout)


@combined
def test_unpool_relu_deconv2d(backend, shape, layout, dtype, threads):
    threads(1)  # torch's own unpooling is a race between threads where windows overlap
    channels, maps, size = shape
    sample = unpooled.stepped(normal, channels, (2, maps, *size), (3, 3), pool=unpooled.PAPER, gate="guided")
    check_values(*unpooled.FUNCTIONS, sample, backend.device, dtype, layout)
