"""deconv2d: four gates before a transposed convolution; values, gradients, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from oracles import (
    DTYPES,
    Sample,
    agree_or_both_refuse,
    check_exact,
    check_values,
    for_all,
    normal,
    whole_numbers,
)

from zfcuda import ops, reference

GATES = ("none", "deconvnet", "backprop", "guided")


def torchs(signal, weight, bias=None, *arguments, gate="deconvnet", forward=None, **options):
    if gate in ("deconvnet", "guided"):
        signal = signal.relu()
    if gate in ("backprop", "guided"):
        signal = signal.masked_fill(forward <= 0, 0)
    return F.conv_transpose2d(signal, weight, bias, *arguments, **options)


def gated(gate, tensors, **options):
    """A sample with what the gate needs."""
    forward = {"forward": whole_numbers(*tensors[0].shape, seed=7).relu()} if gate in ("backprop", "guided") else {}
    return Sample(tensors, dict(**options, gate=gate, **forward))


def sample_inputs():
    tensors = [normal(2, 4, 5, 4), normal(4, 3, 3, 3, seed=1), normal(3, seed=2)]
    return [
        *(gated(gate, tensors, stride=2, padding=1, output_padding=1) for gate in GATES),
        gated("deconvnet", [normal(2, 3, 5, 6), normal(3, 5, 3, 2, seed=1), None], padding=(2, 0), dilation=(2, 3)),
        gated("deconvnet", [normal(1, 6, 4, 4), normal(6, 2, 3, 3, seed=1), normal(4, seed=2)], groups=2),
        gated("guided", [normal(2, 4, 4, 5), normal(4, 1, 3, 3, seed=1), None], groups=4, padding=1),  # depthwise
        gated("none", [normal(1, 5, 4, 5), normal(5, 3, 1, 1, seed=1), normal(3, seed=2)]),
        gated("deconvnet", [normal(1, 2, 1, 1), normal(2, 3, 5, 6, seed=1), None]),
        gated("none", [normal(1, 1, 3, 3), normal(1, 1, 2, 2, seed=1), None], stride=3, output_padding=(0, 2)),
        gated("deconvnet", [normal(1, 2, 3, 3), normal(2, 2, 2, 2, seed=1), None], dilation=3, output_padding=2),
        gated(  # 74 rows of the image: two bands of csrc/cpu/scatter.h
            "deconvnet",
            [normal(1, 4, 36, 3), normal(4, 3, 5, 3, seed=1), normal(3, seed=2)],
            stride=(2, 1),
            padding=(1, 0),
            output_padding=(1, 0),
        ),
        gated("backprop", [normal(0, 4, 5, 4), normal(4, 3, 3, 3, seed=1), normal(3, seed=2)], stride=2),
    ]


def _name(sample):
    options = {name: value for name, value in sample.options.items() if name != "forward"}
    return f"{tuple(sample.tensors[1].shape)} {options}"


SAMPLES = pytest.mark.parametrize("sample", sample_inputs(), ids=_name)


@DTYPES
@SAMPLES
def test_values_and_gradients(backend, sample, dtype):
    check_values(ops.deconv2d, reference.deconv2d, torchs, sample, backend.device, dtype)


def test_backprop_is_the_gradient_of_conv2d_relu(backend):
    """The one weight up and down: the step differs from the paper's in the gate only."""
    x, weight = whole_numbers(2, 3, 9, 8), whole_numbers(4, 3, 3, 3, seed=1)
    x, weight = (t.float().to(backend.device) for t in (x, weight))
    output = ops.conv2d_relu(x.requires_grad_(), weight, stride=2, padding=1)
    signal = whole_numbers(*output.shape, seed=3).to(output)
    expected = torch.autograd.grad(output, x, signal)[0]
    actual = ops.deconv2d(signal, weight, None, 2, 1, (0, 1), gate="backprop", forward=output.detach())
    assert torch.equal(actual, expected)


def test_every_gate_at_every_sign(backend):
    """All pairs of signal and forward: which of them pass is torch's rule, NaN included."""
    values = torch.tensor([-1.0, -0.0, 0.0, 1.0, float("nan"), float("inf"), -float("inf")])
    signal, forward = (t.reshape(-1, 1, 1, 1) for t in torch.meshgrid(values, values, indexing="ij"))
    one = torch.ones(1, 1, 1, 1)
    for gate in GATES:
        options = {"gate": gate, "forward": forward if gate in ("backprop", "guided") else None}
        expected = torchs(signal, one, **options)
        placed = Sample([signal, one], options).on(backend.device, torch.float32)
        output = placed.call(ops.deconv2d)
        torch.testing.assert_close(output.detach().cpu(), expected, rtol=0, atol=0, equal_nan=True)
        leaf = signal.clone().requires_grad_()
        (wanted,) = torch.autograd.grad(torchs(leaf, one, **options).sum(), leaf)
        (gradient,) = torch.autograd.grad(output.sum(), placed.tensors[0])
        torch.testing.assert_close(gradient.cpu(), wanted, rtol=0, atol=0, equal_nan=True)


CASES = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 2),
        "groups": st.integers(1, 3),
        "rows": st.integers(1, 3),
        "columns": st.integers(1, 4),
        "off": st.sampled_from([0, 0, 0, 0, 1]),
        "size": st.tuples(st.integers(1, 6), st.integers(1, 6)),
        "kernel": st.tuples(st.integers(1, 4), st.integers(1, 4)),
        "stride": st.tuples(st.integers(1, 3), st.sampled_from([1, 1, 1, 2, 3, 0])),
        "padding": st.tuples(st.integers(0, 3), st.sampled_from([0, 1, 2, 0, 1, -1])),
        "output_padding": st.tuples(st.integers(0, 2), st.sampled_from([0, 0, 0, 0, 1, -1])),
        "dilation": st.tuples(st.integers(1, 2), st.sampled_from([1, 1, 2, 3, 0])),
        "bias": st.booleans(),
        "gate": st.sampled_from(GATES),
        "seed": st.integers(0, 99),
    }
)
NAMES = ("stride", "padding", "output_padding", "dilation", "groups", "weight")


def test_agrees_with_torch(backend):
    def check(c):
        signal = whole_numbers(c["batch"], c["groups"] * c["rows"] + c["off"], *c["size"], seed=c["seed"])
        weight = whole_numbers(c["groups"] * c["rows"], c["columns"], *c["kernel"], seed=c["seed"] + 1)
        bias = whole_numbers(c["groups"] * c["columns"], seed=c["seed"] + 2) if c["bias"] else None
        options = {name: c[name] for name in ("stride", "padding", "output_padding", "dilation", "groups")}
        sample = gated(c["gate"], [signal, weight, bias], **options)
        agree_or_both_refuse(ops.deconv2d, torchs, sample, backend, NAMES)

    for_all(backend, CASES, check, examples=200)


def test_more_output_padding_than_stride(backend):
    """Allowed below the dilation: pixels that no filter reaches are the bias."""
    tensors = [whole_numbers(1, 2, 3, 3), whole_numbers(2, 2, 2, 2, seed=1), whole_numbers(2, seed=2)]
    check_exact(ops.deconv2d, torchs, gated("deconvnet", tensors, dilation=4, output_padding=3), backend)


S, W, B = torch.ones(2, 4, 6, 6), torch.ones(4, 3, 3, 3), torch.ones(3)
REFUSED = [
    (TypeError, "signal", lambda s, w, b: ops.deconv2d([], w)),
    (TypeError, "weight", lambda s, w, b: ops.deconv2d(s, None)),
    (TypeError, "forward", lambda s, w, b: ops.deconv2d(s, w, forward=1)),
    (TypeError, "output_padding", lambda s, w, b: ops.deconv2d(s, w, output_padding=0.5)),
    (TypeError, "groups", lambda s, w, b: ops.deconv2d(s, w, groups=None)),
    (ValueError, "gate is 'relu'", lambda s, w, b: ops.deconv2d(s, w, gate="relu")),
    (RuntimeError, "forward is None", lambda s, w, b: ops.deconv2d(s, w, gate="guided")),
    (RuntimeError, "forward is given", lambda s, w, b: ops.deconv2d(s, w, forward=s)),
    (RuntimeError, "forward has shape", lambda s, w, b: ops.deconv2d(s, w, gate="guided", forward=s[:1])),
    (RuntimeError, "forward has dtype", lambda s, w, b: ops.deconv2d(s, w, gate="backprop", forward=s.double())),
    (RuntimeError, "signal has shape", lambda s, w, b: ops.deconv2d(s[0, 0], w)),
    (RuntimeError, "signal has dtype", lambda s, w, b: ops.deconv2d(s.int(), w)),
    (RuntimeError, "weight has shape", lambda s, w, b: ops.deconv2d(s, w[:3])),
    (RuntimeError, "weight has shape", lambda s, w, b: ops.deconv2d(s, w[:, :0])),
    (RuntimeError, "bias has shape", lambda s, w, b: ops.deconv2d(s, w, b[:2])),
    (RuntimeError, "weight is on meta", lambda s, w, b: ops.deconv2d(s, w.to("meta"))),
    (RuntimeError, "groups is 3", lambda s, w, b: ops.deconv2d(s, w, groups=3)),
    (RuntimeError, "output_padding is", lambda s, w, b: ops.deconv2d(s, w, stride=2, output_padding=2)),
    (RuntimeError, "output_padding is", lambda s, w, b: ops.deconv2d(s, w, output_padding=(0, -1))),
    (RuntimeError, "padding is", lambda s, w, b: ops.deconv2d(s, w, padding=4)),
    (RuntimeError, "padding is", lambda s, w, b: ops.deconv2d(s, w, padding=-1)),
    (RuntimeError, "stride is", lambda s, w, b: ops.deconv2d(s, w, stride=0)),
    (RuntimeError, "dilation is", lambda s, w, b: ops.deconv2d(s, w, dilation=0)),
]


@pytest.mark.parametrize(("error", "message", "call"), REFUSED)
def test_refuses(backend, error, message, call):
    with pytest.raises(error, match=message):
        call(*(t.to(backend.device) for t in (S, W, B)))
