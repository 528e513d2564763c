"""conv2d_relu_max_pool2d: bit-equal to the unfused chain where sums are exact; gradients, out=, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from oracles import (
    DTYPES,
    HALVES,
    LAYOUTS,
    NATIVE,
    Sample,
    agree_or_both_refuse,
    channels_innermost,
    check_exact,
    check_out_convention,
    check_registration,
    check_values,
    for_all,
    normal,
    whole_numbers,
)
from test_max_pool2d import steps_over
from test_max_pool2d import torchs as torchs_pool

import zfcuda
from zfcuda import core, ops, reference
from zfcuda.ops._conv import Filters
from zfcuda.ops._pool import Window

POOL = {"pool_kernel_size": 3, "pool_stride": 2, "pool_ceil_mode": True}


def torchs(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, **pool):
    maps = F.conv2d(input, weight, bias, stride, padding, dilation, groups).relu()
    return torchs_pool(maps, **{name.removeprefix("pool_"): value for name, value in pool.items()})


def tensors(numbers, batch, channels, size, maps, kernel, groups=1, bias=True):
    x, weight = numbers(batch, channels, *size), numbers(maps, channels // groups, *kernel, seed=1)
    return [x, weight, numbers(maps, seed=2) if bias else None]


def sample_inputs(numbers=normal):
    one, uneven = {"pool_kernel_size": 1}, {"pool_kernel_size": (2, 3), "pool_stride": (3, 1), "pool_padding": (1, 0)}
    return [
        Sample(tensors(numbers, 2, 3, (15, 14), 4, (3, 3)), {"stride": 2, "padding": 1, **POOL}),
        Sample(tensors(numbers, 1, 2, (11, 13), 5, (3, 2), bias=False), {"dilation": (2, 1), "padding": 1, **uneven}),
        Sample(tensors(numbers, 1, 8, (9, 9), 4, (3, 3), groups=2), {"groups": 2, **POOL}),
        Sample(tensors(numbers, 2, 4, (7, 8), 8, (3, 3), groups=4), {"groups": 4, "padding": 1, "pool_kernel_size": 2}),
        Sample(tensors(numbers, 1, 3, (4, 60), 20, (1, 1)), {"pool_kernel_size": (2, 3), "pool_stride": (1, 2)}),
        Sample(tensors(numbers, 1, 2, (40, 3), 3, (2, 2)), {"pool_kernel_size": (3, 2), "pool_dilation": (2, 1)}),
        Sample(tensors(numbers, 1, 4, (6, 5), 70, (3, 3)), {"padding": 2, "pool_kernel_size": 3, "pool_padding": 1}),
        Sample(tensors(numbers, 1, 3, (5, 6), 2, (2, 2)), one),
        Sample(tensors(numbers, 1, 1, (3, 3), 1, (3, 3)), one),
        Sample(
            tensors(numbers, 1, 1, (16, 17), 2, (1, 1)), {"pool_kernel_size": 16, "pool_stride": 1}
        ),  # 256 positions
        Sample(tensors(numbers, 1, 1, (9, 9), 2, (1, 1)), {"pool_kernel_size": 2, "pool_stride": 4}),  # gaps
        Sample(tensors(numbers, 0, 3, (9, 8), 4, (3, 3)), POOL),
    ]


def _name(sample):
    return f"{tuple(sample.tensors[0].shape)} {tuple(sample.tensors[1].shape)} {sample.options}"


def samples(numbers=normal):
    return pytest.mark.parametrize("sample", sample_inputs(numbers), ids=_name)


def rounding(dtype):
    """The oracle with maps of numbers that ``dtype`` has: in halves rounding makes ties, of which the first counts."""

    def oracle(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, **pool):
        maps = reference.conv2d_relu(input, weight, bias, stride, padding, dilation, groups)
        maps = maps + (maps.to(dtype) - maps).detach()
        return reference.max_pool2d(maps, **{name.removeprefix("pool_"): value for name, value in pool.items()})

    return oracle


@DTYPES
@samples()
def test_values_and_gradients(backend, sample, dtype):
    oracle = rounding(dtype) if dtype in HALVES else reference.conv2d_relu_max_pool2d
    check_values(ops.conv2d_relu_max_pool2d, oracle, torchs, sample, backend.device, dtype)


@samples(whole_numbers)
def test_exact(backend, sample):
    """Sums of whole numbers, full of ties and of windows that the ReLU clears: the same bits as torch's chain."""
    check_exact(ops.conv2d_relu_max_pool2d, torchs, sample, backend)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kernel", [(3, 3), (2, 4)], ids=str)
def test_modes_of_padding(backend, kernel, padding):
    """As torch's: where a kernel of even size asks for more on one side, that is the right and the lower one."""
    options = {"padding": padding, "dilation": (1, 2) if kernel == (3, 3) else (3, 1), **POOL}
    sample = Sample(tensors(whole_numbers, 2, 3, (9, 8), 4, kernel), options)
    check_exact(ops.conv2d_relu_max_pool2d, torchs, sample, backend)


def test_memory_formats(backend):
    """Results follow the input's format, the gradient of the weight has the weight's strides."""
    sample = sample_inputs()[0].on(backend.device, torch.float32)
    x, weight, bias = sample.tensors
    for image, filters in (
        (torch.channels_last, torch.contiguous_format),
        (torch.contiguous_format, torch.channels_last),
    ):
        x = x.detach().contiguous(memory_format=image).requires_grad_()
        weight = weight.detach().contiguous(memory_format=filters).requires_grad_()
        results = ops.conv2d_relu_max_pool2d(x, weight, bias, **sample.options)
        grad_x, grad_weight = torch.autograd.grad(results[0].sum(), [x, weight])
        assert all(channels_innermost(t) == (image == torch.channels_last) for t in (*results, grad_x))
        assert grad_weight.stride() == weight.stride()


@NATIVE
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_same_bits_as_in_two_steps(backend, layout):
    """On the CPU the sums are conv2d_relu's, term by term, so that rounding makes no difference."""
    x, weight, bias = (t.float().to(backend.device) for t in tensors(normal, 2, 5, (31, 70), 33, (5, 5)))
    x = LAYOUTS[layout](x)
    fused = ops.conv2d_relu_max_pool2d(x, weight, bias, 2, 1, **POOL)
    chain = ops.max_pool2d(ops.conv2d_relu(x, weight, bias, 2, 1), 3, 2, ceil_mode=True)
    assert all(torch.equal(one, other) for one, other in zip(fused, chain, strict=True))


@pytest.mark.parametrize(
    "needed", [(True, False, False), (False, True, False), (False, False, True), (False, True, True)]
)
def test_only_the_gradients_asked_for(backend, needed, monkeypatch):
    """… are computed: the core is called for no other."""
    sample = sample_inputs()[0].on(backend.device, torch.float64)
    call = lambda: sample.call(ops.conv2d_relu_max_pool2d)[0].square().sum()  # noqa: E731
    everything = torch.autograd.grad(call(), sample.leaves())
    for t, need in zip(sample.tensors, needed, strict=True):
        t.requires_grad_(need)
    called, run = [], core.run
    monkeypatch.setattr(core, "run", lambda function, *rest: (called.append(function), run(function, *rest)))
    gradients = torch.autograd.grad(call(), sample.leaves())
    expected = [g for g, need in zip(everything, needed, strict=True) if need]
    for g, e in zip(gradients, expected, strict=True):
        torch.testing.assert_close(g, e)
    rest = [*["unpool_relu_deconv2d"] * needed[0], *["unpool_relu_weight_gradient"] * needed[1]]
    assert called == ["conv2d_relu_max_pool2d", *rest]


def test_the_maps_are_not_kept(backend):
    sample = sample_inputs()[0].on(backend.device, torch.float32)
    output, switches = sample.call(ops.conv2d_relu_max_pool2d)
    x, weight, _ = sample.tensors
    kept = {t.data_ptr() for t in output.grad_fn.saved_tensors}
    assert kept == {t.data_ptr() for t in (x, weight, output, switches)} and not switches.requires_grad


def test_special_values(backend):
    """NaN, infinities and -0 in the image: values, switches and gradients as torch's chain has them."""
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1.0, -1.0])
    values = special[torch.randint(7, (2, 1, 12, 40), generator=torch.Generator().manual_seed(0))]
    results = []
    for function, device in ((ops.conv2d_relu_max_pool2d, backend.device), (torchs, torch.device("cpu"))):
        x = values.to(device).requires_grad_()
        output, switches = function(x, torch.ones(3, 1, 1, 1, device=device), **POOL)
        (gradient,) = torch.autograd.grad(output.sum(), x)
        results.append([t.detach().cpu() for t in (output, switches, gradient)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


ZFNET = {"conv1": (3, 224, 96, 7, 2, 1), "conv2": (96, 55, 256, 5, 2, 0), "conv5": (384, 13, 256, 3, 1, 1)}


@pytest.mark.parametrize("backend", ["simt"], indirect=True)
@pytest.mark.parametrize("processors", [40, 108, 132])
@pytest.mark.parametrize("mode", ["ieee", "tf32", "3xtf32"])
@pytest.mark.parametrize(
    ("layer", "batch"), [("conv1", 128), ("conv2", 1), ("conv2", 128), ("conv5", 1), ("conv5", 128)]
)
def test_the_cheaper_way_for_zfnet(backend, emulator, monkeypatch, layer, batch, mode, processors):
    """Layer 1, by few channels to large maps, never has maps in memory. Layers 2 and 5, by long sums to small maps,
    which boxes cut badly, are pooled behind the convolution; of any batch for no more than some waves of blocks."""
    channels, size, maps, kernel, stride, padding = ZFNET[layer]
    filters = Filters([stride] * 2, [padding] * 2, [1, 1], 1)
    out = (size + 2 * padding - kernel) // stride + 1
    weight = torch.empty(maps, channels, kernel, kernel, device="meta")
    window, pooled = Window([3, 3], [2, 2], [0, 0], [1, 1]), (out - 2) // 2 + 1
    shape = filters.shape((batch, channels, size, size), (batch, maps, out, out), weight, torch.channels_last)
    pool = window.shape((batch, maps, out, out), (batch, maps, pooled, pooled), torch.channels_last)
    monkeypatch.setattr(emulator, "processors", processors)
    where = 0, 0, 1, core.PRECISIONS[mode]
    scratch = emulator.conv2d_relu_max_pool2d_workspace(shape, pool, core.DTYPES[torch.float32], False, where)
    image = 4 * maps * out**2
    if layer == "conv1":
        assert scratch < image
    else:
        at_a_time = max(image, 4 * 8 * 2 * 128 * 128 * processors)
        assert image * min(batch, at_a_time // image) / 2 <= scratch - 4 * weight.numel() < at_a_time + (1 << 25)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("batch", "side"), [(3, 52), (5, 40)])
def test_the_convolution_of_some_images_at_a_time(backend, request, monkeypatch, batch, side, channels_last):
    """Windows that no box holds; where the GPU is small, one or two images at a time, and a rest of one."""
    if backend.name == "simt":
        monkeypatch.setattr(request.getfixturevalue("emulator"), "processors", 1)
    inputs = tensors(whole_numbers, batch, 1, (40, side), 64, (1, 1))
    sample = Sample(inputs, {"pool_kernel_size": 16, "pool_stride": 11}, differentiable=False)
    layout = "channels_last" if channels_last else "contiguous"
    placed = sample.on(backend.device, torch.float32, layout)
    expected = sample.on(torch.device("cpu"), torch.float32).call(torchs)
    for actual in (placed.call(ops.conv2d_relu_max_pool2d), placed.call(ops.conv2d_relu_max_pool2d_maximum)[:2]):
        assert all(torch.equal(a.cpu(), e) for a, e in zip(actual, expected, strict=True))
    maxima = placed.call(ops.conv2d_relu_max_pool2d_maximum)[2]
    assert torch.equal(maxima.cpu(), F.conv2d(*sample.tensors).relu().float().flatten(2).amax(2))


@pytest.mark.parametrize("backend", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize(
    ("dtype", "mode"), [*((torch.float32, mode) for mode in ("ieee", "3xtf32", "tf32")), *((h, "ieee") for h in HALVES)]
)
def test_weights_that_stay_in_shared_memory(backend, dtype, mode):
    """More tiles of few channels than a GPU has multiprocessors; test_precision.py has the emulator's."""
    image = whole_numbers(16, 3, 120, 120, top=1).contiguous(memory_format=torch.channels_last)
    weight, bias = whole_numbers(96, 3, 7, 7, seed=1, top=1), whole_numbers(96, seed=2)
    tensors = [t.to(backend.device, dtype) for t in (image, weight, bias)]
    with zfcuda.set_fp32_precision(mode):
        maps = ops.conv2d_relu(*tensors, stride=2, padding=1)
        pooled, switches = ops.conv2d_relu_max_pool2d(*tensors, stride=2, padding=1, **POOL)
    assert torch.equal(maps.cpu().double(), F.conv2d(image, weight, bias, 2, 1).relu())
    for one, other in zip((pooled, switches), torchs(image, weight, bias, 2, 1, **POOL), strict=True):
        assert torch.equal(one.cpu().to(other.dtype), other)


@pytest.mark.parametrize("mode", ["ieee", "tf32"])
@pytest.mark.parametrize(("channels", "maps"), [(3, 96), (64, 64), (200, 24)])
def test_an_image_that_no_vector_loads(backend, channels, maps, mode):
    """Its address decides the way, and with it the workspace, which must be enough for all."""
    x, weight, bias = tensors(whole_numbers, 1, channels, (9, 11), maps, (3, 3))
    room = torch.zeros(x.numel() + 1, device=backend.device)
    image = room[1:].view(1, 9, 11, channels).permute(0, 3, 1, 2)
    image.copy_(x)
    weight, bias = weight.float().to(backend.device), bias.float().to(backend.device)
    expected = torchs(x, weight.cpu().double(), bias.cpu().double(), padding=1, **POOL)
    with zfcuda.set_fp32_precision(mode):
        actual = ops.conv2d_relu_max_pool2d(image, weight, bias, 1, 1, **POOL)
        normed, switches = ops.conv2d_relu_max_pool2d_norm(image, weight, bias, 1, 1, **POOL, norm_size=5)
    assert all(torch.equal(a.cpu(), e.to(a.dtype)) for a, e in zip(actual, expected, strict=True))
    assert torch.equal(switches, actual[1]) and torch.equal(normed, ops.local_response_norm(actual[0], 5))


CASES = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 2),
        "groups": st.integers(1, 2),
        "rows": st.integers(1, 4),
        "columns": st.integers(1, 3),
        "size": st.tuples(st.integers(2, 12), st.integers(2, 12)),
        "kernel": st.tuples(st.integers(1, 3), st.integers(1, 3)),
        "stride": st.tuples(st.integers(1, 2), st.sampled_from([1, 1, 1, 2, 0])),
        "padding": st.tuples(st.integers(0, 2), st.integers(0, 2)) | st.sampled_from(["same", "valid"]),
        "dilation": st.tuples(st.integers(1, 2), st.integers(1, 2)),
        "pool_kernel_size": st.tuples(st.integers(1, 4), st.integers(1, 4)),
        "pool_stride": st.none() | st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 3, 1, 2, 0])),
        "pool_padding": st.tuples(st.integers(0, 1), st.sampled_from([0, 1, 0, 1, -1])),
        "pool_dilation": st.tuples(st.integers(1, 2), st.sampled_from([1, 1, 2, 0])),
        "pool_ceil_mode": st.booleans(),
        "bias": st.booleans(),
        "seed": st.integers(0, 99),
    }
)
NAMES = ("stride", "padding", "dilation", "groups", "weight", "pool_kernel_size", "pool_stride", "pool_padding")


def call_of(c):
    """A case of CASES as a call."""
    image = whole_numbers(c["batch"], c["groups"] * c["columns"], *c["size"], seed=c["seed"])
    weight = whole_numbers(c["groups"] * c["rows"], c["columns"], *c["kernel"], seed=c["seed"] + 1)
    bias = whole_numbers(weight.size(0), seed=c["seed"] + 2) if c["bias"] else None
    return Sample([image, weight, bias], {n: c[n] for n in c if n.startswith("pool_") or n in NAMES})


def test_agrees_with_torch(backend):
    def check(c):
        window = [c["pool_" + name] for name in ("kernel_size", "stride", "padding", "dilation")]
        window[1] = window[1] or window[0]
        sums = {"same": [d * (k - 1) for k, d in zip(c["kernel"], c["dilation"], strict=True)], "valid": (0, 0)}
        padded = sums[c["padding"]] if isinstance(c["padding"], str) else [2 * p for p in c["padding"]]
        axes = zip(c["size"], c["kernel"], c["stride"], padded, c["dilation"], strict=True)
        maps = [(n + p - d * (k - 1) - 1) // max(s, 1) + 1 for n, k, s, p, d in axes]
        if min(window[1] + window[3]) > 0 and min(window[2]) >= 0 and steps_over(maps, *window):
            return  # torch does not refuse these; see test_max_pool2d.py
        agree_or_both_refuse(ops.conv2d_relu_max_pool2d, torchs, call_of(c), backend, NAMES)

    for_all(backend, CASES, check, examples=150)


X, W, B = torch.ones(2, 4, 8, 8), torch.ones(6, 4, 3, 3), torch.ones(6)
P = {"pool_kernel_size": 2}
fused = ops.conv2d_relu_max_pool2d
REFUSED = [
    (TypeError, "input", lambda x, w, b: fused(None, w, **P)),
    (TypeError, "bias", lambda x, w, b: fused(x, w, 1.0, **P)),
    (ValueError, "padding", lambda x, w, b: fused(x, w, b, 1, "full", **P)),
    (RuntimeError, "padding is 'same'", lambda x, w, b: fused(x, w, b, (1, 2), "same", **P)),
    (TypeError, "pool_kernel_size", lambda x, w, b: fused(x, w, b)),
    (TypeError, "pool_kernel_size", lambda x, w, b: fused(x, w, b, pool_kernel_size=2.0)),
    (TypeError, "pool_stride", lambda x, w, b: fused(x, w, b, **P, pool_stride="2")),
    (TypeError, "pool_ceil_mode", lambda x, w, b: fused(x, w, b, **P, pool_ceil_mode=1)),
    (TypeError, "out", lambda x, w, b: fused(x, w, b, **P, out=x)),
    (RuntimeError, "input has shape", lambda x, w, b: fused(x[0, 0], w, **P)),
    (RuntimeError, "weight has dtype", lambda x, w, b: fused(x, w.double(), **P)),
    (RuntimeError, "bias has shape", lambda x, w, b: fused(x, w, b[:5], **P)),
    (RuntimeError, "groups is 3", lambda x, w, b: fused(x, w, b, groups=3, **P)),
    (RuntimeError, "pool_kernel_size is", lambda x, w, b: fused(x, w, b, pool_kernel_size=7)),
    (RuntimeError, "pool_kernel_size is", lambda x, w, b: fused(x, w, b, pool_kernel_size=(17, 16))),
    (RuntimeError, "pool_kernel_size is", lambda x, w, b: fused(x, w, b, pool_kernel_size=0)),
    (RuntimeError, "pool_stride is", lambda x, w, b: fused(x, w, b, **P, pool_stride=0)),
    (RuntimeError, "pool_padding is", lambda x, w, b: fused(x, w, b, **P, pool_padding=-1)),
    (RuntimeError, "pool_padding is", lambda x, w, b: fused(x, w, b, **P, pool_padding=2)),
    (RuntimeError, "pool_dilation is", lambda x, w, b: fused(x, w, b, **P, pool_dilation=0)),
]


@pytest.mark.parametrize(("error", "message", "call"), REFUSED)
def test_refuses(backend, error, message, call):
    with pytest.raises(error, match=message):
        call(*(t.to(backend.device) for t in (X, W, B)))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_out(backend, layout):
    check_out_convention(ops.conv2d_relu_max_pool2d, sample_inputs()[0].on(backend.device, torch.float32, layout))


@NATIVE
def test_out_is_registered(backend):
    sample = sample_inputs()[0].on(backend.device, torch.float32)
    sample.options["out"] = tuple(map(torch.empty_like, sample.call(ops.conv2d_relu_max_pool2d)))
    with torch.no_grad():
        check_registration(ops.conv2d_relu_max_pool2d, Sample(sample.tensors, sample.options, differentiable=False))


@pytest.mark.parametrize("batch", [1, 3])
def test_the_same_bits_with_any_number_of_threads(backend, threads, batch):
    """One image is cut into bands, whose borders lie elsewhere with each number of threads."""
    inputs = tensors(normal, batch, 5, (28, 21), 7, (3, 3))
    runs = []
    for count in (1, 2, 3):
        threads(count)
        placed = Sample(inputs, POOL).on(backend.device, torch.float32)
        output, switches = placed.call(ops.conv2d_relu_max_pool2d)
        gradients = torch.autograd.grad(output, placed.leaves(), torch.ones_like(output))
        runs.append([output, switches, *gradients])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))
