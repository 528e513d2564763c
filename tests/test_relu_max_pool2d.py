"""relu_max_pool2d: bit-equal to the pool of the rectified input, switches included; gradients, out=, refusals."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import strategies as st
from oracles import (
    DTYPES,
    LAYOUTS,
    NATIVE,
    Sample,
    agree_or_both_refuse,
    channels_innermost,
    check_out_convention,
    check_registration,
    check_values,
    for_all,
    normal,
    whole_numbers,
)
from test_max_pool2d import INPUTS, NAMES, WINDOWS, steps_over
from test_max_pool2d import torchs as torchs_pool

from zfcuda import ops, reference


def torchs(input, *arguments, **options):
    return torchs_pool(input.relu(), *arguments, **options)


def sample_inputs():
    return [
        Sample([normal(2, 3, 9, 8)], {"kernel_size": 3, "stride": 2}),
        Sample([normal(2, 3, 9, 8)], {"kernel_size": 3, "stride": 2, "ceil_mode": True}),
        Sample([normal(1, 5, 7, 10)], {"kernel_size": (3, 2), "stride": (1, 2), "padding": (1, 0), "dilation": (2, 1)}),
        Sample([normal(1, 2, 4, 5) - 9], {"kernel_size": 2, "padding": 1}),  # nothing positive
        Sample([whole_numbers(2, 4, 6, 6)], {"kernel_size": 2}),
        Sample([normal(1, 67, 5, 40)], {"kernel_size": 3, "stride": 2}),  # vectors, and what is left of one
        Sample([normal(1, 2, 6, 40)], {"kernel_size": 3, "stride": 1, "padding": 1}),
        Sample([normal(1, 2, 17, 18)], {"kernel_size": 16, "stride": 1}),  # 256 positions
        Sample([normal(0, 3, 9, 8)], {"kernel_size": 3, "stride": 2}),
    ]


SAMPLES = pytest.mark.parametrize("sample", sample_inputs(), ids=lambda s: f"{tuple(s.tensors[0].shape)} {s.options}")


@DTYPES
@SAMPLES
def test_values_and_gradient(backend, sample, dtype):
    check_values(ops.relu_max_pool2d, reference.relu_max_pool2d, torchs, sample, backend.device, dtype)


def test_memory_format_follows_the_input(backend):
    for layout in ("channels_last", "sliced channels_last"):
        placed = sample_inputs()[0].on(backend.device, torch.float32, layout)
        output, switches = placed.call(ops.relu_max_pool2d)
        (gradient,) = torch.autograd.grad(output.square().sum(), placed.leaves())
        assert all(map(channels_innermost, (output, switches, gradient)))


def test_only_pooled_tensors_are_kept(backend):
    output, switches = sample_inputs()[0].on(backend.device, torch.float32).call(ops.relu_max_pool2d)
    kept = output.grad_fn.saved_tensors
    assert [t.data_ptr() for t in kept] == [output.data_ptr(), switches.data_ptr()] and not switches.requires_grad


# ---------------------------------------------------------------- ties and values that are not numbers

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_every_window_of_special_values(backend, layout):
    """All 6^4 windows of 2x2 over these values at once: fused and unfused are the same bits, gradients too.

    Once as 36 x 36 windows of a map, once as 1296 maps of one window: lanes of a vector in either layout.
    """
    windows = torch.tensor(list(itertools.product([NAN, -INF, -1.0, -0.0, 1.0, INF], repeat=4)))
    plane = windows.view(36, 36, 2, 2).permute(0, 2, 1, 3).reshape(1, 1, 72, 72)
    for x in (plane, windows.view(1, 1296, 2, 2)):
        ours = LAYOUTS[layout](x.to(backend.device)).detach().requires_grad_()
        theirs = x.clone().requires_grad_()
        output, switches = ops.relu_max_pool2d(ours, 2)
        expected, expected_switches = torchs(theirs, 2)
        torch.testing.assert_close(output.cpu(), expected, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(switches.cpu(), expected_switches)
        gradients = [torch.autograd.grad(y.sum(), leaf)[0] for y, leaf in ((output, ours), (expected, theirs))]
        assert torch.equal(gradients[0].cpu(), gradients[1])


@pytest.mark.parametrize("fill", [0.0, -0.0, -1.0, -INF, INF, NAN])
def test_a_flat_input(backend, fill):
    """The first position inside the input is the switch of a window that the ReLU has cleared."""
    x = torch.full((1, 2, 5, 6), fill, device=backend.device)
    arguments = {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True}
    output, switches = ops.relu_max_pool2d(x, **arguments)
    expected, expected_switches = torchs(x.cpu(), **arguments)
    torch.testing.assert_close(output.cpu(), expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(switches.cpu(), expected_switches)


# ---------------------------------------------------------------- arguments


def test_agrees_with_torch(backend):
    def check(case):
        x, options = case
        stride = options["stride"] or options["kernel_size"]
        valid = min(stride) > 0 and min(options["padding"]) >= 0
        if valid and steps_over(x.shape[2:], options["kernel_size"], stride, options["padding"], options["dilation"]):
            return  # torch does not refuse these; see test_max_pool2d.py
        agree_or_both_refuse(ops.relu_max_pool2d, torchs, Sample([x], options), backend, NAMES)

    for_all(backend, st.tuples(INPUTS, WINDOWS), check, examples=100)


X = torch.ones(1, 2, 6, 6)
REFUSED = [
    (TypeError, "input", lambda x: ops.relu_max_pool2d(x.tolist(), 2)),
    (RuntimeError, "input has shape", lambda x: ops.relu_max_pool2d(x[0, 0], 2)),
    (RuntimeError, "input has dtype", lambda x: ops.relu_max_pool2d(x.int(), 2)),
    (RuntimeError, "kernel_size is", lambda x: ops.relu_max_pool2d(x, 7)),
    (RuntimeError, "256", lambda x: ops.relu_max_pool2d(x.repeat(1, 1, 3, 3), (16, 17))),
    (TypeError, "kernel_size", lambda x: ops.relu_max_pool2d(x, 2.0)),
    (RuntimeError, "stride is", lambda x: ops.relu_max_pool2d(x, 2, 0)),
    (RuntimeError, "padding is", lambda x: ops.relu_max_pool2d(x, 2, 2, 2)),
    (RuntimeError, "dilation is", lambda x: ops.relu_max_pool2d(x, 2, 2, 0, 0)),
    (TypeError, "ceil_mode", lambda x: ops.relu_max_pool2d(x, 2, 2, 0, 1, 1)),
    (TypeError, "out", lambda x: ops.relu_max_pool2d(x, 2, out=x)),
    (TypeError, "out", lambda x: ops.relu_max_pool2d(x, 2, out=(x, x, x))),
    (TypeError, r"out\[1\]", lambda x: ops.relu_max_pool2d(x, 2, out=(x, None))),
]


@pytest.mark.parametrize(("error", "message", "call"), REFUSED)
def test_refuses(backend, error, message, call):
    with pytest.raises(error, match=message):
        call(X.to(backend.device))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_out(backend, layout):
    check_out_convention(ops.relu_max_pool2d, sample_inputs()[1].on(backend.device, torch.float32, layout))


@NATIVE
def test_out_is_registered(backend):
    sample = sample_inputs()[0].on(backend.device, torch.float32)
    sample.options["out"] = tuple(map(torch.empty_like, sample.call(ops.relu_max_pool2d)))
    with torch.no_grad():
        check_registration(ops.relu_max_pool2d, Sample(sample.tensors, sample.options, differentiable=False))


@NATIVE
def test_out_compiles(backend):
    """In one graph, with what follows it."""
    sample = sample_inputs()[0].on(backend.device, torch.float32)
    x, expected = sample.tensors[0].detach(), sample.call(ops.relu_max_pool2d)

    def twice(x, output, switches):
        return 2 * ops.relu_max_pool2d(x, **sample.options, out=(output, switches))[0]

    torch.compiler.reset()
    results = [torch.zeros_like(e).detach() for e in expected]
    doubled = torch.compile(twice, fullgraph=True, backend="aot_eager")(x, *results)
    assert all(torch.equal(r, e) for r, e in zip(results, expected, strict=True))
    assert torch.equal(doubled, 2 * expected[0])
