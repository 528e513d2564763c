"""Weight gradients of channels_last on CUDA's tensor cores: values by a model of each numeric mode, what chooses it."""

from __future__ import annotations

import pytest
import test_precision
import torch
import torch.nn.functional as F
from oracles import assert_within, normal, whole_numbers
from test_precision import CUDA, HALVES, IN_EACH_MODE, MODES, placed, truncated
from torch import Tensor

import zfcuda
from zfcuda import reference
from zfcuda.ops._conv import Filters, conv2d_weight_gradient, filters_of
from zfcuda.ops._pool import window_of
from zfcuda.ops.unpool_relu_deconv2d import unpooled_weight_gradient

GATES = ("none", "deconvnet", "backprop", "guided")


mode = test_precision.mode


def gradient(image: Tensor, signal: Tensor, kernel: tuple[int, int], options: dict) -> Tensor:
    """Torch's, of F.conv2d."""
    size = (signal.size(1), image.size(1) // options.get("groups", 1), *kernel)
    weight = torch.zeros(size, dtype=image.dtype, requires_grad=True)
    return torch.autograd.grad(F.conv2d(image, weight, **options), weight, signal)[0]


def nudged(signal: Tensor) -> Tensor:
    """As tf32 takes a signal: a unit of the twelfth bit, and some, is added before it is truncated."""
    return truncated(signal.float() * (1 + 1.442695 / 4096))


def check_model(actual, image, signal, kernel, options, mode) -> None:
    """At most twice the error that torch makes in this dtype, of the factors that the mode multiplies."""
    image, signal = (t.to(HALVES.get(mode, torch.float32)) for t in (image, signal))
    if mode == "tf32" and signal.size(1) // options.get("groups", 1) % 4 == 0:
        image, signal = truncated(image), nudged(signal)
    torchs = gradient(image, signal, kernel, options)
    exact = gradient(image.double(), signal.double(), kernel, options)
    assert actual.dtype == torchs.dtype
    assert_within(actual, torchs, exact, signal[:, 0].numel())


def maps_size(size, kernel, options) -> tuple[int, ...]:
    weight = torch.empty(1, size[1], *kernel, device="meta")
    return F.conv2d(torch.empty(size, device="meta"), weight, **{**options, "groups": 1}).shape[2:]


def filters(options: dict) -> Filters:
    """The convolution's arguments, as the operators take them."""
    return filters_of(**{"stride": 1, "padding": 0, "dilation": 1, "groups": 1} | options)


#: image, maps, kernel, the rest: sums off every chunk, several splits of them; results off both tiles; channels that
#: are filled up, alone and in groups; stride, padding, dilation, padding alone; signals that they do not serve; images
#: folded by one axis, by the other, by both, with kernels that no stride divides, and by none for the dilation.
CASES = [
    ((2, 8, 9, 8), 16, (3, 3), {"stride": 2, "padding": 1}),
    ((2, 8, 12, 11), 24, (2, 3), {"padding": (0, 1)}),
    ((1, 16, 7, 6), 32, (3, 2), {"padding": (2, 0), "dilation": (2, 3), "groups": 2}),
    ((2, 3, 15, 17), 96, (7, 7), {"stride": 2, "padding": 1}),
    ((1, 72, 4, 6), 128, (3, 3), {"padding": 1}),
    ((1, 10, 6, 5), 16, (3, 3), {"groups": 2}),
    ((2, 24, 4, 5), 40, (1, 1), {"stride": (1, 2)}),
    ((2, 4, 2, 3), 8, (3, 3), {"padding": 4, "stride": 5}),
    ((2, 8, 5, 6), 4, (3, 3), {"padding": 1}),
    ((1, 8, 5, 6), 17, (2, 2), {}),
    ((2, 3, 27, 31), 64, (11, 11), {"stride": 4, "padding": 2}),
    ((1, 2, 14, 23), 16, (5, 4), {"stride": (2, 3), "padding": (3, 1)}),
    ((2, 2, 9, 12), 8, (2, 5), {"stride": (1, 4), "padding": (1, 0)}),
    ((1, 3, 12, 9), 16, (6, 2), {"stride": (3, 1), "padding": (4, 1)}),
    ((1, 3, 9, 12), 16, (3, 3), {"stride": 2, "dilation": (1, 2), "padding": 1}),
    ((1, 3, 9, 12), 16, (3, 3), {"stride": 2, "dilation": 2}),
]
IDS = [f"{size[1]} {maps} {kernel} {options}" for size, maps, kernel, options in CASES]


@CUDA
@IN_EACH_MODE
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("size", "maps", "kernel", "options"), CASES, ids=IDS)
def test_of_a_signal(backend, mode, gate, size, maps, kernel, options):
    image = normal(*size)
    signal = normal(size[0], maps, *maps_size(size, kernel, options), seed=1)
    forward = normal(*signal.shape, seed=2).relu()
    weight = torch.empty(maps, size[1] // options.get("groups", 1), *kernel)
    tensors = placed(mode, backend.device, image, signal, forward, weight)
    if gate in ("none", "deconvnet"):
        tensors[2] = None
    actual, bias = conv2d_weight_gradient(*tensors, filters(options), gate, True)
    if gate in ("deconvnet", "guided"):
        signal = signal.relu()
    if gate in ("backprop", "guided"):
        signal = signal * (forward > 0)
    check_model(actual, image, signal, kernel, options, mode)
    rounded = signal.to(tensors[1].dtype)
    assert_within(bias, rounded.sum((0, 2, 3)), rounded.double().sum((0, 2, 3)), signal[:, 0].numel())


@CUDA
@IN_EACH_MODE
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("overlap", ["sum", "overwrite"])
@pytest.mark.parametrize(
    ("channels", "maps", "options"),
    [
        (3, 16, {"stride": 2, "padding": 1}),
        (8, 32, {"padding": 1, "groups": 2}),
        (72, 128, {"padding": 1}),
        (8, 6, {"dilation": 2, "padding": 1}),
    ],
    ids=str,
)
def test_of_an_unpooled_signal(backend, mode, gate, overlap, channels, maps, options):
    size = (2, channels, 13, 10) if channels == 3 else (2, channels, 7, 6)
    height, width = maps_size(size, (3, 3), options)
    pool = {"kernel_size": 3, "stride": 2}
    above, switches = reference.max_pool2d(normal(2, maps, height, width), **pool, ceil_mode=True)
    image, signal = normal(*size, seed=1), normal(*above.shape, seed=3)
    weight = torch.empty(maps, channels // options.get("groups", 1), 3, 3)
    tensors = placed(mode, backend.device, image, signal, above, weight)
    masked = signal.to(tensors[0].dtype).float()
    if gate in ("backprop", "guided"):
        masked = masked * (above > 0)
    else:
        tensors[2] = None
    where = switches.to(backend.device, memory_format=torch.channels_last)
    image_on, signal_on, forward, weight_on = tensors
    slides = filters(options), window_of(3, 2, 0, 1), [height, width], overlap == "overwrite", gate
    actual = unpooled_weight_gradient(image_on, signal_on, where, forward, weight_on, *slides)
    unpooled = reference.max_unpool2d(masked, switches, **pool, output_size=(height, width), overlap=overlap)
    if gate in ("deconvnet", "guided"):
        unpooled = unpooled.relu()
    check_model(actual, image, unpooled, (3, 3), options, mode)


@CUDA
@pytest.mark.parametrize("mode", MODES, indirect=True)
def test_whole_numbers_are_exact(backend, mode):
    """What eleven bits hold is multiplied as it is."""
    image, signal = whole_numbers(2, 8, 9, 8, top=1023), whole_numbers(2, 16, 9, 8, seed=1, top=3)
    weight = torch.empty(16, 8, 3, 3)
    for left, right in ((image, signal), (signal[:, :8], image.repeat(1, 2, 1, 1))):
        tensors = placed(mode, backend.device, left, right)
        actual, _ = conv2d_weight_gradient(
            *tensors, None, weight.to(backend.device), filters({"padding": 1}), "none", False
        )
        assert torch.equal(actual.cpu().double(), gradient(left, right, (3, 3), {"padding": 1}))


@CUDA
@pytest.mark.parametrize("mode", ["tf32"], indirect=True)
def test_tf32_rounds_the_signal_without_a_bias(backend, mode):
    """The image is exact, so what is lost of sums of positive numbers is the signal's: 2^-11.5 of them if truncated."""
    image = torch.ones(1, 4, 40, 40)
    signal = torch.exp(4 * normal(1, 64, 40, 40))  # of every size
    weight = torch.empty(64, 4, 1, 1)
    tensors = placed(mode, backend.device, image, signal)
    actual, _ = conv2d_weight_gradient(*tensors, None, weight.to(backend.device), filters({}), "none", False)
    terms = signal.float().double()
    error = nudged(terms).double() / terms - 1
    assert error.abs().max() < 0.73 * 2**-10
    assert error.mean().abs() < 2**-15 < 2**-12 < (1 - truncated(terms).double() / terms).mean()
    exact = terms.sum((0, 2, 3))
    assert ((actual[:, 0, 0, 0].cpu().double() - exact).abs() < 0.73 * 2**-10 * exact).all()


@CUDA
def test_ieee_is_more_exact_than_3xtf32_and_that_than_tf32(backend):
    """The modes differ, so each was chosen; what they promise holds."""
    image, signal = normal(2, 8, 12, 12), normal(2, 16, 12, 12, seed=1)
    left, right = (t.float().double() for t in (image, signal))
    exact = gradient(left, right, (3, 3), {"padding": 1})
    size = gradient(left.abs(), right.abs(), (3, 3), {"padding": 1})
    error = {}
    for name in ("ieee", *MODES):
        with zfcuda.set_fp32_precision(name):
            tensors = placed(name, backend.device, image, signal)
            weight = torch.empty(16, 8, 3, 3, device=backend.device)
            actual, _ = conv2d_weight_gradient(*tensors, None, weight, filters({"padding": 1}), "none", False)
        error[name] = ((actual.cpu().double() - exact).abs() / size).max()
    assert error["ieee"] < 2**-21 and error["3xtf32"] < 2**-19 and 2**-14 < error["tf32"] < 2**-9


@CUDA
@IN_EACH_MODE
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("where", ["image", "signal"])
def test_what_is_not_finite(backend, mode, value, where):
    """It reaches the results that it reaches by torch, and no other; 3xtf32 makes NaN of infinities."""
    image, signal = normal(1, 8, 6, 6), normal(1, 16, 6, 6, seed=1)
    (image if where == "image" else signal)[0, 2, 3, 1] = float(value)
    weight = torch.empty(16, 8, 3, 3)
    left, right, weight = placed(mode, backend.device, image, signal, weight)
    actual, _ = conv2d_weight_gradient(left, right, None, weight, filters({"padding": 1}), "deconvnet", False)
    signal = torch.where(signal < 0, 0, signal)
    expected = gradient(image, signal, (3, 3), {"padding": 1})
    if mode == "3xtf32":
        expected[~expected.isfinite()] = float("nan")
    rtol = 2**-6  # two roundings to eight bits, and some
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=rtol, atol=rtol * 20, equal_nan=True)


@CUDA
@IN_EACH_MODE
@pytest.mark.parametrize("which", ["image", "signal"])
def test_misaligned_memory(backend, mode, which):
    """What 16-byte copies cannot read is multiplied by FMA."""
    dtype = HALVES.get(mode, torch.float32)

    def shifted(values: Tensor) -> Tensor:
        memory = torch.empty(values.numel() + 1, device=backend.device, dtype=dtype)
        size = [values.size(i) for i in (0, 2, 3, 1)]
        return memory[1:].view(size).movedim(3, 1).copy_(values)

    image, signal = normal(1, 8, 5, 5), normal(1, 16, 5, 5, seed=1)
    tensors = placed(mode, backend.device, image, signal)
    tensors[which == "signal"] = shifted((image, signal)[which == "signal"])
    weight = torch.empty(16, 8, 3, 3, device=backend.device, dtype=dtype)
    actual, _ = conv2d_weight_gradient(*tensors, None, weight, filters({"padding": 1}), "none", False)
    check_model(actual, image, signal, (3, 3), {"padding": 1}, mode if mode in HALVES else "by FMA")


@pytest.mark.parametrize("backend", ["simt"], indirect=True)
@IN_EACH_MODE
def test_older_architectures_multiply_by_fma(backend, mode, emulator, monkeypatch):
    """Or by those tensor cores that sm_75 has; the emulator stops at an instruction that it has not."""
    image, signal = normal(1, 8, 5, 5), normal(1, 16, 5, 5, seed=1)
    monkeypatch.setattr(emulator, "arch", 75)
    left, right, weight = placed(mode, backend.device, image, signal, torch.empty(16, 8, 3, 3))
    actual, _ = conv2d_weight_gradient(left, right, None, weight, filters({"padding": 1}), "none", False)
    check_model(actual, image, signal, (3, 3), {"padding": 1}, mode if mode in HALVES else "by FMA")


@CUDA
@IN_EACH_MODE
def test_no_images(backend, mode):
    left, right, weight = placed(mode, backend.device, normal(0, 8, 5, 5), normal(0, 16, 5, 5), torch.ones(16, 8, 3, 3))
    actual, bias = conv2d_weight_gradient(left, right, None, weight, filters({"padding": 1}), "none", True)
    assert not actual.any() and not bias.any() and actual.shape == weight.shape


@CUDA
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("pooled", [False, True])
def test_several_splits_of_contiguous_images(backend, dtype, pooled):
    """By FMA: 300 pixels are more than a split has at least."""
    image = normal(3, 5, 10, 10).to(dtype)
    above, switches = reference.max_pool2d(normal(3, 6, 10, 10, seed=1).to(dtype), 2)
    signal = reference.max_unpool2d(above, switches, 2, output_size=(10, 10))
    left, weight = image.to(backend.device), torch.empty(6, 5, 3, 3, dtype=dtype, device=backend.device)
    slide = filters({"padding": 1})
    if pooled:
        given = above.to(backend.device), switches.to(backend.device), None, weight, slide
        actual = unpooled_weight_gradient(left, *given, window_of(2, 2, 0, 1), [10, 10], False, "none")
    else:
        actual, _ = conv2d_weight_gradient(left, signal.to(backend.device), None, weight, slide, "none", False)
    torchs = gradient(image, signal, (3, 3), {"padding": 1})
    exact = gradient(image.double(), signal.double(), (3, 3), {"padding": 1})
    assert_within(actual, torchs, exact, 300)


@pytest.mark.parametrize("backend", ["simt"], indirect=True)
@pytest.mark.parametrize("mode", ["ieee", "tf32"], indirect=True)
@pytest.mark.parametrize("processors", [1, 3, 1000])
def test_other_gpus(backend, emulator, monkeypatch, mode, processors):
    """They have other splits, but whole numbers have the same sums."""
    image, signal = whole_numbers(2, 8, 13, 12), whole_numbers(2, 16, 13, 12, seed=1)
    given = placed(mode, backend.device, image, signal, torch.empty(16, 8, 3, 3))
    monkeypatch.setattr(emulator, "processors", processors)
    actual, bias = conv2d_weight_gradient(given[0], given[1], None, given[2], filters({"padding": 1}), "none", True)
    assert torch.equal(actual.double(), gradient(image, signal, (3, 3), {"padding": 1}))
    assert torch.equal(bias.double(), signal.sum((0, 2, 3)))
