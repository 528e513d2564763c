"""map_maximum: the maximum of each map and its first position, from the map or from its pool."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st
from oracles import DTYPES, LAYOUTS, Sample, for_all, normal, whole_numbers

from zfcuda import ops, reference


def torchs(input, *_, **__):
    """torch's argmax, the first of equals; a pool changes nothing. NaN counts as -inf."""
    maps = torch.where(input.isnan(), -torch.inf, input).flatten(2)
    return maps.amax(2), maps.argmax(2)


def pooled(x, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False):
    """A sample with the pool of ``x``."""
    window = {"kernel_size": kernel_size, "stride": stride, "padding": padding, "dilation": dilation}
    return Sample([x, *reference.max_pool2d(x, **window, ceil_mode=ceil_mode)], window, differentiable=False)


def alone(x):
    return Sample([x], differentiable=False)


def sample_inputs():
    return [
        alone(normal(2, 3, 9, 8)),
        alone(normal(1, 33, 1, 300)),
        alone(normal(3, 40, 17, 1)),
        alone(normal(1, 1, 1, 1)),
        alone(normal(0, 3, 4, 4)),
        pooled(normal(2, 5, 8, 8), 2),
        pooled(normal(2, 5, 9, 11), 2),  # a border of one
        pooled(normal(2, 5, 9, 10), 2, ceil_mode=True),
        pooled(normal(2, 35, 13, 12), 3, 2),
        pooled(normal(1, 6, 14, 13), (5, 4), (4, 3)),  # borders of up to three
        pooled(normal(1, 6, 10, 10), 5, 5, 2),
        pooled(normal(2, 4, 7, 9), (3, 2), (1, 2), (1, 0)),
        pooled(normal(1, 4, 9, 9), 2, 3),  # gaps: the whole map is read
        pooled(normal(1, 4, 9, 9), 3, 1, 1, 2),
        pooled(normal(1, 2, 33, 16), (16, 16), (9, 1)),  # 256 positions
        pooled(normal(0, 2, 6, 6), 2),
    ]


SAMPLES = pytest.mark.parametrize("sample", sample_inputs(), ids=lambda s: f"{tuple(s.tensors[0].shape)} {s.options}")


def same(actual, expected, dtype):
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape and a.dtype == (dtype if e.is_floating_point() else torch.int64)
        assert torch.equal(a.cpu(), e.to(a.dtype))


def check(sample, backend, dtype=torch.float32, layout="contiguous"):
    """Not an error allowed: a maximum is one of the values."""
    expected = sample.on(torch.device("cpu"), dtype).call(torchs)
    same(sample.on(torch.device("cpu"), dtype).call(reference.map_maximum), expected, dtype)
    same(sample.on(backend.device, dtype, layout).call(ops.map_maximum), expected, dtype)


@DTYPES
@pytest.mark.parametrize("layout", LAYOUTS)
@SAMPLES
def test_values(backend, sample, dtype, layout):
    if backend.name == "simt" and layout not in ("contiguous", "channels_last"):
        pytest.skip("what concerns torch alone")
    check(sample, backend, dtype, layout)


def test_layouts_of_the_pool_may_differ(backend):
    placed = pooled(normal(2, 5, 9, 9), 3, 2).on(backend.device, torch.float32, "channels_last")
    placed.tensors[1:] = [t.contiguous() for t in placed.tensors[1:]]
    same(placed.call(ops.map_maximum), placed.on(torch.device("cpu"), torch.float32).call(torchs), torch.float32)


def test_the_maximum_at_every_position(backend):
    """Whichever position is largest, in the pool or in the border that it leaves."""
    height, width = 8, 9
    maps = torch.eye(height * width).view(1, height * width, height, width).double()
    for pool in ((3, 2), (3, 3), (2, 2), (5, 4, 2), (1, 1)):
        for layout in ("contiguous", "channels_last"):
            check(pooled(maps, *pool), backend, layout=layout)
    check(alone(maps), backend)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_first_of_equals(backend, layout):
    for seed in range(4):
        x = whole_numbers(2, 34, 11, 10, seed=seed, top=1)
        for sample in (alone(x), pooled(x, 3, 2), pooled(x, 3, 3), pooled(x, 2, 1, 1), pooled(x, 4, 3, 1)):
            check(sample, backend, layout=layout)


def test_zeros_of_both_signs_are_equal(backend):
    check(alone(torch.tensor([-0.0, 0.0, -0.0]).view(1, 1, 1, 3).double()), backend)
    check(alone(torch.tensor([-1.0, 0.0, -0.0]).view(1, 1, 3, 1).double()), backend)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_infinities(backend, layout):
    x = normal(1, 6, 7, 7)
    x[:, 1] = -torch.inf
    x[:, 2, 3, 4] = torch.inf
    x[:, 3, 1:, 2] = torch.inf
    x[:, 4] = -torch.inf
    x[:, 4, 6, 6] = -1e30
    x[:, 5, 0] = -torch.inf
    for sample in (alone(x), pooled(x, 3, 2), pooled(x, 2), pooled(x, 3, 2, 1)):
        check(sample, backend, layout=layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nan_is_passed_over(backend, layout):
    x = whole_numbers(2, 5, 6, 7)
    x[torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.3] = torch.nan
    x[:, 1] = torch.nan
    x[:, 2, :3] = torch.nan
    check(alone(x), backend, layout=layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("window", [(2, 2), (3, 2), (3, 3), (3, 1, 1)], ids=str)
def test_a_window_of_nan_is_passed_over(backend, window, layout):
    """With a pool: what counts is a position of a window without NaN, or of no window and not NaN itself."""
    x = whole_numbers(2, 5, 8, 9, seed=3)
    x[torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.05] = torch.nan
    x[0, 1] = torch.nan
    sample = pooled(x, *window)
    kernel, stride, padding = (*window, 0)[:3]
    expected = []
    for map in x.flatten(0, 1):
        counts = map.isnan() == 0
        covered, clean = torch.zeros_like(counts), torch.zeros_like(counts)
        for top in range(-padding, 8 + padding - kernel + 1, stride):
            for left in range(-padding, 9 + padding - kernel + 1, stride):
                here = (slice(max(top, 0), top + kernel), slice(max(left, 0), left + kernel))
                covered[here] = True
                clean[here] |= not map[here].isnan().any()
        candidates = torch.where(counts & (clean | ~covered), map, -torch.inf).flatten()
        expected.append((candidates.max(), candidates.argmax()))
    values, positions = sample.on(backend.device, torch.float32, layout).call(ops.map_maximum)
    assert values.flatten().tolist() == [float(v) for v, _ in expected]
    assert positions.flatten().tolist() == [int(p) for _, p in expected]


def _valid(x, kernel_size, padding, dilation, **_):
    sizes = zip(x.shape[2:], kernel_size, padding, dilation, strict=True)
    return all(2 * p <= k and (k - 1) * d < n + p and n >= d for n, k, p, d in sizes)


CASES = st.tuples(
    st.builds(
        whole_numbers, *(st.integers(1, top) for top in (2, 40, 12, 12)), seed=st.integers(0, 99), top=st.integers(0, 9)
    ),
    st.fixed_dictionaries(
        {
            "kernel_size": st.tuples(st.integers(1, 5), st.integers(1, 5)),
            "stride": st.none() | st.tuples(st.integers(1, 5), st.integers(1, 5)),
            "padding": st.tuples(st.integers(0, 2), st.integers(0, 2)),
            "dilation": st.tuples(st.sampled_from([1, 1, 1, 2]), st.just(1)),
            "ceil_mode": st.booleans(),
        }
    ),
    st.sampled_from(["contiguous", "channels_last"]),
).filter(lambda case: _valid(case[0], **case[1]))


def test_agrees_with_torch(backend):
    def compare(case):
        x, options, layout = case
        check(pooled(x, **options), backend, layout=layout)
        check(alone(x), backend, layout=layout)

    for_all(backend, CASES, compare, examples=150)


X, P, S = torch.ones(2, 3, 6, 6), torch.ones(2, 3, 3, 3), torch.zeros(2, 3, 3, 3).byte()
REFUSED = [
    (TypeError, "input", lambda x, p, s: ops.map_maximum(None)),
    (TypeError, "pooled", lambda x, p, s: ops.map_maximum(x, 1, s, 2)),
    (TypeError, "switches", lambda x, p, s: ops.map_maximum(x, p, 1, 2)),
    (TypeError, "kernel_size", lambda x, p, s: ops.map_maximum(x, p, s, 2.5)),
    (TypeError, "stride", lambda x, p, s: ops.map_maximum(x, p, s, 2, "2")),
    (RuntimeError, "pooled is None", lambda x, p, s: ops.map_maximum(x, None, s, 2)),
    (RuntimeError, "switches is None", lambda x, p, s: ops.map_maximum(x, p, None, 2)),
    (RuntimeError, "input has shape", lambda x, p, s: ops.map_maximum(x[0])),
    (RuntimeError, "input has dtype", lambda x, p, s: ops.map_maximum(x.int())),
    (RuntimeError, "pooled has shape", lambda x, p, s: ops.map_maximum(x, p[:, :, :2], s[:, :, :2], 2)),
    (RuntimeError, "pooled has shape", lambda x, p, s: ops.map_maximum(x, p, s, 2, 1)),
    (RuntimeError, "pooled has shape", lambda x, p, s: ops.map_maximum(x, p, s, 2, 4)),  # gaps or not
    (RuntimeError, "pooled has dtype", lambda x, p, s: ops.map_maximum(x, p.double(), s, 2)),
    (RuntimeError, "pooled is on meta", lambda x, p, s: ops.map_maximum(x, p.to("meta"), s, 2)),
    (RuntimeError, "switches has shape", lambda x, p, s: ops.map_maximum(x, p, s[:1], 2)),
    (RuntimeError, "switches has dtype", lambda x, p, s: ops.map_maximum(x, p, s.long(), 2)),
    (RuntimeError, "switches is on meta", lambda x, p, s: ops.map_maximum(x, p, s.to("meta"), 2)),
    (RuntimeError, "stride is", lambda x, p, s: ops.map_maximum(x, p, s, 2, 0)),
    (RuntimeError, "padding is", lambda x, p, s: ops.map_maximum(x, p, s, 2, 2, 2)),
    (RuntimeError, "256", lambda x, p, s: ops.map_maximum(x, p, s, 17)),
]


@pytest.mark.parametrize(("error", "message", "call"), REFUSED)
def test_refuses(backend, error, message, call):
    with pytest.raises(error, match=message):
        call(*(t.to(backend.device) for t in (X, P, S)))
