"""conv2d_relu_max_pool2d_maximum: the same bits as the maps, their pool and map_maximum in three steps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracles import DTYPES, HALVES, Sample, check_exact, check_values, for_all, normal, whole_numbers
from test_conv2d_relu_max_pool2d import CASES, POOL, REFUSED, _name, call_of, tensors
from test_conv2d_relu_max_pool2d import rounding as rounding_of_pool
from test_conv2d_relu_max_pool2d import sample_inputs as samples_of_pool
from test_conv2d_relu_max_pool2d import torchs as torchs_pool

import zfcuda
from zfcuda import ops, reference

FLOOR = {"pool_kernel_size": 3, "pool_stride": 2}
LAYOUTS = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


def maxima(maps):
    """torch's argmax, the first of equals."""
    return maps.flatten(2).amax(2), maps.flatten(2).argmax(2)


def torchs(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, **pool):
    maps = F.conv2d(input, weight, bias, stride, padding, dilation, groups).relu()
    return *torchs_pool(input, weight, bias, stride, padding, dilation, groups, **pool), *maxima(maps)


def rounding(dtype):
    """The oracle with maps of numbers that ``dtype`` has."""

    def oracle(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, **pool):
        pooled = rounding_of_pool(dtype)(input, weight, bias, stride, padding, dilation, groups, **pool)
        maps = reference.conv2d_relu(input, weight, bias, stride, padding, dilation, groups)
        return *pooled, *reference.map_maximum(maps.to(dtype).to(maps))

    return oracle


def chain(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, *, pool_ceil_mode=False, **pool):
    """What it replaces."""
    window = {name.removeprefix("pool_"): value for name, value in pool.items()}
    maps = ops.conv2d_relu(input, weight, bias, stride, padding, dilation, groups)
    pooled = ops.max_pool2d(maps, **window, ceil_mode=pool_ceil_mode)
    return *pooled, *ops.map_maximum(maps, *pooled, **window)


def alone(sample):
    return Sample(sample.tensors, sample.options, differentiable=False)


def sample_inputs(numbers=normal):
    """Those of the operator without maxima, and pools that leave a border of the maps to no window."""
    borders = [
        Sample(tensors(numbers, 2, 3, (14, 12), 4, (3, 3)), {"padding": 1, **FLOOR}),
        Sample(tensors(numbers, 1, 2, (30, 41), 3, (2, 2)), {"pool_kernel_size": (5, 4), "pool_stride": (4, 3)}),
        Sample(tensors(numbers, 1, 4, (13, 28), 20, (1, 1), groups=2), {"groups": 2, "pool_kernel_size": 5}),
    ]
    return [alone(sample) for sample in (*samples_of_pool(numbers), *borders)]


def samples(numbers=normal):
    return pytest.mark.parametrize("sample", sample_inputs(numbers), ids=_name)


def same(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype and a.shape == e.shape
        torch.testing.assert_close(a.cpu(), e.cpu(), rtol=0, atol=0, equal_nan=True)


@DTYPES
@samples()
def test_values(backend, sample, dtype):
    oracle = rounding(dtype) if dtype in HALVES else reference.conv2d_relu_max_pool2d_maximum
    check_values(ops.conv2d_relu_max_pool2d_maximum, oracle, torchs, sample, backend.device, dtype)


@samples(whole_numbers)
def test_exact(backend, sample):
    """Sums of whole numbers, full of ties and of maps that the ReLU clears: the same bits as torch's chain."""
    check_exact(ops.conv2d_relu_max_pool2d_maximum, torchs, sample, backend)


@DTYPES
@LAYOUTS
@pytest.mark.parametrize("pool", [POOL, FLOOR, {"pool_kernel_size": 2, "pool_stride": 3}], ids=str)
def test_the_same_bits_as_in_three_steps(backend, pool, layout, dtype):
    """Several blocks and several tiles of channels an image; on the CPU rounded sums too, for they are those of the
    chain, term by term."""
    inputs = tensors(normal if backend.name.startswith("cpu") else whole_numbers, 2, 3, (29, 34), 70, (3, 3))
    placed = alone(Sample(inputs, {"padding": 1, **pool})).on(backend.device, dtype, layout)
    same(placed.call(ops.conv2d_relu_max_pool2d_maximum), placed.call(chain))


@pytest.mark.parametrize("window", [(3, 2), (3, 3), (2, 2), (5, 4, 2), (1, 1), (2, 3), (3, 1, 1, 2), (16, 9)], ids=str)
@LAYOUTS
def test_the_maximum_at_every_position(backend, window, layout):
    """Whichever position is largest: in a window, in several, behind the last one, between two."""
    height, width = (17, 18) if window[0] == 16 else (8, 9)
    maps = torch.eye(height * width).view(-1, 1, height, width)[:: 5 if window[0] == 16 else 1]
    names = ("pool_kernel_size", "pool_stride", "pool_padding", "pool_dilation")
    sample = alone(Sample([maps, torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)], dict(zip(names, window, strict=False))))
    placed = sample.on(backend.device, torch.float32, layout)
    same(placed.call(ops.conv2d_relu_max_pool2d_maximum)[2:], maxima(F.conv2d(*sample.tensors).relu()))


@LAYOUTS
@pytest.mark.parametrize("pool", [POOL, FLOOR, {"pool_kernel_size": 2, "pool_stride": 1, "pool_padding": 1}], ids=str)
def test_nan_is_passed_over(backend, pool, layout):
    """With its windows, as by map_maximum; infinities are not."""
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, *range(-9, 9)])
    for low, size in [(0, (12, 40)), (1, (11, 10)), (3, (5, 5))]:
        chosen = torch.randint(low, len(values), (2, 1, *size), generator=torch.Generator().manual_seed(low))
        image = values[chosen]
        image[0, 0, :, ::7] = torch.nan
        filters = torch.tensor([1.0, -1.0, torch.nan]).view(3, 1, 1, 1)
        placed = alone(Sample([image, filters], pool)).on(backend.device, torch.float32, layout)
        same(placed.call(ops.conv2d_relu_max_pool2d_maximum), placed.call(chain))


#: Image, filters, the columns' distance: from patches, taps and halos, and by FMA, each in wide and narrow tiles; of 64
#: channels the convolution is split, or its pool comes after it.
TILES = [((2, 3, 17, 16), (96, 3, 7, 7), 1), ((1, 3, 17, 16), (40, 3, 5, 5), 1), ((2, 16, 15, 14), (72, 16, 3, 3), 2),
         ((1, 32, 9, 14), (40, 32, 1, 1), 1), ((1, 32, 9, 14), (8, 32, 1, 1), 1), ((1, 64, 15, 14), (40, 64, 3, 3), 1),
         ((1, 64, 15, 14), (8, 64, 3, 3), 1), ((1, 32, 15, 14), (40, 32, 3, 3), 1), ((1, 32, 15, 14), (8, 32, 3, 3), 1),
         ((1, 12, 15, 14), (40, 12, 3, 3), 2), ((1, 12, 15, 14), (8, 12, 3, 3), 2),
         ((1, 11, 15, 14), (40, 11, 3, 3), 2), ((1, 11, 15, 14), (8, 11, 3, 3), 2),
         ((1, 12, 15, 14), (40, 12, 2, 2), 2), ((1, 11, 15, 14), (40, 11, 2, 2), 2),
         ((2, 3, 17, 16), (96, 3, 3, 3), 1)]  # fmt: skip
MODES = [("ieee", torch.float32), ("tf32", torch.float32), ("3xtf32", torch.float32), *(("ieee", h) for h in HALVES)]


@pytest.mark.parametrize(("mode", "dtype"), MODES)
@pytest.mark.parametrize(("size", "filters", "apart"), TILES, ids=str)
@pytest.mark.parametrize("pool", [POOL, FLOOR], ids=["ceil", "floor"])
def test_in_every_mode(backend, size, filters, apart, pool, mode, dtype):
    """Every tile, some with more channels than threads side by side: exact for whole numbers."""
    inputs = [whole_numbers(*size, top=2), whole_numbers(*filters, seed=1, top=1), whole_numbers(filters[0], seed=2)]
    sample = alone(Sample(inputs, {"padding": 1, "dilation": (1, apart), **pool}))
    placed = sample.on(backend.device, dtype, "channels_last")
    with zfcuda.set_fp32_precision(mode):
        actual = placed.call(ops.conv2d_relu_max_pool2d_maximum)
    expected = sample.on(torch.device("cpu"), torch.float64).call(torchs)
    same(actual, [e.to(a.dtype) for a, e in zip(actual, expected, strict=True)])


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("pool", [POOL, FLOOR, {"pool_kernel_size": 2, "pool_stride": 3}], ids=str)
def test_the_same_bits_with_any_number_of_threads(backend, threads, batch, pool):
    """One image is cut into bands, which meet."""
    placed = alone(Sample(tensors(whole_numbers, batch, 2, (28, 21), 7, (3, 3)), pool)).on(
        backend.device, torch.float32
    )
    runs = []
    for count in (1, 2, 3):
        threads(count)
        runs.append(placed.call(ops.conv2d_relu_max_pool2d_maximum))
    same(runs[0], placed.call(chain))
    same(runs[1], runs[0])
    same(runs[2], runs[0])


def test_any_arguments(backend):
    def check(c):
        sample = alone(call_of(c))
        for layout in ("contiguous", "channels_last"):
            placed = sample.on(backend.device, torch.float32, layout)
            try:
                expected = placed.call(ops.conv2d_relu_max_pool2d)
            except RuntimeError as refused:
                with pytest.raises(RuntimeError) as error:
                    placed.call(ops.conv2d_relu_max_pool2d_maximum)
                assert str(error.value) == str(refused)
            else:
                same(placed.call(ops.conv2d_relu_max_pool2d_maximum), placed.call(chain))
                same(placed.call(ops.conv2d_relu_max_pool2d_maximum)[:2], expected)

    for_all(backend, CASES, check, examples=150)


@pytest.mark.parametrize(("error", "message", "call"), [r for r in REFUSED if r[1] != "out"])
def test_refuses(backend, monkeypatch, error, message, call):
    """What the operator without maxima refuses."""
    monkeypatch.setattr("test_conv2d_relu_max_pool2d.fused", ops.conv2d_relu_max_pool2d_maximum)
    x, weight, bias = torch.ones(2, 4, 8, 8), torch.ones(6, 4, 3, 3), torch.ones(6)
    with pytest.raises(error, match=message):
        call(*(t.to(backend.device) for t in (x, weight, bias)))
