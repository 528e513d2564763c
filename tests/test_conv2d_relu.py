"""conv2d_relu: values and gradients against float64, bit-equal on whole numbers, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from oracles import (
    DTYPES,
    Sample,
    agree_or_both_refuse,
    check_values,
    for_all,
    normal,
    whole_numbers,
)

from zfcuda import ops, reference


def torchs(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups).relu()


def sample_inputs():
    return [
        Sample([normal(2, 3, 9, 8), normal(4, 3, 3, 3, seed=1), normal(4, seed=2)], {"stride": 2, "padding": 1}),
        Sample([normal(2, 3, 9, 8), normal(5, 3, 3, 2, seed=1), None], {"padding": (2, 0), "dilation": (2, 3)}),
        Sample([normal(1, 6, 7, 7), normal(4, 3, 3, 3, seed=1), normal(4, seed=2)], {"groups": 2}),
        Sample([normal(2, 4, 6, 5), normal(8, 1, 3, 3, seed=1), None], {"groups": 4, "padding": 1}),  # depthwise
        Sample([normal(1, 5, 4, 5), normal(3, 5, 1, 1, seed=1), normal(3, seed=2)]),  # 5 terms a sum
        Sample([normal(1, 3, 5, 6), normal(2, 3, 5, 6, seed=1), normal(2, seed=2)]),  # one position
        Sample([normal(1, 1, 8, 8), normal(1, 1, 2, 2, seed=1), None], {"stride": 3}),  # rest of 0 and 2
        Sample([normal(1, 3, 2, 3), normal(2, 3, 3, 3, seed=1), None], {"padding": 4, "stride": 5}),  # padding
        Sample([normal(0, 3, 9, 8), normal(4, 3, 3, 3, seed=1), normal(4, seed=2)], {"stride": 2}),
    ]


SAMPLES = pytest.mark.parametrize("sample", sample_inputs(), ids=lambda s: f"{tuple(s.tensors[1].shape)} {s.options}")


@DTYPES
@SAMPLES
def test_values_and_gradients(backend, sample, dtype):
    check_values(ops.conv2d_relu, reference.conv2d_relu, torchs, sample, backend.device, dtype)


@pytest.mark.parametrize(
    "needed", [(True, False, False), (False, True, False), (False, False, True), (False, True, True)]
)
def test_only_the_gradients_asked_for(backend, needed, monkeypatch):
    """… are computed: the core is called for no other."""
    from zfcuda import core

    sample = sample_inputs()[0].on(backend.device, torch.float64)
    everything = torch.autograd.grad(sample.call(ops.conv2d_relu).square().sum(), sample.leaves())
    for t, need in zip(sample.tensors, needed, strict=True):
        t.requires_grad_(need)
    called, run = [], core.run
    monkeypatch.setattr(core, "run", lambda function, *rest: (called.append(function), run(function, *rest)))
    gradients = torch.autograd.grad(sample.call(ops.conv2d_relu).square().sum(), sample.leaves())
    expected = [g for g, need in zip(everything, needed, strict=True) if need]
    for g, e in zip(gradients, expected, strict=True):
        torch.testing.assert_close(g, e)
    assert called == ["conv2d", *["deconv2d"] * needed[0], *["conv2d_weight_gradient"] * needed[1]]


def test_the_rectifier_at_zero_and_at_nan(backend):
    """As torch: no gradient at 0 and -0, all of it at NaN."""
    values = [-1.0, -0.0, 0.0, 1.0, float("nan"), float("inf"), -float("inf")]
    results = []
    for function, device in ((ops.conv2d_relu, backend.device), (torchs, torch.device("cpu"))):
        x = torch.tensor(values, device=device).view(-1, 1, 1, 1).requires_grad_()
        output = function(x, torch.ones(1, 1, 1, 1, device=device))
        results.append((output.detach().cpu(), torch.autograd.grad(output.sum(), x)[0].cpu()))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


CASES = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 2),
        "groups": st.integers(1, 3),
        "rows": st.integers(1, 4),
        "columns": st.integers(1, 3),
        "off": st.sampled_from([0, 0, 0, 0, 1]),  # channels that the input has too many
        "size": st.tuples(st.integers(1, 9), st.integers(1, 9)),
        "kernel": st.tuples(st.integers(1, 4), st.integers(1, 4)),
        "stride": st.tuples(st.integers(1, 3), st.sampled_from([1, 1, 1, 2, 3, 0])),
        "padding": st.tuples(st.integers(0, 3), st.sampled_from([0, 1, 2, 0, 1, -1]))
        | st.sampled_from(["same", "valid"]),
        "dilation": st.tuples(st.integers(1, 2), st.sampled_from([1, 1, 2, 3, 0])),
        "bias": st.booleans(),
        "seed": st.integers(0, 99),
    }
)


def test_agrees_with_torch(backend):
    def check(c):
        image = whole_numbers(c["batch"], c["groups"] * c["columns"] + c["off"], *c["size"], seed=c["seed"])
        weight = whole_numbers(c["groups"] * c["rows"], c["columns"], *c["kernel"], seed=c["seed"] + 1)
        bias = whole_numbers(weight.size(0), seed=c["seed"] + 2) if c["bias"] else None
        options = {name: c[name] for name in ("stride", "padding", "dilation", "groups")}
        names = ("stride", "padding", "dilation", "groups", "weight")
        agree_or_both_refuse(ops.conv2d_relu, torchs, Sample([image, weight, bias], options), backend, names)

    for_all(backend, CASES, check, examples=200)


X, W, B = torch.ones(2, 4, 6, 6), torch.ones(6, 4, 3, 3), torch.ones(6)
REFUSED = [
    (TypeError, "input", lambda x, w, b: ops.conv2d_relu(None, w)),
    (TypeError, "weight", lambda x, w, b: ops.conv2d_relu(x, 3)),
    (TypeError, "bias", lambda x, w, b: ops.conv2d_relu(x, w, 1.0)),
    (TypeError, "stride", lambda x, w, b: ops.conv2d_relu(x, w, b, 1.5)),
    (TypeError, "padding", lambda x, w, b: ops.conv2d_relu(x, w, b, 1, None)),
    (ValueError, "padding is 'full'", lambda x, w, b: ops.conv2d_relu(x, w, b, 1, "full")),
    (RuntimeError, "padding is 'same'", lambda x, w, b: ops.conv2d_relu(x, w, b, (1, 2), "same")),
    (TypeError, "groups", lambda x, w, b: ops.conv2d_relu(x, w, b, groups=(1, 1))),
    (RuntimeError, "input has shape", lambda x, w, b: ops.conv2d_relu(x[0, 0], w)),
    (RuntimeError, "input has dtype", lambda x, w, b: ops.conv2d_relu(x.long(), w)),
    (RuntimeError, "weight has dtype", lambda x, w, b: ops.conv2d_relu(x, w.double())),
    (RuntimeError, "weight has shape", lambda x, w, b: ops.conv2d_relu(x, w[0])),
    (RuntimeError, "weight has shape", lambda x, w, b: ops.conv2d_relu(x, w[:, :3])),
    (RuntimeError, "weight has shape", lambda x, w, b: ops.conv2d_relu(x, w, dilation=3)),
    (RuntimeError, "weight has shape", lambda x, w, b: ops.conv2d_relu(x, w[:, :, :0])),
    (RuntimeError, "weight has shape", lambda x, w, b: ops.conv2d_relu(x, w[:0])),
    (RuntimeError, "bias has shape", lambda x, w, b: ops.conv2d_relu(x, w, b[:5])),
    (RuntimeError, "bias has shape", lambda x, w, b: ops.conv2d_relu(x, w, b[None])),
    (RuntimeError, "bias has dtype", lambda x, w, b: ops.conv2d_relu(x, w, b.double())),
    (RuntimeError, "weight is on meta", lambda x, w, b: ops.conv2d_relu(x, w.to("meta"))),
    (RuntimeError, "bias is on meta", lambda x, w, b: ops.conv2d_relu(x, w, b.to("meta"))),
    (RuntimeError, "groups is 3", lambda x, w, b: ops.conv2d_relu(x, w, b, groups=3)),
    (RuntimeError, "groups is 0", lambda x, w, b: ops.conv2d_relu(x, w, b, groups=0)),
    (RuntimeError, "groups is 4", lambda x, w, b: ops.conv2d_relu(x, w[:, :1], b, groups=4)),
    (RuntimeError, "stride is", lambda x, w, b: ops.conv2d_relu(x, w, b, (1, 0))),
    (RuntimeError, "padding is", lambda x, w, b: ops.conv2d_relu(x, w, b, padding=(0, -1))),
    (RuntimeError, "dilation is", lambda x, w, b: ops.conv2d_relu(x, w, b, dilation=-1)),
]


@pytest.mark.parametrize(("error", "message", "call"), REFUSED)
def test_refuses(backend, error, message, call):
    with pytest.raises(error, match=message):
        call(*(t.to(backend.device) for t in (X, W, B)))
