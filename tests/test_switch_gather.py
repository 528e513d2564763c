"""switch_gather: what the switches point to; the transpose of max_unpool2d; gradients, out=, refusals."""

from __future__ import annotations

import pytest
import torch
from oracles import (
    DTYPES,
    LAYOUTS,
    NATIVE,
    Sample,
    channels_innermost,
    check_exact,
    check_out_convention,
    check_registration,
    check_values,
    for_all,
    normal,
    whole_numbers,
)
from test_max_unpool2d import POOLED

from zfcuda import ops, reference


def torchs(input, switches, *window, **options):
    indices = reference.switches_to_indices(switches, input.shape[2:], *window, **options)
    return torch.take_along_dim(input.flatten(2), indices.flatten(2), 2).view(switches.shape)


def pooled(x, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False):
    """The sample that gathers from another map by the switches of ``x``."""
    _, switches = reference.max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode)
    values = (whole_numbers if x.frac().abs().sum() == 0 else normal)(*x.shape, seed=5)
    window = {"kernel_size": kernel_size, "stride": stride, "padding": padding, "dilation": dilation}
    return Sample([values, switches], window)


def sample_inputs():
    return [
        pooled(normal(2, 3, 9, 8), 3, 2),
        pooled(normal(2, 3, 8, 9).relu(), 3, 2, ceil_mode=True),
        pooled(normal(1, 5, 7, 10), (3, 2), (1, 2), (1, 0), (2, 1)),
        pooled(normal(1, 1, 5, 5), 1),
        pooled(normal(1, 2, 17, 18), 16, 1),  # 256 positions
        pooled(normal(0, 3, 9, 8), 3, 2),
    ]


SAMPLES = pytest.mark.parametrize("sample", sample_inputs(), ids=lambda s: f"{tuple(s.tensors[0].shape)} {s.options}")


@DTYPES
@SAMPLES
def test_values_and_gradient(backend, sample, dtype):
    check_values(ops.switch_gather, reference.switch_gather, torchs, sample, backend.device, dtype)


def test_memory_format_follows_the_input(backend):
    """… and not the switches, which may have another."""
    placed = sample_inputs()[0].on(backend.device, torch.float32, "channels_last")
    placed.tensors[1] = placed.tensors[1].contiguous()
    output = placed.call(ops.switch_gather)
    assert channels_innermost(output) and not output.is_contiguous()
    assert torch.equal(output, sample_inputs()[0].on(backend.device, torch.float32).call(ops.switch_gather))


def test_gives_the_pooled_values(backend):
    x = normal(2, 5, 11, 12).float().to(backend.device)
    output, switches = ops.max_pool2d(x, 3, 2, 1, ceil_mode=True)
    assert torch.equal(ops.switch_gather(x, switches, 3, 2, 1), output)


def test_is_the_transpose_of_unpooling(backend):
    """<unpool(v), u> = <v, gather(u)> for any values; whole numbers, so that both are exact. And torch agrees."""

    def check(case):
        x, options = case
        options = {name: value for name, value in options.items() if name != "overlap"}
        sample = pooled(x, **options)
        check_exact(ops.switch_gather, torchs, sample, backend)
        u, switches = sample.on(backend.device, torch.float32).tensors
        v = whole_numbers(*switches.shape, seed=3).to(u)
        up = ops.max_unpool2d(v, switches, **sample.options, output_size=u.shape[2:])
        assert (up * u).sum() == (v * ops.switch_gather(u, switches, **sample.options)).sum()

    for_all(backend, POOLED, check, examples=60)


def test_a_wrong_switch_is_found(backend):
    """Out of the window, and out of the input: the last window of ceil_mode is cut."""
    x = normal(1, 2, 6, 6).float().to(backend.device)
    for layout in ("contiguous", "channels_last"):
        for index, value in (((0, 1, 0, 2), 9), ((0, 1, 2, 1), 6)):
            _, switches = ops.max_pool2d(LAYOUTS[layout](x), 3, 2, ceil_mode=True)
            switches[index] = value
            with pytest.raises(RuntimeError, match=rf"switches\[{', '.join(map(str, index))}\] is {value};"):
                ops.switch_gather(x, switches, 3, 2)


U, S = torch.ones(1, 2, 6, 6), torch.zeros(1, 2, 3, 3, dtype=torch.uint8)
REFUSED = [
    (TypeError, "input", lambda u, s: ops.switch_gather([], s, 2)),
    (TypeError, "switches", lambda u, s: ops.switch_gather(u, s.tolist(), 2)),
    (TypeError, "out", lambda u, s: ops.switch_gather(u, s, 2, out=(u,))),
    (RuntimeError, "switches has dtype", lambda u, s: ops.switch_gather(u, s.long(), 2)),
    (RuntimeError, "switches has shape", lambda u, s: ops.switch_gather(u, s[:, :1], 2)),
    (RuntimeError, "switches has shape", lambda u, s: ops.switch_gather(u, s[0], 2)),
    (RuntimeError, "switches has shape", lambda u, s: ops.switch_gather(u, s[:, :, :2], 2)),
    (RuntimeError, "switches is on", lambda u, s: ops.switch_gather(u, s.to("meta"), 2)),
    (RuntimeError, "input has shape", lambda u, s: ops.switch_gather(u[0], s, 2)),
    (RuntimeError, "input has dtype", lambda u, s: ops.switch_gather(u.int(), s, 2)),
    (RuntimeError, "padding is", lambda u, s: ops.switch_gather(u, s, 2, padding=2)),
    (RuntimeError, "256", lambda u, s: ops.switch_gather(u, s, 17)),
]


@pytest.mark.parametrize(("error", "message", "call"), REFUSED)
def test_refuses(backend, error, message, call):
    with pytest.raises(error, match=message):
        call(U.to(backend.device), S.to(backend.device))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_out(backend, layout):
    check_out_convention(ops.switch_gather, sample_inputs()[1].on(backend.device, torch.float32, layout))


@NATIVE
def test_out_is_registered(backend):
    sample = sample_inputs()[0].on(backend.device, torch.float32)
    sample.options["out"] = torch.empty_like(sample.call(ops.switch_gather))
    with torch.no_grad():
        check_registration(ops.switch_gather, Sample(sample.tensors, sample.options, differentiable=False))
