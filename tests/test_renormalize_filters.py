"""renormalize_filters_: filters above the limit come back to it, others keep their bits; in place, as an optimiser."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import strategies as st
from oracles import DTYPES, LAYOUTS, NATIVE, Sample, check_registration, for_all, normal

from zfcuda import ops, reference


def filters(*size, seed=0):
    """Filters of very different sizes, from 0 on."""
    weight = normal(*size, seed=seed)
    return weight * torch.linspace(0, 3, size[0], dtype=torch.float64).square().view(-1, 1, 1, 1)


def rms(weight):
    return weight.detach().cpu().double().square().mean((1, 2, 3)).sqrt()


@pytest.mark.parametrize("layout", LAYOUTS)
@DTYPES
def test_against_the_oracle(backend, dtype, layout):
    weight = LAYOUTS[layout](filters(9, 3, 5, 4).to(backend.device, dtype))
    original, strides = weight.clone(), weight.stride()
    assert ops.renormalize_filters_(weight, 0.5) is weight and weight.stride() == strides
    expected = reference.renormalize_filters_(original.to("cpu", torch.float64, copy=True), 0.5)
    torch.testing.assert_close(weight.cpu().double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=0)
    small = (rms(original) <= 0.5).to(backend.device)
    assert 0 < small.sum() < len(small)
    assert torch.equal(weight[small], original[small])


def test_no_filter_exceeds_the_limit(backend):
    """Whatever the sizes: all sums, tails included; and what may stay stays the same bits."""

    def check(case):
        (count, channels, height, width), limit = case
        weight = filters(count, channels, height, width).float().to(backend.device)
        before = weight.clone()
        ops.renormalize_filters_(weight, limit)
        eps = torch.finfo(torch.float32).eps
        assert (rms(weight) <= limit * (1 + 2 * eps)).all()
        large = rms(before) > limit * (1 + eps)
        torch.testing.assert_close(rms(weight)[large], torch.full_like(rms(weight)[large], limit), rtol=2 * eps, atol=0)
        small = (rms(before) < limit * (1 - eps)).to(backend.device)
        assert torch.equal(weight[small], before[small])

    sizes = st.tuples(st.integers(1, 5), st.integers(1, 70), st.integers(1, 5), st.integers(1, 4))
    for_all(backend, st.tuples(sizes, st.floats(0.01, 3)), check, examples=60)


def test_no_square_overflows(backend):
    weight = torch.full((1, 2, 3, 3), 1e30, device=backend.device)
    torch.testing.assert_close(ops.renormalize_filters_(weight, 0.1), torch.full_like(weight, 0.1))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_left_alone(backend, value):
    weight = torch.ones(3, 2, 2, 2, device=backend.device)
    weight[1, 1, 0, 1] = value
    before = weight.clone()
    ops.renormalize_filters_(weight, 0.5)
    torch.testing.assert_close(weight[1], before[1], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(weight[::2], before[::2] / 2)


def test_limits_at_the_ends(backend):
    weight = filters(4, 2, 3, 3).float().to(backend.device)
    before = weight.clone()
    assert torch.equal(ops.renormalize_filters_(weight, float("inf")), before)
    assert torch.equal(ops.renormalize_filters_(weight, 0), torch.zeros_like(weight))
    empty = torch.empty(0, 3, 2, 2, device=backend.device)
    assert ops.renormalize_filters_(empty, 0.1) is empty


@NATIVE
def test_is_a_write_that_autograd_sees(backend):
    """A parameter may be changed; what was saved of it before may not be used any more."""
    weight = torch.nn.Parameter(torch.ones(2, 3, 3, 3, device=backend.device))
    version = weight._version
    loss = weight.square().sum()
    ops.renormalize_filters_(weight, 0.1)
    assert weight._version > version and weight.requires_grad and weight.is_leaf
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@NATIVE
def test_autocast_converts_nothing_that_is_written(backend):
    """A copy would be scaled instead."""
    weight = torch.ones(2, 3, 3, 3, device=backend.device, dtype=torch.float16)
    with torch.autocast(backend.device.type, torch.bfloat16):
        assert ops.renormalize_filters_(weight, 0.5) is weight
    assert weight.dtype == torch.float16 and (weight == 0.5).all()
    output = torch.empty(1, 2, 3, 3, device=backend.device, dtype=torch.bfloat16)
    switches = torch.zeros(1, 2, 3, 3, device=backend.device, dtype=torch.uint8)
    with torch.autocast(backend.device.type, torch.bfloat16), pytest.raises(RuntimeError, match="out has dtype"):
        ops.switch_gather(torch.ones(1, 2, 6, 6, device=backend.device), switches, 2, out=output)


@NATIVE
def test_registration(backend):
    sample = Sample([filters(4, 3, 2, 2)], {"max_rms": 0.3}, differentiable=False)
    check_registration(ops.renormalize_filters_, sample.on(backend.device, torch.float32))


@NATIVE
def test_compiled(backend):
    """A step and the constraint are one graph."""
    weight = filters(4, 3, 2, 2).float().to(backend.device)

    def step(weight):
        weight.add_(0.25)
        return ops.renormalize_filters_(weight, 0.3) * 2

    torch.compiler.reset()
    compiled, eager = copy.deepcopy(weight), copy.deepcopy(weight)
    result = torch.compile(step, fullgraph=True, backend="aot_eager")(compiled)
    assert torch.equal(result, step(eager)) and torch.equal(compiled, eager)


W = torch.ones(2, 3, 3, 3)
REFUSED = [
    (TypeError, "weight", lambda w: ops.renormalize_filters_(w.tolist(), 0.1)),
    (TypeError, "max_rms", lambda w: ops.renormalize_filters_(w, "0.1")),
    (TypeError, "max_rms", lambda w: ops.renormalize_filters_(w, w.sum())),
    (RuntimeError, "max_rms is -0.1", lambda w: ops.renormalize_filters_(w, -0.1)),
    (RuntimeError, "max_rms is nan", lambda w: ops.renormalize_filters_(w, float("nan"))),
    (RuntimeError, "weight has shape", lambda w: ops.renormalize_filters_(w[0], 0.1)),
    (RuntimeError, "weight has dtype", lambda w: ops.renormalize_filters_(w.int(), 0.1)),
]


@pytest.mark.parametrize(("error", "message", "call"), REFUSED)
def test_refuses(backend, error, message, call):
    weight = W.to(backend.device)
    with pytest.raises(error, match=message):
        call(weight)
    assert torch.equal(weight.cpu(), W)


def test_the_same_bits_with_any_number_of_threads(backend, threads):
    runs = []
    for count in (1, 2):
        threads(count)
        runs.append(ops.renormalize_filters_(filters(7, 5, 3, 3).float().to(backend.device), 0.4))
    assert torch.equal(*runs)
