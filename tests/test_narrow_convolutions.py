"""The CPU's ways for few channels and for narrow groups (csrc/cpu/planes.h, grouped.h): values, gradients, threads."""

from __future__ import annotations

import pytest
import torch
from oracles import Sample, check_values, evaluate, normal
from test_conv2d_relu import torchs as torchs_conv
from test_deconv2d import torchs as torchs_deconv

from zfcuda import ops

#: Channels, maps, groups, size, kernel, and the rest.
SHAPES = {
    "depthwise": (37, 37, 37, (9, 21), (3, 3), {"padding": 1}),
    "depthwise, strides": (16, 16, 16, (12, 14), (5, 2), {"stride": (2, 3), "padding": (2, 0), "dilation": (1, 2)}),
    "depthwise, a wide kernel": (5, 5, 5, (7, 20), (3, 11), {"padding": (4, 7)}),
    "depthwise, several maps": (6, 18, 6, (8, 9), (3, 3), {"padding": 1}),
    "groups of 2": (12, 12, 6, (7, 9), (3, 3), {"padding": 1}),
    "groups of 4": (40, 40, 10, (9, 8), (3, 2), {"stride": 2, "padding": (0, 1)}),
    "groups of 8": (24, 24, 3, (6, 11), (3, 3), {"dilation": 2, "padding": 2}),
    "groups of 16": (48, 48, 3, (6, 7), (3, 3), {"padding": 1}),
    "groups of 3 and 5": (9, 15, 3, (6, 7), (3, 3), {"padding": 1}),
    "groups, more terms than a block": (32, 32, 2, (7, 8), (5, 5), {"padding": 2}),
    "few channels": (3, 41, 1, (23, 61), (3, 3), {"padding": 1}),
    "few channels, strides": (3, 20, 1, (30, 41), (7, 7), {"stride": 2, "padding": 3}),
    "few channels, several bands": (3, 14, 1, (150, 131), (3, 3), {"padding": 1}),
    "gaps between taps and positions": (2, 13, 1, (17, 19), (2, 3), {"stride": (3, 2), "dilation": (2, 4)}),
    "one tap": (4, 5, 1, (9, 10), (1, 1), {"stride": 2}),
    "more terms than a block": (40, 14, 1, (9, 10), (3, 3), {"padding": 1}),
    "a kernel larger than the image": (2, 3, 1, (4, 3), (5, 5), {"padding": 4, "stride": 3}),
}
EVERYWHERE = [
    pytest.mark.parametrize("layout", ["contiguous", "channels_last"]),
    pytest.mark.parametrize("name", SHAPES),
]
LEVELS = [pytest.param(f"cpu_{level}", marks=pytest.mark.slow) for level in ("baseline", "v3", "v4")]
CPU = pytest.mark.parametrize("backend", ["cpu", *LEVELS], indirect=True)


def everywhere(function):
    for mark in EVERYWHERE:
        function = mark(function)
    return CPU(function)


def convolution(name):
    channels, maps, groups, size, kernel, slide = SHAPES[name]
    tensors = [normal(2, channels, *size), normal(maps, channels // groups, *kernel, seed=1), normal(maps, seed=2)]
    return Sample(tensors, {"groups": groups, **slide})


def transposed(name, gate):
    """Of signals of the size of the convolution's maps."""
    sample = convolution(name)
    maps = torchs_conv(*sample.tensors, **sample.options)
    signal, forward = normal(*maps.shape, seed=3), normal(*maps.shape, seed=4).relu()
    options = sample.options | {"gate": gate, "forward": forward if gate in ("backprop", "guided") else None}
    return Sample([signal, sample.tensors[1], normal(sample.tensors[0].size(1), seed=5)], options)


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_convolution(backend, name, layout, dtype):
    check_values(ops.conv2d_relu, torchs_conv, torchs_conv, convolution(name), backend.device, dtype, layout)


@everywhere
@pytest.mark.parametrize("gate", ["none", "deconvnet", "backprop", "guided"])
def test_transposed_convolution(backend, name, layout, gate):
    check_values(
        ops.deconv2d, torchs_deconv, torchs_deconv, transposed(name, gate), backend.device, torch.float32, layout
    )


@everywhere
def test_the_same_bits_with_any_number_of_threads(backend, name, layout, threads):
    results = []
    for count in (1, 2, 3):
        threads(count)
        up = evaluate(ops.conv2d_relu, convolution(name).on(backend.device, torch.float32, layout))
        down = evaluate(ops.deconv2d, transposed(name, "guided").on(backend.device, torch.float32, layout))
        results.append([*up, *down])
    for one, two, three in zip(*results, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)


@everywhere
def test_infinite_values_stay_where_they_are(backend, name, layout):
    """At corners and in the middle: no sum meets one that its taps do not, by what vectors compute besides."""
    image, weight, bias = convolution(name).tensors
    image, weight = image.abs(), weight.abs()  # infinities of two signs would meet
    for place in ((0, 0, 0, 0), (0, 0, 0, -1), (1, -1, -1, 0), (1, -1, -1, -1)):
        image[place] = float("inf")
    sample = Sample([image, weight, bias], convolution(name).options)
    expected = evaluate(torchs_conv, sample.on(torch.device("cpu"), torch.float32))
    actual = evaluate(ops.conv2d_relu, sample.on(backend.device, torch.float32, layout))
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a.isfinite(), e.isfinite())
