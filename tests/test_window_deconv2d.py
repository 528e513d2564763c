"""window_deconv2d: unpool, gate and filter windows of maps, clipped to the map below."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from oracles import (
    DTYPES,
    NATIVE,
    Sample,
    check_exact,
    check_values,
    for_all,
    normal,
    whole_numbers,
)

from zfcuda import ops, reference

GATES = ("none", "deconvnet", "backprop", "guided")


def torchs(
    signal,
    weight,
    origins,
    map_size,
    stride=1,
    dilation=1,
    groups=1,
    *,
    gate="none",
    positive=None,
    switches=None,
    pool=None,
):
    """torch's transposed convolution; NumPy's bits; a loop over the windows for what lies outside."""
    maps = signal.movedim(3, 1)
    if pool is not None:
        kernel, step, spread = (_pair(p) for p in pool)
        height, width = _reach(maps.shape[2:], *pool)
        taps = switches.movedim(3, 1).long()
        rows = torch.arange(maps.size(2))[:, None] * step[0] + taps // kernel[1] * spread[0]
        columns = torch.arange(maps.size(3)) * step[1] + taps % kernel[1] * spread[1]
        flat = torch.where(taps < kernel[0] * kernel[1], rows * width + columns, height * width)
        bin_for_none = maps.new_zeros(*maps.shape[:2], height * width + 1)
        maps = bin_for_none.scatter_add(2, flat.flatten(2), maps.flatten(2))[..., :-1].unflatten(2, (height, width))
    if gate in ("deconvnet", "guided"):
        maps = maps.relu()
    if gate in ("backprop", "guided"):
        bits = np.unpackbits(positive.numpy(), axis=3, bitorder="little", count=maps.size(1))
        maps = maps.masked_fill(torch.from_numpy(bits).movedim(3, 1) == 0, 0)
    image = F.conv_transpose2d(maps, weight, None, stride, 0, 0, groups, dilation).movedim(1, 3)
    clipped = torch.zeros_like(image)
    for window, (top, left) in enumerate(origins.tolist()):
        y = slice(max(-top, 0), max(min(image.size(1), map_size[0] - top), 0))
        x = slice(max(-left, 0), max(min(image.size(2), map_size[1] - left), 0))
        clipped[window, y, x] = image[window, y, x]
    return clipped


def _pair(value):
    return (value, value) if isinstance(value, int) else value


def _reach(size, kernel, stride, dilation):
    return [
        (n - 1) * s + (k - 1) * d + 1 for n, k, s, d in zip(size, *map(_pair, (kernel, stride, dilation)), strict=True)
    ]


def step(
    size, weight, map_size, windows=4, *, stride=1, dilation=1, groups=1, gate="none", pool=None, values=normal, seed=0
):
    """A sample: the windows' origins run from beyond the top left corner of the map to beyond the bottom right."""
    random = torch.Generator().manual_seed(seed)
    channels = weight[0]
    options = {"map_size": map_size, "stride": stride, "dilation": dilation, "groups": groups, "gate": gate}
    maps = size
    if pool is not None:
        kernel = _pair(pool[0])
        # One in five is 255, for none; one in five may be beyond the taps of the window.
        switches = torch.randint(kernel[0] * kernel[1], (windows, *size, channels), generator=random)
        odd = torch.randint(5, switches.shape, generator=random)
        beyond = torch.randint(256, switches.shape, generator=random)
        options["switches"] = switches.where(odd != 0, 255).where(odd != 1, beyond).byte()
        options["pool"] = pool
        maps = _reach(size, *pool)
    if gate in ("backprop", "guided"):
        bits = (windows, *maps, -(-channels // 8))
        options["positive"] = torch.randint(256, bits, generator=random).byte()
    image = _reach(maps, weight[2:], stride, dilation)
    origins = torch.stack(
        [torch.randint(-n, m + 2, (windows,), generator=random) for n, m in zip(image, map_size, strict=True)], 1
    )
    corners = torch.tensor([[0, 0], [-1, map_size[1] - image[1] + 1], [map_size[0] - 1, -image[1] + 1], [-99, 99]])
    origins[:4] = corners[:windows]
    signal = values(windows, *size, channels, seed=seed)
    return Sample([signal, values(*weight, seed=seed + 1), origins], options, differentiable=False)


def sample_inputs():
    return [
        step((1, 1), (5, 7, 3, 3), (9, 9)),
        step((2, 3), (16, 8, 3, 3), (4, 12), windows=5, gate="deconvnet"),
        step((1, 1), (3, 7, 3, 3), (9, 9), stride=2, gate="backprop"),
        step((3, 2), (6, 4, 5, 5), (13, 14), stride=2, gate="deconvnet", pool=(3, 2, 1)),
        step((2, 2), (9, 3, 7, 7), (20, 19), stride=2, gate="guided", pool=(2, 2, 1)),
        step((4, 3), (8, 2, 3, 3), (8, 8), groups=2, dilation=2, gate="backprop"),
        step((2, 3), (6, 3, 2, 3), (8, 9), windows=6, dilation=(1, 3), stride=(3, 2), groups=3, gate="guided"),
        step((1, 2), (4, 3, 11, 11), (30, 31), stride=4, pool=(3, 2, 1)),
        step((3, 4), (4, 1, 3, 3), (4, 5), groups=4, gate="deconvnet"),  # depthwise
        step((3, 2), (17, 20, 1, 1), (3, 3), windows=7, gate="guided"),
        step((3, 3), (4, 4, 2, 2), (11, 11), stride=4, gate="none"),  # pixels that no filter reaches
        step((2, 2), (3, 2, 2, 2), (9, 9), pool=((2, 3), (1, 4), (2, 1))),
        step((1, 1), (2, 1, 1, 2), (16, 16), windows=3, pool=((15, 17), 3, 1), gate="backprop"),  # 255 positions
        step((2, 1), (33, 70, 3, 3), (40, 40), windows=2, gate="guided", pool=(3, 2, 1)),
        step((1, 1), (3, 3, 3, 3), (1, 1), windows=1),
        step((2, 2), (3, 2, 3, 3), (9, 9), windows=0, pool=(3, 2, 1), gate="guided"),
    ]


def _name(sample):
    options = {name: v for name, v in sample.options.items() if name not in ("positive", "switches")}
    return f"{tuple(sample.tensors[0].shape)} {tuple(sample.tensors[1].shape)} {options}"


SAMPLES = pytest.mark.parametrize("sample", sample_inputs(), ids=_name)


@DTYPES
@SAMPLES
def test_values(backend, sample, dtype):
    check_values(ops.window_deconv2d, reference.window_deconv2d, torchs, sample, backend.device, dtype)


@pytest.mark.parametrize("windows", [1, 3, 64, 100])
@pytest.mark.parametrize("size", range(1, 8))
def test_three_by_three_filters(backend, size, windows):
    """The shape of most layers, which the CPU multiplies another way."""
    if backend.name == "simt" and windows * size**2 > 50:
        pytest.skip("minutes on the emulator")
    sample = step((size, size), (20, 24, 3, 3), (2 * size, 9), windows, gate=GATES[size % 4], seed=windows)
    check_values(ops.window_deconv2d, reference.window_deconv2d, torchs, sample, backend.device, torch.float32)


@pytest.mark.parametrize(
    "backend",
    [
        "cpu",
        pytest.param("cpu_baseline", marks=pytest.mark.slow),
        pytest.param("cpu_v3", marks=pytest.mark.slow),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
    indirect=True,
)
@pytest.mark.parametrize("channels", range(1, 7))
def test_narrow_filters(backend, channels):
    """Of every width around one, two and three vectors, which the CPU multiplies a third way."""
    for kernel in range(1, 13):
        for maps, stride, dilation in ((1, 1, 1), (17, 2, 1), (70, 1, (2, 1))):
            sample = step(
                (2, 3),
                (maps, channels, kernel, kernel),
                (9, 30),
                3,
                stride=stride,
                dilation=dilation,
                values=whole_numbers,
            )
            for dtype in (torch.float32, torch.float64):
                placed = sample.on(backend.device, dtype)
                expected = sample.on(torch.device("cpu"), torch.float64).call(torchs)
                assert torch.equal(placed.call(ops.window_deconv2d).cpu().double(), expected)


def test_writes_to_a_given_result(backend):
    signal, weight = whole_numbers(3, 2, 2, 5).float(), whole_numbers(5, 3, 3, 3).float()
    filters = ops.WindowDeconv2d(weight.to(backend.device), (2, 2))
    signal, origins = signal.to(backend.device), torch.zeros(3, 2, dtype=torch.int64, device=backend.device)
    expected = filters(signal, origins, (4, 4))
    out = torch.full((5, 4, 4, 3), 7.0, device=backend.device)
    assert filters(signal, origins, (4, 4), out=out[1:4]).data_ptr() == out[1].data_ptr()
    assert torch.equal(out[1:4], expected) and (out[[0, 4]] == 7).all()
    for wrong, message in (
        (out, "out has shape .5, 4, 4, 3.; it must be .3, 4, 4, 3."),
        (out[1:4].double(), "out has dtype torch.float64"),
        (out[1:4].transpose(1, 2), "out has strides"),
    ):
        with pytest.raises(RuntimeError, match=message):
            filters(signal, origins, (4, 4), out=wrong)


@NATIVE
@DTYPES
def test_many_channels(backend, dtype):
    for size, kernel, stride, pool in (((3, 5), 3, 1, None), ((1, 1), 5, 2, (3, 2, 1)), ((2, 2), 5, 2, (3, 2, 1))):
        sample = step(size, (130, 100, kernel, kernel), (21, 21), 9, stride=stride, pool=pool, gate="deconvnet")
        check_values(ops.window_deconv2d, reference.window_deconv2d, torchs, sample, backend.device, dtype)


@pytest.mark.parametrize("backend", ["cpu", "simt_fast", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_more_maps_than_are_held_at_a_time(backend):
    """Their maps are 39 MB; the CUDA form writes 32 MiB of them at a time."""
    sample = step((1, 1), (64, 2, 1, 1), (17, 17), 300, pool=((15, 17), 1, 1), gate="guided")
    check_values(ops.window_deconv2d, reference.window_deconv2d, torchs, sample, backend.device, torch.float64)


def test_a_gradient_is_refused(backend):
    """A network's weights require gradients, so the step itself is allowed; going back through it is not."""
    placed = sample_inputs()[0].on(backend.device, torch.float32)
    expected = placed.call(ops.window_deconv2d)
    placed.tensors[1].requires_grad_()
    output = placed.call(ops.window_deconv2d)
    assert torch.equal(output, expected)
    with pytest.raises(RuntimeError, match="window_deconv2d is not differentiable"):
        output.sum().backward()


def test_every_gate_at_every_sign(backend):
    values = torch.tensor([-1.0, -0.0, 0.0, 1.0, float("nan"), float("inf"), -float("inf")]).repeat(2)
    signal, one = values.view(1, 1, 1, 14), torch.eye(14).view(14, 14, 1, 1)
    for gate in GATES:
        options = {"map_size": (1, 1), "gate": gate}
        if gate in ("backprop", "guided"):
            bits = np.packbits([0] * 7 + [1] * 7, bitorder="little")
            options["positive"] = torch.from_numpy(bits).view(1, 1, 1, 2)
        for channel in range(14):  # one at a time, for 0 * inf is NaN in a sum
            only = torch.zeros_like(signal)
            only[..., channel] = signal[..., channel]
            sample = Sample([only, one[:, channel : channel + 1], torch.zeros(1, 2).long()], options, False)
            check_exact(ops.window_deconv2d, torchs, sample, backend)


@pytest.mark.parametrize("pool", [None, (3, 2, 1)], ids=["", "pool"])
def test_nan_stays_in_its_window_and_field(backend, pool):
    sample = step((3, 3), (5, 4, 2, 3), (50, 50), windows=6, stride=2, pool=pool, gate="deconvnet")
    sample.tensors[2][:] = 5
    sample.tensors[0][2, 1, 1, 3] = torch.nan
    if pool:
        sample.options["switches"][2, 1, 1, 3] = 4
    check_values(ops.window_deconv2d, reference.window_deconv2d, torchs, sample, backend.device, torch.float32)


def test_nan_is_seen_and_stays_in_its_window_of_3x3_filters(backend):
    """These may be multiplied by another algorithm, which spreads NaN within a window."""
    sample = step((4, 4), (5, 4, 3, 3), (50, 50), windows=6)
    sample.tensors[2][:] = 5
    sample.tensors[0][2, 1, 1, 3] = torch.nan
    expected = sample.call(torchs)
    actual = sample.on(backend.device, torch.float32).call(ops.window_deconv2d).cpu()
    assert actual[expected.isnan()].isnan().all()
    others = torch.arange(6) != 2
    assert not actual[others].isnan().any()


def test_nothing_outside_the_map(backend):
    """Not even NaN."""
    sample = step((2, 2), (3, 3, 3, 3), (6, 6), windows=1, gate="none")
    sample.tensors[0][:] = torch.nan
    sample.tensors[2][:] = torch.tensor([-1, 4])
    output = sample.on(backend.device, torch.float32).call(ops.window_deconv2d).cpu()
    assert output[0, 1:, :2].isnan().all()
    assert not output[0, 0].any() and not output[0, :, 2:].any()


def test_the_last_bits_of_the_last_byte_mean_nothing(backend):
    sample = step((2, 2), (5, 3, 2, 2), (9, 9), gate="guided").on(backend.device, torch.float32)
    first = sample.call(ops.window_deconv2d)
    sample.options["positive"] = sample.options["positive"] ^ 0b11100000
    assert torch.equal(sample.call(ops.window_deconv2d), first)


CASES = st.fixed_dictionaries(
    {
        "windows": st.integers(0, 6),
        "groups": st.integers(1, 3),
        "rows": st.integers(1, 6),
        "columns": st.integers(1, 5),
        "size": st.tuples(st.integers(1, 4), st.integers(1, 3)),
        "kernel": st.tuples(st.integers(1, 11), st.integers(1, 5)),
        "stride": st.tuples(st.integers(1, 4), st.integers(1, 4)),
        "dilation": st.tuples(st.integers(1, 3), st.integers(1, 2)),
        "map_size": st.tuples(st.integers(1, 20), st.integers(1, 20)),
        "pool": st.none() | st.tuples(*(st.tuples(st.integers(1, top), st.integers(1, top)) for top in (4, 4, 2))),
        "gate": st.sampled_from(GATES),
        "seed": st.integers(0, 99),
    }
)


def test_agrees_with_torch(backend):
    """Bit-equal on small integers, but for 3x3 filters, which may be multiplied by an algorithm with fractions."""

    def check(c):
        weight = (c["groups"] * c["rows"], c["columns"], *c["kernel"])
        options = {name: c[name] for name in ("windows", "stride", "dilation", "groups", "gate", "pool", "seed")}
        sample = step(c["size"], weight, c["map_size"], values=whole_numbers, **options)
        if c["kernel"] == (3, 3):
            check_values(ops.window_deconv2d, reference.window_deconv2d, torchs, sample, backend.device, torch.float32)
        else:
            check_exact(ops.window_deconv2d, torchs, sample, backend)

    for_all(backend, CASES, check, examples=150)


def test_it_is_deconv2d_and_max_unpool2d_of_whole_maps(backend):
    """A window of the whole map, padding and all, is the dense operators' step, bit for bit in the integers."""
    pooled = whole_numbers(2, 5, 4, 4)
    _, switches = reference.max_pool2d(whole_numbers(2, 5, 9, 9, seed=1), 3, 2)
    weight = whole_numbers(5, 4, 5, 5, seed=2)
    pooled, weight, switches = (
        pooled.float().to(backend.device),
        weight.float().to(backend.device),
        switches.to(backend.device),
    )
    maps = ops.max_unpool2d(pooled, switches, 3, 2)
    expected = ops.deconv2d(maps, weight, None, 2, 2, gate="deconvnet")
    origins = torch.full((2, 2), -2, device=backend.device)
    actual = ops.window_deconv2d(
        pooled.movedim(1, 3),
        weight,
        origins,
        expected.shape[2:],
        2,
        gate="deconvnet",
        switches=switches.movedim(1, 3),
        pool=(3, 2, 1),
    )
    assert torch.equal(actual[:, 2:-2, 2:-2].movedim(3, 1), expected)
    assert not actual[:, :2].any() and not actual[:, :, -2:].any()


SIGNAL, WEIGHT, ORIGINS = torch.ones(2, 2, 3, 4), torch.ones(4, 3, 3, 3), torch.zeros(2, 2).long()
BITS, SWITCHES = torch.zeros(2, 2, 3, 1).byte(), torch.zeros(2, 2, 3, 4).byte()
M = (9, 9)
REFUSED = [
    (TypeError, "signal", lambda s, w, o: ops.window_deconv2d([], w, o, M)),
    (TypeError, "weight", lambda s, w, o: ops.window_deconv2d(s, None, o, M)),
    (TypeError, "origins", lambda s, w, o: ops.window_deconv2d(s, w, [(0, 0)], M)),
    (TypeError, "map_size", lambda s, w, o: ops.window_deconv2d(s, w, o, 0.5)),
    (TypeError, "stride", lambda s, w, o: ops.window_deconv2d(s, w, o, M, None)),
    (TypeError, "groups", lambda s, w, o: ops.window_deconv2d(s, w, o, M, groups=None)),
    (TypeError, "positive", lambda s, w, o: ops.window_deconv2d(s, w, o, M, gate="guided", positive=1)),
    (TypeError, "switches", lambda s, w, o: ops.window_deconv2d(s, w, o, M, switches=[], pool=(2, 2, 1))),
    (TypeError, "pool is 2", lambda s, w, o: ops.window_deconv2d(s, w, o, M, switches=SWITCHES, pool=2)),
    (TypeError, "pool is", lambda s, w, o: ops.window_deconv2d(s, w, o, M, switches=SWITCHES, pool=(2, 2))),
    (TypeError, r"pool\[1\]", lambda s, w, o: ops.window_deconv2d(s, w, o, M, switches=SWITCHES, pool=(2, "", 1))),
    (ValueError, "gate is 'relu'", lambda s, w, o: ops.window_deconv2d(s, w, o, M, gate="relu")),
    (RuntimeError, "switches is None", lambda s, w, o: ops.window_deconv2d(s, w, o, M, pool=(2, 2, 1))),
    (RuntimeError, "pool is None", lambda s, w, o: ops.window_deconv2d(s, w, o, M, switches=SWITCHES)),
    (RuntimeError, "positive is None", lambda s, w, o: ops.window_deconv2d(s, w, o, M, gate="backprop")),
    (RuntimeError, "positive is given", lambda s, w, o: ops.window_deconv2d(s, w, o, M, positive=BITS.to(s.device))),
    (RuntimeError, "positive has shape", lambda s, w, o: _guided(s, w, o, BITS[:1])),
    (RuntimeError, "positive has dtype", lambda s, w, o: _guided(s, w, o, BITS.bool())),
    (RuntimeError, "positive is on", lambda s, w, o: _guided(s, w, o, BITS.to("meta"))),
    (RuntimeError, "switches has shape", lambda s, w, o: _pooled(s, w, o, SWITCHES[:1])),
    (RuntimeError, "switches has dtype", lambda s, w, o: _pooled(s, w, o, SWITCHES.long())),
    (RuntimeError, "switches is on", lambda s, w, o: _pooled(s, w, o, SWITCHES.to("meta"))),
    (RuntimeError, "kernel_size", lambda s, w, o: _pooled(s, w, o, SWITCHES, (16, 1, 1))),
    (RuntimeError, "pool is", lambda s, w, o: _pooled(s, w, o, SWITCHES, (2, 0, 1))),
    (RuntimeError, "origins has dtype", lambda s, w, o: ops.window_deconv2d(s, w, o.int(), M)),
    (RuntimeError, "origins has shape", lambda s, w, o: ops.window_deconv2d(s, w, o[:1], M)),
    (RuntimeError, "origins is on meta", lambda s, w, o: ops.window_deconv2d(s, w, o.to("meta"), M)),
    (RuntimeError, r"signal has shape .*\(windows, ", lambda s, w, o: ops.window_deconv2d(s[0], w, o, M)),
    (RuntimeError, "signal has shape", lambda s, w, o: ops.window_deconv2d(s[..., :0], w, o, M)),
    (RuntimeError, "signal has dtype", lambda s, w, o: ops.window_deconv2d(s.int(), w, o, M)),
    (RuntimeError, "weight has dtype", lambda s, w, o: ops.window_deconv2d(s, w.double(), o, M)),
    (RuntimeError, "weight has shape", lambda s, w, o: ops.window_deconv2d(s, w[:3], o, M)),
    (RuntimeError, "weight has shape", lambda s, w, o: ops.window_deconv2d(s, w, o, M, groups=3)),
    (RuntimeError, "weight is on meta", lambda s, w, o: ops.window_deconv2d(s, w.to("meta"), o, M)),
    (RuntimeError, "stride is", lambda s, w, o: ops.window_deconv2d(s, w, o, M, 0)),
    (RuntimeError, "dilation is", lambda s, w, o: ops.window_deconv2d(s, w, o, M, dilation=0)),
    (RuntimeError, "map_size is", lambda s, w, o: ops.window_deconv2d(s, w, o, (0, 9))),
]


def _guided(signal, weight, origins, positive):
    positive = positive if positive.is_meta else positive.to(signal.device)
    return ops.window_deconv2d(signal, weight, origins, M, gate="guided", positive=positive)


def _pooled(signal, weight, origins, switches, pool=(2, 2, 1)):
    switches = switches if switches.is_meta else switches.to(signal.device)
    return ops.window_deconv2d(signal, weight, origins, M, switches=switches, pool=pool)


@pytest.mark.parametrize(("error", "message", "call"), REFUSED)
def test_refuses(backend, error, message, call):
    with pytest.raises(error, match=message):
        call(*(t.to(backend.device) for t in (SIGNAL, WEIGHT, ORIGINS)))


@pytest.mark.parametrize("index", [1, 3, 4, 5, 9])
def test_the_same_bits_with_any_number_of_threads(backend, threads, index):
    sample = sample_inputs()[index]
    runs = []
    for count in (1, 2, 2):
        threads(count)
        runs.append(sample.on(backend.device, torch.float32).call(ops.window_deconv2d))
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


def test_a_window_does_not_depend_on_the_others(backend):
    """The same bits alone and in company, so that a projection does not depend on how jobs are batched."""
    for index in (1, 3, 4, 5):
        placed = sample_inputs()[index].on(backend.device, torch.float32)
        together = placed.call(ops.window_deconv2d)
        for i in range(len(together)):
            tensors = [t if n == 1 else t[i : i + 1] for n, t in enumerate(placed.tensors)]
            options = {n: v[i : i + 1] if isinstance(v, torch.Tensor) else v for n, v in placed.options.items()}
            alone = Sample(tensors, options, False).call(ops.window_deconv2d)
            assert torch.equal(alone[0], together[i])
