"""Transposed convolutions of few channels, whose phases are columns in CUDA: values, and when they are."""

from __future__ import annotations

from math import ceil, prod
from typing import Any

import pytest
import test_deconv2d as deconv
import test_precision as precision
import test_unpool_relu_deconv2d as unpooled
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import Sample, agree_or_both_refuse, check_exact, check_values, for_all, normal, whole_numbers

from zfcuda import core, ops, reference

CUDA = precision.CUDA
IN_EACH_MODE = pytest.mark.parametrize("mode", ["ieee", *precision.MODES, *precision.HALVES], indirect=True)
mode = precision.mode

#: maps, their size, channels, kernel, and the rest: each tile; rows of the image that not all phases have; phases with
#: other numbers of taps, or none; taps one more than the kernel has in a phase; padding beyond the kernel.
CASES = {
    "conv1 of ZFNet": (8, (6, 5), 3, (7, 7), {"stride": 2, "padding": 1, "output_padding": 1}),
    "conv1 of AlexNet": (8, (4, 3), 3, (11, 11), {"stride": 4, "padding": 2}),
    "one colour": (12, (5, 9), 1, (5, 4), {"stride": (3, 2), "padding": (2, 0), "output_padding": (1, 0)}),
    "one axis": (8, (4, 7), 5, (3, 6), {"stride": (1, 3), "padding": (1, 0)}),
    "the other axis": (16, (6, 4), 4, (5, 3), {"stride": (2, 1), "padding": 2}),
    "sixteen columns": (4, (5, 5), 4, (4, 4), {"stride": 2, "padding": 1}),
    "sixteen channels, whose phases stay apart": (8, (5, 4), 16, (7, 7), {"stride": 2, "padding": 3}),
    "a kernel smaller than the stride": (8, (3, 4), 2, (2, 5), {"stride": (3, 2)}),
    "padding beyond the kernel": (8, (9, 9), 3, (3, 4), {"stride": 2, "padding": (5, 3)}),
    "maps that the tensor cores do not take": (5, (5, 5), 3, (5, 5), {"stride": 2}),
    "taps beyond any halo, but for one": (4, (3, 2), 3, (32, 32), {"stride": 2, "padding": 1}),
    "an image of one row": (8, (1, 3), 3, (5, 5), {"stride": (3, 2), "padding": (2, 1)}),
    "several blocks": (4, (13, 21), 3, (3, 5), {"stride": 2, "padding": 1}),
}
EVERY_CASE = pytest.mark.parametrize("name", CASES)


def tensors(fill, name):
    maps, size, channels, kernel, options = CASES[name]
    return [fill(2, maps, *size), fill(maps, channels, *kernel, seed=1), fill(channels, seed=2)], options


@EVERY_CASE
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("gate", ["none", "guided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_values_and_gradients(backend, name, layout, gate, dtype):
    given, options = tensors(normal, name)
    sample = deconv.gated(gate, given, **options)
    check_values(ops.deconv2d, reference.deconv2d, deconv.torchs, sample, backend.device, dtype, layout)


@CUDA
@EVERY_CASE
@IN_EACH_MODE
def test_exact_in_each_mode(backend, name, mode):
    given, options = tensors(whole_numbers, name)
    check_exact(ops.deconv2d, deconv.torchs, deconv.gated("backprop", given, **options), backend)


@CUDA
@IN_EACH_MODE
@pytest.mark.parametrize("stride", [2, (1, 2)], ids=str)
def test_unpooled(backend, mode, stride, threads):
    threads(1)  # torch's own unpooling is a race between threads where windows overlap
    sample = unpooled.stepped(
        whole_numbers, 3, (2, 8, 6, 5), (5, 4), pool=unpooled.PAPER, gate="guided", stride=stride, padding=1
    )
    check_exact(ops.unpool_relu_deconv2d, unpooled.torchs, sample, backend)


#: maps, stride: each tile and, by FMA, each way to load; a sum in splits.
WAYS = [(8, 2), (8, 4), (5, 2), (5, 4), (1024, 2)]


@CUDA
@IN_EACH_MODE
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("pooled", [False, True], ids=["deconv2d", "unpool_relu_deconv2d"])
@pytest.mark.parametrize(("maps", "stride"), WAYS)
def test_what_is_not_finite_stays_under_its_filter(backend, mode, layout, value, pooled, maps, stride):
    """Though zero weights stand where a phase lacks a tap."""
    check_not_finite(backend, precision.HALVES.get(mode, torch.float32), layout, value, pooled, maps, stride)


@CUDA
@pytest.mark.parametrize("pooled", [False, True], ids=["deconv2d", "unpool_relu_deconv2d"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_what_is_not_finite_in_float64(backend, layout, pooled):
    check_not_finite(backend, torch.float64, layout, float("inf"), pooled, maps=5, stride=2)


def check_not_finite(backend, dtype, layout, value, pooled, maps, stride):
    kernel = 2 * stride - 1
    signal, weight = whole_numbers(2, maps, 4, 4, top=1), whole_numbers(maps, 3, kernel, kernel, seed=1, top=1)
    weight[2, 0] = 0  # which makes NaN of an infinity, as in torch
    options = {"stride": stride, "padding": 1}
    pool: dict[str, Any] = {"pool_kernel_size": 2, "pool_output_size": (4, 4)} if pooled else {}
    if pooled:
        signal, switches = reference.max_pool2d(signal, 2)
    signal[0, 2, 1, 1] = value
    unpooled = reference.max_unpool2d(signal, switches, 2, output_size=(4, 4)) if pooled else signal
    expected = F.conv_transpose2d(unpooled.relu(), weight, **options)
    assert not expected.isfinite().all()
    given = [signal, *([switches] if pooled else []), weight]
    placed = Sample(given, options | pool, differentiable=False).on(backend.device, dtype, layout)
    actual = placed.call(ops.unpool_relu_deconv2d if pooled else ops.deconv2d)
    torch.testing.assert_close(actual.cpu().double(), expected.to(dtype).double(), rtol=0, atol=0, equal_nan=True)


SLIDES = st.fixed_dictionaries(
    {
        "maps": st.sampled_from([1, 4, 8]),
        "channels": st.integers(1, 5),
        "size": st.tuples(st.integers(1, 6), st.integers(1, 6)),
        "kernel": st.tuples(st.integers(1, 7), st.integers(1, 7)),
        "stride": st.tuples(st.integers(1, 4), st.integers(1, 4)),
        "padding": st.tuples(st.integers(0, 4), st.integers(0, 4)),
        "output_padding": st.tuples(st.integers(0, 2), st.integers(0, 2)),
        "seed": st.integers(0, 99),
    }
)


@pytest.mark.parametrize("mode", ["tf32"], indirect=True)
def test_agrees_with_torch(backend, mode):
    def check(c):
        weight = whole_numbers(c["maps"], c["channels"], *c["kernel"], seed=c["seed"] + 1)
        given = [whole_numbers(2, c["maps"], *c["size"], seed=c["seed"]), weight, None]
        options = {name: c[name] for name in ("stride", "padding", "output_padding")}
        names = (*options, "weight")
        agree_or_both_refuse(ops.deconv2d, deconv.torchs, Sample(given, options | {"gate": "none"}), backend, names)

    for_all(backend, SLIDES, check, examples=200)


# ---------------------------------------------------------------- the choice


def positions(kernel: int, stride: int, padding: int) -> int:
    """The neighbours among the maps that any phase of an axis reads, by trying all."""
    read = {
        (phase + padding - tap) // stride
        for phase in range(stride)
        for tap in range(kernel)
        if (phase + padding - tap) % stride == 0
    }
    return max(read) - min(read) + 1


def products(channels, kernel, stride, padding, narrowest=16) -> tuple[int, int]:
    """Of a map and a place in all its phases, padding included: phases apart, and as columns if these fit."""

    def padded(columns):
        return narrowest if columns <= narrowest else 64 * ceil(columns / 64)

    apart = prod(kernel) * padded(channels)
    columns = prod(stride) * channels
    taps = prod(positions(*axis) for axis in zip(kernel, stride, padding, strict=True))
    return apart, taps * padded(columns) if columns <= 64 else apart


@pytest.mark.parametrize("backend", ["simt"], indirect=True)
@settings(max_examples=300)
@given(
    channels=st.integers(1, 40),
    kernel=st.tuples(st.integers(1, 11), st.integers(1, 11)),
    stride=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    padding=st.tuples(st.integers(0, 12), st.integers(0, 12)),
    groups=st.sampled_from([1, 1, 1, 2]),
    dilation=st.sampled_from([1, 1, 1, 2]),
)
def test_whichever_way_multiplies_less(backend, emulator, channels, kernel, stride, padding, groups, dilation):
    """The room for the packed weights tells which it is."""
    shape = (1, groups * channels, 9, 9, groups * 8, 4, 4, *kernel, *stride, *padding, dilation, dilation, groups, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emulator, "processors", 1)  # which splits no sums
        room = emulator.deconv2d_workspace(shape, core.DTYPES[torch.float32], (0, 0, 1, core.PRECISIONS["ieee"]))
    if groups * dilation == 1:
        assert room == 4 * 8 * min(products(channels, kernel, stride, padding))
    else:
        assert room == 4 * 8 * groups * prod(kernel) * (16 if channels <= 16 else 64)
