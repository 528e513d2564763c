"""unpool_relu_deconv2d: bit-equal to the unfused chain where sums are exact; every gate, gradients, out=, refusals."""

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
    agree_or_both_refuse,
    channels_innermost,
    check_exact,
    check_out_convention,
    check_registration,
    check_values,
    for_all,
    normal,
    whole_numbers,
)
from test_max_unpool2d import torchs as torchs_unpool

from zfcuda import core, ops, reference

GATES = ("none", "deconvnet", "backprop", "guided")


@pytest.fixture(autouse=True)
def one_thread(threads):
    """torch's own unpooling is a race between threads where windows overlap."""
    threads(1)


def torchs(signal, switches, weight, bias=None, *arguments, gate="deconvnet", forward=None, overlap="sum", **options):
    """The chain by torch; the mask acts on the whole map, as the gates of deconv2d have it."""
    pool = {name.removeprefix("pool_"): options.pop(name) for name in list(options) if name.startswith("pool_")}
    maps = torchs_unpool(signal, switches, **pool, overlap=overlap)
    if forward is not None:
        # Zero or not where the map that was pooled is: its maximum lies where a window's switch points.
        mask = torchs_unpool(forward, switches, **pool)
        maps = maps.masked_fill(mask <= 0, 0)
    maps = maps.relu() if gate in ("deconvnet", "guided") else maps
    return F.conv_transpose2d(maps, weight, bias, *arguments, **options)


def stepped(numbers, image, maps, kernel, *, pool, gate="deconvnet", overlap="sum", bias=True, **options):
    """The sample of a step from the pool of a map (batch, maps, height, width) down to ``image`` channels."""
    window = {name: value for name, value in pool.items() if name != "ceil_mode"}
    above, switches = reference.max_pool2d(numbers(*maps, seed=7).relu(), **pool)
    groups = options.get("groups", 1)
    weight = numbers(maps[1], image // groups, *kernel, seed=1)
    tensors = [numbers(*switches.shape, seed=3), switches, weight, numbers(image, seed=2) if bias else None]
    options |= {"pool_" + name: value for name, value in window.items()}
    options |= {"pool_output_size": maps[2:], "gate": gate, "overlap": overlap}
    return Sample(tensors, options | ({"forward": above} if gate in ("backprop", "guided") else {}))


PAPER = {"kernel_size": 3, "stride": 2, "ceil_mode": True}


def sample_inputs(numbers=normal):
    uneven = {"kernel_size": (3, 2), "stride": (1, 2), "padding": (1, 0), "dilation": (2, 1)}
    one = {"kernel_size": 1}
    strided = {"stride": 2, "padding": 1, "output_padding": 1}
    return [
        *(stepped(numbers, 3, (2, 4, 6, 7), (3, 3), pool=PAPER, gate=gate, **strided) for gate in GATES),
        stepped(numbers, 3, (1, 4, 6, 7), (3, 3), pool=PAPER, overlap="overwrite", **strided),
        stepped(numbers, 20, (1, 4, 7, 6), (3, 2), pool=PAPER, gate="guided", overlap="overwrite", bias=False),
        stepped(numbers, 20, (1, 3, 6, 8), (3, 2), pool=uneven, dilation=(2, 3), padding=(2, 0)),
        stepped(numbers, 4, (1, 8, 6, 6), (3, 3), pool=PAPER, groups=2),
        stepped(numbers, 4, (2, 4, 5, 6), (3, 3), pool={"kernel_size": 2}, gate="backprop", groups=4, padding=1),
        stepped(numbers, 24, (1, 5, 33, 3), (4, 1), pool=PAPER, stride=(3, 1)),  # uneven phases
        stepped(numbers, 3, (1, 4, 40, 3), (5, 3), pool=PAPER, stride=(2, 1)),  # bands of csrc/cpu/scatter.h
        stepped(numbers, 2, (1, 3, 4, 5), (1, 1), pool=one, gate="none", stride=3),  # pixels that nothing reaches
        stepped(numbers, 2, (1, 2, 17, 18), (2, 2), pool={"kernel_size": 16, "stride": 1}),  # 256 positions
        stepped(numbers, 3, (0, 4, 6, 7), (3, 3), pool=PAPER, gate="guided", **strided),
    ]


def _name(sample):
    options = {name: value for name, value in sample.options.items() if name != "forward"}
    return f"{tuple(sample.tensors[2].shape)} {options}"


def samples(numbers=normal):
    return pytest.mark.parametrize("sample", sample_inputs(numbers), ids=_name)


FUNCTIONS = ops.unpool_relu_deconv2d, reference.unpool_relu_deconv2d, torchs


@DTYPES
@samples()
def test_values_and_gradients(backend, sample, dtype):
    check_values(*FUNCTIONS, sample, backend.device, dtype)


@samples(whole_numbers)
def test_exact(backend, sample):
    """Sums of whole numbers, full of collisions: the same bits as torch's chain."""
    check_exact(ops.unpool_relu_deconv2d, torchs, sample, backend)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, layout):
    check_values(*FUNCTIONS, sample_inputs()[3], backend.device, torch.float32, layout)


def test_memory_formats(backend):
    """The output follows the signal, the gradient of the weight has the weight's strides."""
    for layout in ("contiguous", "channels_last"):
        sample = sample_inputs()[3].on(backend.device, torch.float32, layout)
        sample.options["forward"] = sample.options["forward"].contiguous()
        sample.tensors[1] = sample.tensors[1].contiguous()
        output = sample.call(ops.unpool_relu_deconv2d)
        assert channels_innermost(output) == (layout == "channels_last")
        for gradient, leaf in zip(torch.autograd.grad(output, sample.leaves(), output), sample.leaves(), strict=True):
            assert gradient.stride() == leaf.stride()


@NATIVE
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("image", "kernel"), [(33, 5), (3, 7)])  # by phases; scattered
def test_the_same_bits_as_in_two_steps(backend, layout, image, kernel):
    """On the CPU the sums are deconv2d's, term by term, so that rounding makes no difference."""
    sample = stepped(normal, image, (2, 40, 30, 75), (kernel, kernel), pool=PAPER, stride=2, padding=1)
    signal, switches, weight, bias = sample.on(backend.device, torch.float32, layout).tensors
    fused = ops.unpool_relu_deconv2d(signal, switches, weight, bias, **sample.options)
    maps = ops.max_unpool2d(signal, switches, 3, 2, output_size=(30, 75))
    assert torch.equal(fused, ops.deconv2d(maps, weight, bias, 2, 1))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_the_gradients_asked_for(backend, gate, needed, monkeypatch):
    """… are computed: the core is called for no other."""
    sample = sample_inputs()[GATES.index(gate)].on(backend.device, torch.float64)
    call = lambda: sample.call(ops.unpool_relu_deconv2d).square().sum()  # noqa: E731
    everything = torch.autograd.grad(call(), sample.leaves())
    signal, _, weight, bias = sample.tensors
    for t, need in zip((signal, weight, bias), needed, strict=True):
        t.requires_grad_(need)
    called, run = [], core.run
    monkeypatch.setattr(core, "run", lambda function, *rest: (called.append(function), run(function, *rest)))
    (gradient,) = torch.autograd.grad(call(), sample.leaves())
    torch.testing.assert_close(gradient, everything[needed.index(True)])
    opened = ["max_unpool2d"] * (gate in ("deconvnet", "guided"))
    rest = [*[*opened, "conv2d", "switch_gather"] * needed[0], *["unpool_relu_weight_gradient"] * needed[1]]
    assert called == ["find_invalid_switch", "unpool_relu_deconv2d", *rest]


@NATIVE
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gate", GATES)
def test_the_weight_gradient_of_many_images(backend, layout, gate):
    """On the CPU a few images are unpooled at a time: the sum is that of all."""
    sample = stepped(normal, 7, (5, 48, 90, 92), (3, 3), pool=PAPER, padding=1, gate=gate, bias=False)

    def gradient(function, sample):
        weight = sample.tensors[2].requires_grad_()
        image = sample.call(function)
        return torch.autograd.grad(image, weight, normal(*image.shape, seed=9).to(image))[0]

    ours = gradient(ops.unpool_relu_deconv2d, sample.on(backend.device, torch.float32, layout))
    expected = gradient(torchs, sample.on(torch.device("cpu"), torch.float64))
    torch.testing.assert_close(ours.cpu().double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_backprop_is_the_gradient_of_the_way_up(backend):
    """One step of the fused layer and back: the step differs from the paper's in the gate only."""
    x, weight = (t.float().to(backend.device) for t in (whole_numbers(2, 3, 15, 14), whole_numbers(4, 3, 3, 3, seed=1)))
    pool = {"pool_kernel_size": 3, "pool_stride": 2}
    output, switches = ops.conv2d_relu_max_pool2d(x.requires_grad_(), weight, stride=2, padding=1, **pool)
    signal = whole_numbers(*output.shape, seed=3).to(output)
    (expected,) = torch.autograd.grad(output, x, signal)
    rest = {"output_padding": (0, 1), "pool_output_size": (8, 7), "gate": "backprop", "forward": output.detach()}
    actual = ops.unpool_relu_deconv2d(signal, switches, weight, None, 2, 1, **pool, **rest)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("gate", GATES)
def test_special_values(backend, gate):
    """NaN, infinities and -0 in signal and forward: which of them pass is torch's rule, gradients too."""
    values = torch.tensor([-1.0, -0.0, 0.0, 1.0, float("nan"), float("inf"), -float("inf")])
    signal, forward = (t.reshape(1, 1, 7, 7) for t in torch.meshgrid(values, values, indexing="ij"))
    options = {"gate": gate, "pool_kernel_size": 2, "forward": forward if gate in ("backprop", "guided") else None}
    tensors = [signal, torch.full((1, 1, 7, 7), 2, dtype=torch.uint8), torch.ones(1, 1, 1, 1)]
    sample = Sample(tensors, options)
    results = []
    for function, device in ((ops.unpool_relu_deconv2d, backend.device), (torchs, torch.device("cpu"))):
        placed = sample.on(device, torch.float32)
        output = placed.call(function)
        gradient = torch.autograd.grad(output.sum(), placed.tensors[0])[0]
        results.append([t.detach().cpu() for t in (output, gradient)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


CASES = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 2),
        "groups": st.integers(1, 2),
        "rows": st.integers(1, 4),
        "columns": st.integers(1, 4),
        "size": st.tuples(st.integers(1, 8), st.integers(1, 8)),
        "kernel": st.tuples(st.integers(1, 4), st.integers(1, 4)),
        "stride": st.tuples(st.integers(1, 3), st.sampled_from([1, 1, 1, 2, 3, 0])),
        "padding": st.tuples(st.integers(0, 2), st.sampled_from([0, 1, 2, 0, 1, -1])),
        "output_padding": st.tuples(st.integers(0, 1), st.sampled_from([0, 0, 0, 0, 1, -1])),
        "dilation": st.tuples(st.integers(1, 2), st.sampled_from([1, 1, 2, 0])),
        "pool": st.fixed_dictionaries(
            {
                "kernel_size": st.tuples(st.integers(1, 3), st.integers(1, 3)),
                "stride": st.tuples(st.integers(1, 3), st.integers(1, 3)),
                "padding": st.tuples(st.integers(0, 1), st.integers(0, 1)),
                "dilation": st.tuples(st.integers(1, 2), st.integers(1, 2)),
                "ceil_mode": st.booleans(),
            }
        ),
        "bias": st.booleans(),
        "gate": st.sampled_from(GATES),
        "overlap": st.sampled_from(["sum", "overwrite"]),
        "seed": st.integers(0, 99),
    }
)
NAMES = ("stride", "padding", "output_padding", "dilation", "groups", "weight")


def _pools(case):
    pool = case["pool"]
    sizes = zip(case["size"], pool["kernel_size"], pool["padding"], pool["dilation"], strict=True)
    return all(2 * p <= k and (k - 1) * d < n + p and n >= d for n, k, p, d in sizes)


def test_agrees_with_torch(backend):
    def check(c):
        maps = (c["batch"], c["groups"] * c["rows"], *c["size"])
        numbers = lambda *size, seed: whole_numbers(*size, seed=c["seed"] + seed)  # noqa: E731
        options = {name: c[name] for name in ("bias", "gate", "overlap", *NAMES[:-1])}
        sample = stepped(numbers, c["groups"] * c["columns"], maps, c["kernel"], pool=c["pool"], **options)
        agree_or_both_refuse(ops.unpool_relu_deconv2d, torchs, sample, backend, NAMES)

    for_all(backend, CASES.filter(_pools), check, examples=150)


S, SW, W, B = torch.ones(2, 4, 3, 3), torch.zeros(2, 4, 3, 3, dtype=torch.uint8), torch.ones(4, 3, 3, 3), torch.ones(3)
P = {"pool_kernel_size": 2}
step = ops.unpool_relu_deconv2d
REFUSED = [
    (TypeError, "signal", lambda s, i, w, b: step([], i, w, **P)),
    (TypeError, "switches", lambda s, i, w, b: step(s, None, w, **P)),
    (TypeError, "forward", lambda s, i, w, b: step(s, i, w, **P, forward=1)),
    (TypeError, "pool_kernel_size", lambda s, i, w, b: step(s, i, w)),
    (TypeError, "pool_padding", lambda s, i, w, b: step(s, i, w, **P, pool_padding=0.5)),
    (TypeError, "pool_output_size", lambda s, i, w, b: step(s, i, w, **P, pool_output_size=6)),
    (TypeError, "out", lambda s, i, w, b: step(s, i, w, **P, out=1)),
    (ValueError, "gate is 'relu'", lambda s, i, w, b: step(s, i, w, **P, gate="relu")),
    (ValueError, "overlap is 'max'", lambda s, i, w, b: step(s, i, w, **P, overlap="max")),
    (RuntimeError, "forward is None", lambda s, i, w, b: step(s, i, w, **P, gate="guided")),
    (RuntimeError, "forward is given", lambda s, i, w, b: step(s, i, w, **P, forward=s)),
    (RuntimeError, "forward has shape", lambda s, i, w, b: step(s, i, w, **P, gate="backprop", forward=s[:, :, :2])),
    (RuntimeError, "signal has shape", lambda s, i, w, b: step(s[0], i, w, **P)),
    (RuntimeError, "switches has dtype", lambda s, i, w, b: step(s, i.int(), w, **P)),
    (RuntimeError, "switches has shape", lambda s, i, w, b: step(s, i[:1], w, **P)),
    (RuntimeError, r"switches\[0, 0, 0, 0\] is 4", lambda s, i, w, b: step(s, i + 4, w, **P)),
    (RuntimeError, "weight has shape", lambda s, i, w, b: step(s, i, w[:3], **P)),
    (RuntimeError, "bias has shape", lambda s, i, w, b: step(s, i, w, b[:2], **P)),
    (RuntimeError, "groups is 3", lambda s, i, w, b: step(s, i, w, groups=3, **P)),
    (RuntimeError, "output_padding is", lambda s, i, w, b: step(s, i, w, stride=2, output_padding=2, **P)),
    (RuntimeError, "padding is", lambda s, i, w, b: step(s, i, w, padding=4, **P)),
    (RuntimeError, "pool_output_size is", lambda s, i, w, b: step(s, i, w, **P, pool_output_size=(9, 6))),
    (RuntimeError, "pool_padding is", lambda s, i, w, b: step(s, i, w, **P, pool_padding=2)),
    (RuntimeError, "pool_stride is", lambda s, i, w, b: step(s, i, w, **P, pool_stride=0)),
]


@pytest.mark.parametrize(("error", "message", "call"), REFUSED)
def test_refuses(backend, error, message, call):
    with pytest.raises(error, match=message):
        call(*(t.to(backend.device) for t in (S, SW, W, B)))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_out(backend, layout):
    check_out_convention(ops.unpool_relu_deconv2d, sample_inputs()[3].on(backend.device, torch.float32, layout))


@NATIVE
def test_out_is_registered(backend):
    sample = sample_inputs()[1].on(backend.device, torch.float32)
    sample.options["out"] = torch.empty_like(sample.call(ops.unpool_relu_deconv2d))
    with torch.no_grad():
        check_registration(ops.unpool_relu_deconv2d, Sample(sample.tensors, sample.options, differentiable=False))


@pytest.mark.parametrize("image", [3, 20])
def test_the_same_bits_with_any_number_of_threads(backend, threads, image):
    """One image is cut into bands, whose borders lie elsewhere with each number of threads."""
    sample = stepped(normal, image, (1, 7, 26, 21), (3, 3), pool=PAPER, gate="guided", stride=2)
    runs = []
    for count in (1, 2, 3):
        threads(count)
        placed = sample.on(backend.device, torch.float32)
        output = placed.call(ops.unpool_relu_deconv2d)
        runs.append([output, *torch.autograd.grad(output, placed.leaves(), torch.ones_like(output))])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))
