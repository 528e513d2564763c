"""Registration: what Operator does for an operator that writes its argument."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zfcuda.ops._register import NoResult, operator


@operator("test_double_", mutates=("value",))
def double_(value: Tensor, other: Tensor | None) -> NoResult:
    yield
    value.numpy()[...] *= 2  # as a kernel writes: torch does not see it


def test_writes_are_counted():
    x = torch.ones(3)
    double_(x, None)
    assert x.tolist() == [2, 2, 2] and x._version == 1
    leaf = torch.ones(3, requires_grad=True)
    squared = (leaf * x).sin()  # keeps x
    double_(x, None)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.sum().backward()


def test_a_gradient_is_refused():
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="test_double_ has no gradient"):
        double_(x, None)
    with torch.no_grad():
        double_(x, None)
    assert x.tolist() == [2, 2, 2] and x._version == 1


def test_compiled():
    compiled = torch.compile(lambda t: double_(t, None), fullgraph=True, backend="aot_eager")
    x = torch.ones(3)
    compiled(x)
    assert x.tolist() == [2, 2, 2]


def test_opcheck():
    torch.library.opcheck(double_.overload, (torch.ones(3), None))
