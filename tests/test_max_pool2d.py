"""max_pool2d: the maxima, switches bit-equal to torch's indices, gradients, refusals."""

from __future__ import annotations

import itertools

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


def torchs(input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False):
    """torch's pool, its indices turned into switches by the oracle of the conversion."""
    output, indices = F.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices=True)
    height, width = kernel_size if isinstance(kernel_size, tuple) else (kernel_size, kernel_size)
    switches = torch.full(output.shape, 255, dtype=torch.uint8)
    # A position has one index; try each tap of the window against torch's index.
    for tap in range(height * width):
        candidate = torch.full(output.shape, tap, dtype=torch.uint8)
        there = reference.switches_to_indices(candidate, input.shape, kernel_size, stride, padding, dilation)
        inside = _inside(output.shape, tap, input.shape, kernel_size, stride, padding, dilation)
        switches[(there == indices) & inside] = tap
    return output, switches


def _inside(pooled, tap, size, kernel_size, stride, padding, dilation):
    """Whether a tap of each window lies in the input."""

    def pair(value):
        return value if isinstance(value, tuple) else (value, value)

    kernel, stride = pair(kernel_size), pair(kernel_size if stride is None else stride)
    padding, dilation = pair(padding), pair(dilation)
    rows, columns = (
        torch.arange(pooled[2 + i]) * stride[i] - padding[i] + divmod(tap, kernel[1])[i] * dilation[i] for i in (0, 1)
    )
    rows, columns = (rows >= 0) & (rows < size[2]), (columns >= 0) & (columns < size[3])
    return (rows[:, None] & columns).expand(pooled)


def sample_inputs():
    return [
        Sample([normal(2, 3, 9, 8)], {"kernel_size": 3, "stride": 2}),
        Sample([normal(2, 3, 9, 8)], {"kernel_size": 3, "stride": 2, "ceil_mode": True}),
        Sample([normal(1, 5, 7, 10)], {"kernel_size": (3, 2), "stride": (1, 2), "padding": (1, 0), "dilation": (2, 1)}),
        Sample([whole_numbers(2, 4, 6, 6)], {"kernel_size": 2}),
        Sample([normal(1, 1, 5, 5)], {"kernel_size": 1}),
        Sample([normal(1, 2, 17, 18)], {"kernel_size": 16, "stride": 1}),  # 256 positions
        Sample([normal(0, 3, 9, 8)], {"kernel_size": 3, "stride": 2}),
    ]


SAMPLES = pytest.mark.parametrize("sample", sample_inputs(), ids=lambda s: str(s.options)[1:-1])


@DTYPES
@SAMPLES
def test_values_and_gradient(backend, sample, dtype):
    check_values(ops.max_pool2d, reference.max_pool2d, torchs, sample, backend.device, dtype)


def test_only_the_switches_are_kept(backend):
    output, switches = sample_inputs()[0].on(backend.device, torch.float32).call(ops.max_pool2d)
    kept = output.grad_fn.saved_tensors
    assert [t.data_ptr() for t in kept] == [switches.data_ptr()] and not switches.requires_grad


# ---------------------------------------------------------------- ties and values that are not numbers

NAN, INF = float("nan"), float("inf")


def test_every_window_of_special_values(backend):
    """All 4^4 windows of 2x2 over {NaN, -inf, 0, 1} at once: maxima and switches are torch's."""
    windows = torch.tensor(list(itertools.product([NAN, -INF, 0.0, 1.0], repeat=4)))
    plane = windows.view(16, 16, 2, 2).permute(0, 2, 1, 3).reshape(1, 1, 32, 32)
    output, switches = ops.max_pool2d(plane.to(backend.device), 2)
    expected, expected_switches = torchs(plane, 2)
    torch.testing.assert_close(output.cpu(), expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(switches.cpu(), expected_switches)


@pytest.mark.parametrize("fill", [0.0, -0.0, -INF, INF, NAN])
def test_a_flat_input(backend, fill):
    """The first position inside the input is the switch of a window of equals, the last of NaN."""
    x = torch.full((1, 2, 5, 6), fill, device=backend.device)
    arguments = {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True}
    output, switches = ops.max_pool2d(x, **arguments)
    expected, expected_switches = torchs(x.cpu(), **arguments)
    torch.testing.assert_close(output.cpu(), expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(switches.cpu(), expected_switches)


def test_minus_zero_and_zero_are_equal(backend):
    x = torch.tensor([[-0.0, 0.0], [0.0, -0.0]], device=backend.device).view(1, 1, 2, 2)
    for plane in (x, x.flip(3)):
        assert int(ops.max_pool2d(plane, 2)[1]) == 0


# ---------------------------------------------------------------- arguments

WINDOWS = st.fixed_dictionaries(
    {
        "kernel_size": st.tuples(st.integers(1, 4), st.integers(1, 4)),
        "stride": st.none() | st.tuples(st.integers(0, 3), st.integers(1, 3)),
        "padding": st.tuples(st.integers(-1, 2), st.integers(0, 2)),
        "dilation": st.tuples(st.integers(1, 2), st.integers(1, 3)),
        "ceil_mode": st.booleans(),
    }
)
INPUTS = st.builds(
    whole_numbers, st.integers(1, 2), st.integers(1, 5), st.integers(1, 9), st.integers(1, 9), seed=st.integers(0, 99)
)
NAMES = ("kernel_size", "stride", "padding", "dilation")


def steps_over(size, kernel, stride, padding, dilation):
    """Whether some window has taps on both sides of the input and none inside; torch returns -inf there."""
    return any(
        not any(0 <= start + i * d < n for i in range(k))
        for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
        for start in range(-p, 0, s)
    )


def test_agrees_with_torch(backend):
    def check(case):
        x, options = case
        stride = options["stride"] or options["kernel_size"]
        sample = Sample([x], options)
        valid = min(stride) > 0 and min(options["padding"]) >= 0
        if valid and steps_over(x.shape[2:], options["kernel_size"], stride, options["padding"], options["dilation"]):
            with pytest.raises(RuntimeError, match="|".join(NAMES)):
                sample.on(backend.device, torch.float32).call(ops.max_pool2d)
        else:
            agree_or_both_refuse(ops.max_pool2d, torchs, sample, backend, NAMES)

    for_all(backend, st.tuples(INPUTS, WINDOWS), check, examples=200)


def test_every_small_size():
    """Along one dimension, all sizes up to 7 with all windows up to 4: refused or as large as torch's."""
    ranges = range(1, 8), range(1, 5), range(1, 4), range(3), range(1, 4), (False, True)
    for n, k, s, p, d, ceil_mode in itertools.product(*ranges):
        x, arguments = torch.empty(1, 1, n, 1, device="meta"), ((k, 1), (s, 1), (p, 0), (d, 1), ceil_mode)
        try:
            expected = F.max_pool2d(x, *arguments, return_indices=True)[0].shape
        except RuntimeError:
            expected = None
        if expected is None or steps_over((n,), (k,), (s,), (p,), (d,)):
            with pytest.raises(RuntimeError, match="|".join(NAMES)):
                ops.max_pool2d(x, *arguments)
        else:
            assert ops.max_pool2d(x, *arguments)[0].shape == expected


X = torch.ones(1, 2, 6, 6)
REFUSED = [
    (TypeError, "input", lambda x: ops.max_pool2d(x.tolist(), 2)),
    (RuntimeError, "input has shape", lambda x: ops.max_pool2d(x[0, 0], 2)),
    (RuntimeError, "input has dtype", lambda x: ops.max_pool2d(x.int(), 2)),
    (RuntimeError, "input has dtype", lambda x: ops.max_pool2d(x.int(), 2)),
    (RuntimeError, "input has shape", lambda x: ops.max_pool2d(x[:, :0], 2)),
    (RuntimeError, "kernel_size is", lambda x: ops.max_pool2d(x, 7)),
    (RuntimeError, "kernel_size is", lambda x: ops.max_pool2d(x.expand(1, 2, 6, 6), 0)),
    (RuntimeError, "256", lambda x: ops.max_pool2d(x.repeat(1, 1, 3, 3), (16, 17))),
    (TypeError, "kernel_size", lambda x: ops.max_pool2d(x, 2.0)),
    (TypeError, "kernel_size", lambda x: ops.max_pool2d(x, (2, 2, 2))),
    (TypeError, "kernel_size", lambda x: ops.max_pool2d(x, "3")),
    (RuntimeError, "stride is", lambda x: ops.max_pool2d(x, 2, 0)),
    (TypeError, "stride", lambda x: ops.max_pool2d(x, 2, True)),
    (RuntimeError, "padding is", lambda x: ops.max_pool2d(x, 2, 2, -1)),
    (RuntimeError, "padding is", lambda x: ops.max_pool2d(x, 2, 2, 2)),
    (RuntimeError, "dilation is", lambda x: ops.max_pool2d(x, 2, 2, 0, 0)),
    (RuntimeError, "dilation is", lambda x: ops.max_pool2d(x[:, :, :1], 2, 1, (1, 0), (2, 1))),
    (TypeError, "ceil_mode", lambda x: ops.max_pool2d(x, 2, 2, 0, 1, 1)),
]


@pytest.mark.parametrize(("error", "message", "call"), REFUSED)
def test_refuses(backend, error, message, call):
    with pytest.raises(error, match=message):
        call(X.to(backend.device))
