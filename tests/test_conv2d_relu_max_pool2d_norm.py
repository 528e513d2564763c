"""conv2d_relu_max_pool2d_norm: the same bits as pool and normalisation one after the other, in one kernel."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from oracles import (
    DTYPES,
    HALVES,
    NATIVE,
    Sample,
    check_out_convention,
    check_registration,
    check_values,
    for_all,
    normal,
    whole_numbers,
)
from test_conv2d_relu_max_pool2d import CASES, POOL, REFUSED, _name, call_of, tensors
from test_conv2d_relu_max_pool2d import rounding as rounding_of_pool
from test_conv2d_relu_max_pool2d import sample_inputs as samples_of_pool
from test_conv2d_relu_max_pool2d import torchs as torchs_pool
from test_conv2d_relu_max_pool2d_maximum import FLOOR, LAYOUTS, MODES, TILES

import zfcuda
from zfcuda import core, ops, reference
from zfcuda.ops.local_response_norm import Norm

#: The paper's, with an alpha that small numbers feel; even sizes, and wider than all channels.
PAPER = {"norm_size": 5, "norm_alpha": 0.5, "norm_k": 2.0}
NORMS = [PAPER, {"norm_size": 4, "norm_alpha": 0.3, "norm_beta": 0.6}, {"norm_size": 1}, {"norm_size": 200}]


def parts(options):
    """The pool's options and the normalisation's."""
    pool = {name: value for name, value in options.items() if name.startswith("pool_")}
    return pool, {n.removeprefix("norm_"): value for n, value in options.items() if n.startswith("norm_")}


def torchs(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, **options):
    pool, norm = parts(options)
    pooled, switches = torchs_pool(input, weight, bias, stride, padding, dilation, groups, **pool)
    return F.local_response_norm(pooled, **norm), switches


def rounding(dtype):
    """The oracle with a pool of numbers that ``dtype`` has."""

    def oracle(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, **options):
        pool, norm = parts(options)
        pooled, switches = rounding_of_pool(dtype)(input, weight, bias, stride, padding, dilation, groups, **pool)
        return reference.local_response_norm(pooled, **norm), switches

    return oracle


def chain(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, **options):
    """What it replaces."""
    pool, norm = parts(options)
    pooled, switches = ops.conv2d_relu_max_pool2d(input, weight, bias, stride, padding, dilation, groups, **pool)
    return ops.local_response_norm(pooled, **norm), switches


def sample_inputs(numbers=normal):
    """Those of the operator without normalisation, with each of the NORMS in turn."""
    samples = samples_of_pool(numbers)
    return [Sample(s.tensors, {**s.options, **NORMS[i % len(NORMS)]}) for i, s in enumerate(samples)]


def same(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype and a.shape == e.shape
        torch.testing.assert_close(a, e, rtol=0, atol=0, equal_nan=True)


def placed(backend, size, filters, apart, options, dtype=torch.float32, numbers=whole_numbers):
    """A call in channels_last, without gradients."""
    inputs = [numbers(*size), numbers(*filters, seed=1), numbers(filters[0], seed=2)]
    sample = Sample(inputs, {"padding": 1, "dilation": (1, apart), **options}, differentiable=False)
    return sample.on(backend.device, dtype, "channels_last")


@DTYPES
@pytest.mark.parametrize("sample", sample_inputs(), ids=_name)
def test_values_and_gradients(backend, sample, dtype):
    oracle = rounding(dtype) if dtype in HALVES else reference.conv2d_relu_max_pool2d_norm
    check_values(ops.conv2d_relu_max_pool2d_norm, oracle, torchs, sample, backend.device, dtype)


@pytest.mark.parametrize(("mode", "dtype"), MODES)
@pytest.mark.parametrize(("size", "filters", "apart"), TILES, ids=str)
@pytest.mark.parametrize("keep", [False, True], ids=["inference", "training"])
def test_the_same_bits_as_in_two_steps(backend, size, filters, apart, keep, mode, dtype):
    """Every tile and mode, with the pool and without, whatever the numbers: the sums are the same."""
    options = {**POOL, **NORMS[filters[0] % 2]}
    sample = placed(backend, size, filters, apart, options, dtype, normal)
    sample.tensors[1].requires_grad_(keep)
    with zfcuda.set_fp32_precision(mode):
        same(sample.call(ops.conv2d_relu_max_pool2d_norm), sample.call(chain))


#: The ways in which images of few channels go by patches (channels_last).
BY_PATCH = pytest.mark.parametrize("mode", ["ieee", "tf32"])


@LAYOUTS
@BY_PATCH
@pytest.mark.parametrize("norm_size", [1, 2, 33, 34, 96, 300])
@pytest.mark.parametrize("pool", [FLOOR, {"pool_kernel_size": 2}, {"pool_kernel_size": 5, "pool_stride": 4}], ids=str)
def test_any_window(backend, pool, norm_size, mode, layout):
    """Up to where a warp sees all channels, and beyond."""
    inputs = tensors(normal, 1, 3, (23, 26), 96, (5, 5))
    options = {**pool, "norm_size": norm_size, "norm_alpha": 0.1}
    sample = Sample(inputs, options, differentiable=False).on(backend.device, torch.float32, layout)
    with zfcuda.set_fp32_precision(mode):
        same(sample.call(ops.conv2d_relu_max_pool2d_norm), sample.call(chain))


#: Image, filters, groups, mode; and whether the blocks have all channels of their pixels.
KERNELS = [((1, 3, 17, 16), (96, 3, 7, 7), 1, "tf32", True), ((1, 3, 17, 16), (96, 3, 7, 7), 1, "3xtf32", True),
           ((1, 3, 17, 16), (96, 3, 3, 3), 1, "ieee", True), ((1, 3, 17, 16), (100, 3, 7, 7), 1, "tf32", False),
           ((1, 3, 17, 16), (20, 3, 3, 3), 1, "ieee", True), ((1, 3, 17, 16), (100, 3, 7, 7), 1, "ieee", False),
           ((1, 64, 9, 8), (64, 64, 3, 3), 1, "ieee", False),
           ((1, 64, 9, 8), (64, 64, 3, 3), 1, "tf32", True), ((1, 64, 9, 8), (65, 64, 3, 3), 1, "tf32", False),
           ((1, 16, 9, 8), (12, 16, 3, 3), 1, "tf32", True),
           ((1, 32, 9, 8), (32, 16, 3, 3), 2, "tf32", False)]  # fmt: skip


@pytest.mark.parametrize("backend", ["simt"], indirect=True)
@pytest.mark.parametrize(("size", "filters", "groups", "mode", "one"), KERNELS, ids=str)
def test_one_kernel(backend, monkeypatch, size, filters, groups, mode, one):
    """A second kernel, told that there are no pixels to normalise, would write nothing, which the emulator reports."""
    sample = placed(backend, size, filters, 1, {"groups": groups, **POOL, **PAPER})
    with zfcuda.set_fp32_precision(mode):
        expected = sample.call(chain)
        on = Norm.on

        def nothing(norm, shape, layout):
            (_, *rest), *constants = on(norm, shape, layout)
            return (0, *rest), *constants

        monkeypatch.setattr(Norm, "on", nothing)
        if one:
            same(sample.call(ops.conv2d_relu_max_pool2d_norm), expected)
        elif backend_checks():
            with pytest.raises(RuntimeError, match="unwritten output"):
                sample.call(ops.conv2d_relu_max_pool2d_norm)


def backend_checks():
    """Whether the emulator in use looks for what is not written: not where it counts coverage."""
    return core.BACKENDS["cpu"]().orders != ("forward",)


@LAYOUTS
@BY_PATCH
def test_special_values(backend, mode, layout):
    """A NaN or an infinity spoils its own window of channels and no other, padding columns not at all."""
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, *range(-9, 9)])
    image = values[torch.randint(len(values), (1, 3, 21, 22), generator=torch.Generator().manual_seed(0))]
    image[..., 4:] = image[..., 4:].nan_to_num(0, 1, -1)
    weight = whole_numbers(20, 3, 3, 3, seed=1)
    weight[:, 1:, 1] = 0
    sample = Sample([image, weight], {**FLOOR, **PAPER}, differentiable=False).on(backend.device, torch.float32, layout)
    with zfcuda.set_fp32_precision(mode):
        same(sample.call(ops.conv2d_relu_max_pool2d_norm), sample.call(chain))


def test_any_arguments(backend):
    def check(c):
        call = call_of(c)
        sample = Sample(call.tensors, {**call.options, **NORMS[c["seed"] % len(NORMS)]}, differentiable=False)
        for layout in ("contiguous", "channels_last"):
            there = sample.on(backend.device, torch.float32, layout)
            try:
                expected = there.call(chain)
            except RuntimeError as refused:
                with pytest.raises(RuntimeError) as error:
                    there.call(ops.conv2d_relu_max_pool2d_norm)
                assert str(error.value) == str(refused)
            else:
                same(there.call(ops.conv2d_relu_max_pool2d_norm), expected)

    for_all(backend, CASES, check, examples=100)


def test_a_gradient_for_what_was_not_kept(backend, monkeypatch):
    """Where a transform hides that derivatives are wanted, the pool is computed once more."""
    sample = sample_inputs()[0].on(backend.device, torch.float64)
    runs = []
    module = sys.modules["zfcuda.ops.conv2d_relu_max_pool2d_norm"]  # the package has the function by this name
    for keep in (True, False):
        monkeypatch.setattr(module, "derivable", lambda *_, answer=keep: answer)
        output, _ = sample.call(ops.conv2d_relu_max_pool2d_norm)
        gradients = torch.autograd.grad(output.square().sum(), sample.leaves(), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in gradients), sample.leaves())
        runs.append([output, *gradients, *second])
    for kept, again in zip(*runs, strict=True):
        torch.testing.assert_close(kept, again)


def test_the_pool_is_kept_for_a_gradient_alone(backend, monkeypatch):
    sample = sample_inputs()[0].on(backend.device, torch.float32)
    given, run = [], core.run
    monkeypatch.setattr(core, "run", lambda function, *rest: (given.append(rest[-4]), run(function, *rest)))
    output, switches = sample.call(ops.conv2d_relu_max_pool2d_norm)
    x, weight, _ = sample.tensors
    kept = {t.data_ptr() for t in output.grad_fn.saved_tensors if t is not None}
    assert kept == {t.data_ptr() for t in (x, weight, switches, given[0])}
    with torch.no_grad():
        sample.call(ops.conv2d_relu_max_pool2d_norm)
    assert given[1] is None


NORM_REFUSED = [
    (TypeError, "norm_size", lambda f, x, w: f(x, w, pool_kernel_size=2)),
    (TypeError, "norm_size is 2.5", lambda f, x, w: f(x, w, pool_kernel_size=2, norm_size=2.5)),
    (TypeError, "norm_alpha is", lambda f, x, w: f(x, w, pool_kernel_size=2, norm_size=5, norm_alpha="1")),
    (TypeError, "norm_beta is", lambda f, x, w: f(x, w, pool_kernel_size=2, norm_size=5, norm_beta=None)),
    (TypeError, "norm_k is", lambda f, x, w: f(x, w, pool_kernel_size=2, norm_size=5, norm_k=True)),
    (RuntimeError, "norm_size is 0", lambda f, x, w: f(x, w, pool_kernel_size=2, norm_size=0)),
]


@pytest.mark.parametrize(("error", "message", "call"), NORM_REFUSED)
def test_refuses(backend, error, message, call):
    x, weight = torch.ones(2, 4, 8, 8, device=backend.device), torch.ones(6, 4, 3, 3, device=backend.device)
    with pytest.raises(error, match=message):
        call(ops.conv2d_relu_max_pool2d_norm, x, weight)


@pytest.mark.parametrize(("error", "message", "call"), REFUSED)
def test_refuses_what_the_pool_refuses(backend, monkeypatch, error, message, call):
    def fused(*args, **kwargs):
        return ops.conv2d_relu_max_pool2d_norm(*args, **kwargs, norm_size=5)

    monkeypatch.setattr("test_conv2d_relu_max_pool2d.fused", fused)
    x, weight, bias = torch.ones(2, 4, 8, 8), torch.ones(6, 4, 3, 3), torch.ones(6)
    with pytest.raises(error, match=message):
        call(*(t.to(backend.device) for t in (x, weight, bias)))


@LAYOUTS
def test_out(backend, layout):
    check_out_convention(ops.conv2d_relu_max_pool2d_norm, sample_inputs()[0].on(backend.device, torch.float32, layout))


@NATIVE
def test_out_is_registered(backend):
    sample = sample_inputs()[0].on(backend.device, torch.float32)
    sample.options["out"] = tuple(map(torch.empty_like, sample.call(ops.conv2d_relu_max_pool2d_norm)))
    with torch.no_grad():
        check_registration(
            ops.conv2d_relu_max_pool2d_norm, Sample(sample.tensors, sample.options, differentiable=False)
        )
