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

from zfcuda import core, ops, reference

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


def test_agrees_with_torch(backend):
    def check(c):
        image = whole_numbers(c["batch"], c["groups"] * c["columns"], *c["size"], seed=c["seed"])
        weight = whole_numbers(c["groups"] * c["rows"], c["columns"], *c["kernel"], seed=c["seed"] + 1)
        bias = whole_numbers(weight.size(0), seed=c["seed"] + 2) if c["bias"] else None
        options = {name: c[name] for name in c if name.startswith("pool_") or name in NAMES}
        window = [c["pool_" + name] for name in ("kernel_size", "stride", "padding", "dilation")]
        window[1] = window[1] or window[0]
        sums = {"same": [d * (k - 1) for k, d in zip(c["kernel"], c["dilation"], strict=True)], "valid": (0, 0)}
        padded = sums[c["padding"]] if isinstance(c["padding"], str) else [2 * p for p in c["padding"]]
        axes = zip(c["size"], c["kernel"], c["stride"], padded, c["dilation"], strict=True)
        maps = [(n + p - d * (k - 1) - 1) // max(s, 1) + 1 for n, k, s, p, d in axes]
        if min(window[1] + window[3]) > 0 and min(window[2]) >= 0 and steps_over(maps, *window):
            return  # torch does not refuse these; see test_max_pool2d.py
        sample = Sample([image, weight, bias], options)
        agree_or_both_refuse(ops.conv2d_relu_max_pool2d, torchs, sample, backend, NAMES)

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
