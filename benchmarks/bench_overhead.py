"""What a call costs before any work: a hundred of them without gradients on a tiny input, beside torch's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from zfcuda import ops

X, W, B = torch.ones(1, 1, 4, 4), torch.ones(1, 1, 3, 3), torch.ones(1)
CALLS = {
    "conv2d_relu": (lambda: ops.conv2d_relu(X, W, B), lambda: F.conv2d(X, W, B)),
    "deconv2d": (lambda: ops.deconv2d(X, W, B), lambda: F.conv_transpose2d(X, W, B)),
    "max_pool2d": (lambda: ops.max_pool2d(X, 2), lambda: F.max_pool2d(X, 2, return_indices=True)),
    "local_response_norm": (lambda: ops.local_response_norm(X, 5), lambda: F.local_response_norm(X, 5)),
}


def hundred(call: Callable[[], object]) -> Callable[[], object]:
    return lambda: [call() for _ in range(100)]


@pytest.mark.parametrize("name", CALLS)
def bench_overhead(compare, name: str) -> None:
    ours, theirs = CALLS[name]
    compare(hundred(ours), {"torch": hundred(theirs)}, bytes=0)
