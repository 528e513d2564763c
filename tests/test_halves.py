"""float16 and bfloat16 as they are stored: every one of their numbers widens and rounds as torch has it."""

from __future__ import annotations

import pytest
import torch
from oracles import HALVES

from zfcuda import ops

DTYPES = pytest.mark.parametrize("dtype", HALVES, ids=str)


def every_half(dtype, seed=None):
    """All 65 536 of them as an image; shuffled with a seed."""
    bits = torch.arange(1 << 16)
    if seed is not None:
        bits = bits[torch.randperm(1 << 16, generator=torch.Generator().manual_seed(seed))]
    return bits.to(torch.int32).to(torch.int16).view(dtype).view(1, 1, 256, 256)


@DTYPES
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_moved_numbers_keep_their_bits(backend, dtype, layout):
    """Subnormal ones and infinities too; NaN stays NaN. Only -0 becomes 0 where sums begin from that."""
    x = every_half(dtype).view(1, 64, 32, 32).contiguous(memory_format=layout)
    output, switches = ops.max_pool2d(x.to(backend.device), 1)
    unpooled = ops.max_unpool2d(output, switches, 1)
    number = ~x.isnan()
    gathered = ops.switch_gather(output, switches, 1)
    for result, same in ((output, number), (gathered, number), (unpooled, number & (x != 0))):
        assert torch.equal(result.cpu().view(torch.int16)[same], x.view(torch.int16)[same])
        torch.testing.assert_close(result.cpu(), x, rtol=0, atol=0, equal_nan=True)


@DTYPES
def test_sums_are_rounded_as_torch_rounds_floats(backend, dtype):
    """To nearest, ties to even, from underflow to overflow: pairs of every size, and neighbours, whose sums tie."""
    first, second = every_half(dtype, 0), every_half(dtype, 1)
    neighbours = every_half(dtype).roll(1, 3) / 2
    for a, b in ((first, second), (every_half(dtype), neighbours), (first, -first)):
        both = torch.cat([a, b], 1).to(backend.device)
        actual = ops.deconv2d(both, torch.ones(2, 1, 1, 1, dtype=dtype, device=backend.device), gate="none")
        expected = (a.float() + b.float()).to(dtype)
        torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=0, equal_nan=True)


def test_flushing_subnormal_floats_changes_nothing(backend):
    """A mode of the processor that torch can set; float16's subnormals are normal floats."""
    x = every_half(torch.float16).to(backend.device)
    expected = ops.max_pool2d(x, 1)[0]
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no such mode")
    try:
        actual = ops.max_pool2d(x, 1)[0]
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(actual.view(torch.int16), expected.view(torch.int16))
