"""local_response_norm: values and gradient against float64, windows of every size, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from oracles import (
    DTYPES,
    Sample,
    check_values,
    for_all,
    normal,
)

from zfcuda import ops, reference

PAPER = {"size": 5, "alpha": 5e-4, "beta": 0.75, "k": 2.0}


def sample_inputs():
    return [
        Sample([normal(2, 9, 5, 4)], PAPER),
        Sample([normal(2, 7, 3, 4)], {"size": 4, "alpha": 0.7, "beta": 0.4, "k": 0.9}),
        Sample([100 * normal(1, 6, 3, 3)], {"size": 5, "alpha": 1e-4, "beta": 0.75}),
        Sample([normal(1, 3, 2, 2)], {"size": 9, "alpha": 0.5}),  # every window is clipped at both ends
        Sample([normal(1, 1, 4, 4)], {"size": 1, "alpha": 2, "beta": 1, "k": 1}),
        Sample([normal(0, 3, 4, 4)], {"size": 3}),
    ]


SAMPLES = pytest.mark.parametrize("sample", sample_inputs(), ids=lambda s: f"{tuple(s.tensors[0].shape)} {s.options}")


def check(sample, backend, dtype, layout="contiguous"):
    values = ops.local_response_norm, reference.local_response_norm, F.local_response_norm
    check_values(*values, sample, backend.device, dtype, layout)


@DTYPES
@SAMPLES
def test_values_and_gradient(backend, sample, dtype):
    check(sample, backend, dtype)


def test_agrees_with_torch(backend):
    """Any window, torch's convention of alpha.

    On planes of a few pixels: the gradient is a difference, so of a single one nothing but rounding may be left.
    """
    sides = st.integers(3, 6)
    cases = st.tuples(
        st.builds(normal, st.integers(1, 2), st.integers(1, 12), sides, sides, seed=st.integers(0, 99)),
        st.fixed_dictionaries(
            {"size": st.integers(1, 13), "alpha": st.floats(0, 2), "beta": st.floats(0, 2), "k": st.floats(0.5, 3)}
        ),
    )
    for_all(backend, cases, lambda case: check(Sample([case[0]], case[1]), backend, torch.float32))


def test_krizhevskys_alpha_is_not_divided(backend):
    """The paper's constants, written out: x / (2 + 1e-4 · sum of five squares) ** 0.75."""
    x = 30 * normal(1, 5, 1, 1)
    expected = x[0, 2] / (2 + 1e-4 * x.square().sum()) ** 0.75
    actual = ops.local_response_norm(x.to(backend.device), **PAPER)[0, 2].cpu()
    torch.testing.assert_close(actual, expected)


X = torch.ones(1, 3, 4, 4)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "input", lambda x: ops.local_response_norm(3.0, 5)),
        (TypeError, "size", lambda x: ops.local_response_norm(x, 5.0)),
        (TypeError, "alpha", lambda x: ops.local_response_norm(x, 5, "1e-4")),
        (TypeError, "beta", lambda x: ops.local_response_norm(x, 5, 1e-4, None)),
        (RuntimeError, "size is 0", lambda x: ops.local_response_norm(x, 0)),
        (RuntimeError, "input has shape", lambda x: ops.local_response_norm(x[0], 5)),
        (RuntimeError, "input has shape", lambda x: ops.local_response_norm(x[:, :0], 5)),
        (RuntimeError, "input has dtype", lambda x: ops.local_response_norm(x.to(torch.complex64), 5)),
    ],
)
def test_refuses(backend, error, message, call):
    with pytest.raises(error, match=message):
        call(X.to(backend.device))
