"""max_unpool2d and the switches' conversions: both overlap rules against torch, gradients, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from oracles import (
    DTYPES,
    LAYOUTS,
    NATIVE,
    Sample,
    channels_innermost,
    check_exact,
    check_values,
    for_all,
    normal,
    whole_numbers,
)

from zfcuda import ops, reference


@pytest.fixture(autouse=True)
def one_thread(threads):
    """torch's own unpooling is a race between threads where windows overlap."""
    threads(1)


def torchs(input, switches, kernel_size, stride=None, padding=0, dilation=1, output_size=None, overlap="sum"):
    """overwrite: torch's own on the CPU, its gradient cut at the losers; sum: the gradient of torch's pool."""
    size = output_size or reference.max_unpool2d(input, switches, kernel_size, stride, padding, dilation).shape
    height, width = size[-2:]
    indices = reference.switches_to_indices(switches, size, kernel_size, stride, padding, dilation)
    if overlap == "sum":
        zeros = input.new_zeros(*input.shape[:2], height * width)
        return zeros.scatter_add(2, indices.flatten(2), input.flatten(2)).unflatten(2, (height, width))
    with torch.no_grad():
        names = torch.arange(input[0, 0].numel(), dtype=torch.float64).view_as(input[0, 0]).expand_as(input)
        # unpool_size only limits torch's output_size to a range; the kernel's indices are absolute.
        written = torch.ops.aten.max_unpool2d(names.contiguous(), indices.contiguous(), [height, width])
        winners = written.flatten(2).gather(2, indices.flatten(2)).view_as(names) == names
    values = torch.where(winners, input, 0)
    return torch.ops.aten.max_unpool2d(input.detach(), indices, [height, width]) + _zero(values, indices, height, width)


def _zero(values, indices, height, width):
    """Zero with the gradient of the winners."""
    zeros = values.new_zeros(*values.shape[:2], height * width)
    placed = zeros.scatter_add(2, indices.flatten(2), values.flatten(2)).unflatten(2, (height, width))
    return placed - placed.detach()


def pooled(x, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, **options):
    """The sample that unpools what the oracle pooled from ``x``; the values are new."""
    _, switches = reference.max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode)
    values = (whole_numbers if x.frac().abs().sum() == 0 else normal)(*switches.shape, seed=5)
    window = {"kernel_size": kernel_size, "stride": stride, "padding": padding, "dilation": dilation}
    return Sample([values, switches], dict(**window, output_size=tuple(x.shape[2:]), **options))


def sample_inputs():
    return [
        pooled(normal(2, 3, 9, 8), 3, 2, overlap="sum"),
        pooled(normal(2, 3, 9, 8), 3, 2, overlap="overwrite"),
        pooled(normal(2, 3, 8, 9).relu(), 3, 2, ceil_mode=True),
        pooled(normal(2, 3, 8, 9).relu(), 3, 2, ceil_mode=True, overlap="overwrite"),
        pooled(normal(1, 5, 7, 10), (3, 2), (1, 2), (1, 0), (2, 1)),
        pooled(normal(1, 4, 6, 6), 3, 1, 1, overlap="overwrite"),
        pooled(normal(1, 1, 5, 5), 1),
        pooled(normal(1, 2, 17, 18), 16, 1),  # 256 positions
        pooled(normal(0, 3, 9, 8), 3, 2),
    ]


SAMPLES = pytest.mark.parametrize("sample", sample_inputs(), ids=lambda s: str(s.options)[1:-1])


@DTYPES
@SAMPLES
def test_values_and_gradient(backend, sample, dtype):
    check_values(ops.max_unpool2d, reference.max_unpool2d, torchs, sample, backend.device, dtype)


def test_memory_format_follows_the_input(backend):
    """… and not the switches, which may have another."""
    placed = sample_inputs()[0].on(backend.device, torch.float32, "channels_last")
    placed.tensors[1] = placed.tensors[1].contiguous()
    output = placed.call(ops.max_unpool2d)
    assert channels_innermost(output) and not output.is_contiguous()
    assert torch.equal(output, sample_inputs()[0].on(backend.device, torch.float32).call(ops.max_unpool2d))


def test_overwrite_lets_a_zero_win(backend):
    """Two windows share the position (0, 2); the later one has the value zero."""
    values = torch.tensor([5.0, 0.0], device=backend.device).view(1, 1, 1, 2).requires_grad_()
    switches = torch.tensor([2, 0], dtype=torch.uint8, device=backend.device).view(1, 1, 1, 2)
    arguments = {"kernel_size": (1, 3), "stride": (1, 2)}
    for overlap, shared, gradient in (("sum", 5.0, [1.0, 1.0]), ("overwrite", 0.0, [0.0, 1.0])):
        output = ops.max_unpool2d(values, switches, overlap=overlap, **arguments)
        assert output.flatten().tolist() == [0, 0, shared, 0, 0]
        assert torch.autograd.grad(output.sum(), values)[0].flatten().tolist() == gradient


@NATIVE
def test_vmap_of_a_whole_output_size(backend):
    """The size is that of one of the mapped batches."""
    x = normal(3, 2, 4, 7, 6).to(backend.device)
    pooled, switches = torch.func.vmap(lambda t: ops.max_pool2d(t, 2))(x)
    unpooled = torch.func.vmap(lambda p, s: ops.max_unpool2d(p, s, 2, output_size=(2, 4, 7, 6)))(pooled, switches)
    one_by_one = [ops.max_unpool2d(p, s, 2, output_size=(7, 6)) for p, s in zip(pooled, switches, strict=True)]
    assert torch.equal(unpooled, torch.stack(one_by_one))


def test_conversions_of_one_image(backend):
    _, switches = ops.max_pool2d(normal(2, 3, 7, 6).to(backend.device), 2)
    indices = ops.switches_to_indices(switches, (7, 6), 2)
    assert torch.equal(ops.switches_to_indices(switches[1], (3, 7, 6), 2), indices[1])
    assert torch.equal(ops.indices_to_switches(indices[1], (7, 6), 2), switches[1])


def test_default_output_size_is_torchs(backend):
    values = torch.ones(1, 1, 3, 4, device=backend.device)
    switches = torch.zeros(1, 1, 3, 4, dtype=torch.uint8, device=backend.device)
    expected = F.max_unpool2d(values.cpu(), torch.zeros(1, 1, 3, 4, dtype=torch.int64), (3, 2), (2, 3))
    assert ops.max_unpool2d(values, switches, (3, 2), (2, 3)).shape == expected.shape


# ---------------------------------------------------------------- arguments

WINDOWS = st.fixed_dictionaries(
    {
        "kernel_size": st.tuples(st.integers(1, 4), st.integers(1, 4)),
        "stride": st.none() | st.tuples(st.integers(1, 3), st.integers(1, 3)),
        "padding": st.tuples(st.integers(0, 1), st.integers(0, 1)),
        "dilation": st.tuples(st.integers(1, 2), st.integers(1, 2)),
        "ceil_mode": st.booleans(),
        "overlap": st.sampled_from(["sum", "overwrite"]),
    }
)


def _valid(x, kernel_size, padding, dilation, **_):
    sizes = zip(x.shape[2:], kernel_size, padding, dilation, strict=True)
    return all(2 * p <= k and (k - 1) * d < n + p and n >= d for n, k, p, d in sizes)


INPUTS = st.builds(
    whole_numbers, st.integers(1, 2), st.integers(1, 5), st.integers(1, 9), st.integers(1, 9), seed=st.integers(0, 99)
)
POOLED = st.tuples(INPUTS, WINDOWS).filter(lambda case: _valid(case[0], **case[1]))


def test_agrees_with_torch(backend):
    def check(case):
        x, options = case
        check_exact(ops.max_unpool2d, torchs, pooled(x, **options), backend)

    for_all(backend, POOLED, check, examples=150)


def test_one_wrong_switch_is_found(backend):
    """Any one switch set to any value: accepted exactly where it points into its window and the output."""

    def check(case):
        (x, options), seed, value = case
        sample = pooled(x, **options).on(backend.device, torch.float32)
        values, switches = sample.tensors
        position = seed % switches.numel()
        switches = switches.clone()
        switches.view(-1)[position] = value
        window = [options[name] for name in ("kernel_size", "stride", "padding", "dilation")]
        kernel, stride, padding, dilation = window
        stride = stride or kernel
        index = [int(i) for i in torch.unravel_index(torch.tensor(position), switches.shape)]
        y, x_ = (index[2 + i] * stride[i] - padding[i] + divmod(value, kernel[1])[i] * dilation[i] for i in (0, 1))
        fits = value < kernel[0] * kernel[1] and 0 <= y < x.size(2) and 0 <= x_ < x.size(3)
        for layout in ("contiguous", "channels_last"):
            moved = LAYOUTS[layout](values.detach())
            if fits:
                ops.max_unpool2d(moved, switches, **sample.options)
                ops.switches_to_indices(switches, x.shape, *window)
            else:
                message = rf"switches\[{', '.join(map(str, index))}\] is {value};"
                with pytest.raises(RuntimeError, match=message):
                    ops.max_unpool2d(moved, switches, **sample.options)
                with pytest.raises(RuntimeError, match=message):
                    ops.switches_to_indices(switches, x.shape, *window)

    for_all(backend, st.tuples(POOLED, st.integers(0, 10**6), st.integers(0, 255)), check, examples=150)


V, S = torch.ones(1, 2, 3, 3), torch.zeros(1, 2, 3, 3, dtype=torch.uint8)
REFUSED = [
    (TypeError, "switches", lambda v, s: ops.max_unpool2d(v, s.tolist(), 2)),
    (RuntimeError, "switches has dtype", lambda v, s: ops.max_unpool2d(v, s.long(), 2)),
    (RuntimeError, "switches has shape", lambda v, s: ops.max_unpool2d(v, s[:, :1], 2)),
    (RuntimeError, "switches is on", lambda v, s: ops.max_unpool2d(v, s.to("meta"), 2)),
    (RuntimeError, "input has shape", lambda v, s: ops.max_unpool2d(v[0, 0], s[0, 0], 2)),
    (RuntimeError, "input has dtype", lambda v, s: ops.max_unpool2d(v.int(), s, 2)),
    (RuntimeError, "output_size", lambda v, s: ops.max_unpool2d(v, s, 2, output_size=(8, 8))),
    (RuntimeError, "output_size", lambda v, s: ops.max_unpool2d(v, s, 2, output_size=(4, 6))),
    (RuntimeError, "output_size", lambda v, s: ops.max_unpool2d(v, s, 2, output_size=(1, 3, 6, 6))),
    (RuntimeError, "output_size", lambda v, s: ops.max_unpool2d(v, s, 2, output_size=(6,))),
    (TypeError, "output_size", lambda v, s: ops.max_unpool2d(v, s, 2, output_size=(6.0, 6.0))),
    (TypeError, "output_size", lambda v, s: ops.max_unpool2d(v, s, 2, output_size=6)),
    (ValueError, "overlap is 'mean'", lambda v, s: ops.max_unpool2d(v, s, 2, overlap="mean")),
    (RuntimeError, "padding is", lambda v, s: ops.max_unpool2d(v, s, 2, padding=2)),
    (RuntimeError, "256", lambda v, s: ops.max_unpool2d(v, s, 17)),
    (RuntimeError, "stride is", lambda v, s: ops.max_unpool2d(v, s, 2, -1)),
]


@pytest.mark.parametrize(("error", "message", "call"), REFUSED)
def test_refuses(backend, error, message, call):
    with pytest.raises(error, match=message):
        call(V.to(backend.device), S.to(backend.device))


# ---------------------------------------------------------------- conversions


def test_conversions_are_torchs_indices(backend):
    def check(case):
        x, options = case
        options = {name: value for name, value in options.items() if name != "overlap"}
        _, indices = F.max_pool2d(x, **options, return_indices=True)
        _, switches = ops.max_pool2d(x.float().to(backend.device), **options)
        window = [options[name] for name in ("kernel_size", "stride", "padding", "dilation")]
        assert torch.equal(ops.switches_to_indices(switches, x.shape[2:], *window).cpu(), indices)
        assert torch.equal(ops.indices_to_switches(indices.to(backend.device), x.shape, *window), switches)

    for_all(backend, POOLED, check)


def test_an_index_outside_its_window():
    """Every index for every window of a small pool: accepted exactly where the window has it."""
    size, window = (4, 4), {"kernel_size": 2, "stride": 2, "padding": 1, "dilation": 2}
    for index in range(-17, 33):
        for place in range(4):
            oy, ox = divmod(place, 2)
            taps = [(oy * 2 - 1 + 2 * i, ox * 2 - 1 + 2 * j) for i in (0, 1) for j in (0, 1)]
            inside = [y * 4 + x if 0 <= y < 4 and 0 <= x < 4 else None for y, x in taps]
            base = torch.tensor([5, 5, 5, 5]).view(1, 1, 2, 2)  # (1, 1) belongs to every window
            base.view(-1)[place] = index
            if index in inside:
                switches = ops.indices_to_switches(base, size, **window)
                assert int(switches.view(-1)[place]) == inside.index(index)
            else:
                with pytest.raises(RuntimeError, match=rf"indices\[0, 0, {oy}, {ox}\] is {index}"):
                    ops.indices_to_switches(base, size, **window)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (RuntimeError, "indices has dtype", lambda: ops.indices_to_switches(S, (6, 6), 2)),
        (RuntimeError, "indices has shape", lambda: ops.indices_to_switches(S.long(), (9, 6), 2)),
        (RuntimeError, "switches has dtype", lambda: ops.switches_to_indices(S.long(), (6, 6), 2)),
        (RuntimeError, "switches has shape", lambda: ops.switches_to_indices(S[0, 0], (6, 6), 2)),
        (TypeError, "switches", lambda: ops.switches_to_indices([1], (6, 6), 2)),
        (TypeError, "input_size", lambda: ops.switches_to_indices(S, (6.5, 6), 2)),
    ],
)
def test_conversions_refuse(error, message, call):
    with pytest.raises(error, match=message):
        call()
