"""NCHW on CUDA: what takes less time in NHWC runs there on copies, and so has the same bits in both layouts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import test_precision as precision
import torch
import torch.nn.functional as F
from oracles import normal
from torch import Tensor

import zfcuda
from zfcuda import core, ops, reference

pytestmark = pytest.mark.parametrize("backend", ["simt"], indirect=True)
mode = precision.mode
IN_EACH_MODE = precision.IN_EACH_MODE
POOL = {"pool_kernel_size": 3, "pool_stride": 2, "pool_padding": 1}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.fixture(autouse=True)
def one_multiprocessor(emulator, monkeypatch):
    """Of such a GPU even these sizes are worth copies, and no sum is split."""
    monkeypatch.setattr(emulator, "processors", 1)


@pytest.fixture
def agree(backend, monkeypatch, mode) -> Callable[..., set[str]]:
    """The functions that copied: they have a larger workspace for NCHW. ``call`` returns tensors, given tensors."""
    rooms: dict[str, int] = {}
    room = core.room

    def spy(function, like, *arguments):
        tensor = room(function, like, *arguments)
        rooms[function] = tensor.numel()
        return tensor

    monkeypatch.setattr(core, "room", spy)

    def run(call: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> set[str]:
        found, sizes = [], []
        for layout in LAYOUTS.values():
            rooms.clear()
            placed = [t.to(memory_format=layout) if t.dim() == 4 else t for t in tensors]
            placed = [t.to(precision.HALVES.get(mode, torch.float32)) if t.is_floating_point() else t for t in placed]
            found.append(call(*placed))
            sizes.append(dict(rooms))
        for contiguous, channels_last in zip(*found, strict=True):
            assert torch.equal(contiguous, channels_last)
        return {function for function, size in sizes[0].items() if size > sizes[1][function]}

    return run


def derived(call):
    """The same with the gradients of its floating-point arguments."""

    def with_gradients(*tensors):
        leaves = [t.requires_grad_() for t in tensors if t.is_floating_point()]
        outputs = call(*tensors)
        upward = normal(*outputs[0].shape, seed=9).to(outputs[0])
        return *outputs, *torch.autograd.grad(outputs[0], leaves, upward)

    return with_gradients


@IN_EACH_MODE
@pytest.mark.parametrize(
    ("size", "filters", "options"),
    [
        ((2, 16, 14, 13), (40, 16, 3, 3), {"padding": 1}),
        ((41, 16, 10, 10), (64, 16, 3, 3), {"padding": 1}),  # in two parts, of 21 and 20 images
        ((2, 3, 35, 34), (96, 3, 7, 7), {"stride": 2, "padding": 1}),
        ((2, 32, 14, 13), (64, 16, 3, 3), {"groups": 2}),
    ],
    ids=str,
)
def test_convolution(agree, size, filters, options):
    copied = agree(derived(lambda x, w, b: (ops.conv2d_relu(x, w, b, **options),)), *_tensors(size, filters))
    assert copied >= {"conv2d_workspace", "conv2d_weight_gradient_workspace"}


def _tensors(size, filters):
    return normal(*size), normal(*filters, seed=1), normal(filters[0], seed=2)


@IN_EACH_MODE
def test_one_channel(backend, mode):
    """It lies in memory as either; torch calls it contiguous."""
    image, weight, bias = _tensors((2, 1, 35, 34), (20, 1, 7, 7))
    dtype = precision.HALVES.get(mode, torch.float32)
    actual = ops.conv2d_relu(image.to(dtype), weight.to(dtype), bias.to(dtype))
    assert actual.is_contiguous()

    def torchs(x, w):
        return F.conv2d(x, w, bias.to(x)).relu()

    precision.check_model(actual, torchs, image, weight, mode, merged=True)


@IN_EACH_MODE
@pytest.mark.parametrize(
    ("size", "filters", "stride"), [((2, 16, 14, 13), (40, 16, 3, 3), 1), ((2, 3, 35, 34), (96, 3, 7, 7), 2)], ids=str
)
def test_fused_pools(agree, size, filters, stride):
    tensors = _tensors(size, filters)
    copied = agree(derived(lambda x, w, b: ops.conv2d_relu_max_pool2d(x, w, b, stride, **POOL)), *tensors)
    assert copied >= {"conv2d_relu_max_pool2d_workspace", "unpool_relu_weight_gradient_workspace"}
    copied = agree(lambda x, w, b: ops.conv2d_relu_max_pool2d_maximum(x, w, b, stride, **POOL), *tensors)
    assert copied == {"conv2d_relu_max_pool2d_workspace"}

    def normalised(x, w, b):
        return ops.conv2d_relu_max_pool2d_norm(x, w, b, stride, **POOL, norm_size=5, norm_alpha=0.1)

    assert agree(normalised, *tensors) == {"conv2d_relu_max_pool2d_norm_workspace"}
    assert agree(derived(normalised), *tensors) >= {"conv2d_relu_max_pool2d_norm_workspace"}


@pytest.mark.parametrize("mode", ["float16"], indirect=True)
def test_parts_of_a_batch(agree):
    """Two of 21 and 20 images, or of 6 and 5, with the maxima of each."""
    tensors = _tensors((41, 16, 10, 10), (64, 16, 3, 3))
    options = {"padding": 1, "pool_kernel_size": 2}
    assert agree(lambda *t: ops.conv2d_relu_max_pool2d_maximum(*t, **options), *tensors)
    assert agree(lambda *t: ops.conv2d_relu_max_pool2d_norm(*t, **options, norm_size=5), *tensors)
    above, switches = reference.max_pool2d(normal(11, 64, 20, 20), 2)

    def unpooled(x, w, s):
        return (ops.unpool_relu_deconv2d(x, s, w, padding=1, pool_kernel_size=2),)

    assert agree(unpooled, above, normal(64, 24, 3, 3, seed=1), switches) == {"unpool_relu_deconv2d_workspace"}


@IN_EACH_MODE
@pytest.mark.parametrize("gate", ["none", "deconvnet", "backprop", "guided"])
def test_down(agree, gate):
    signal, weight = normal(2, 48, 13, 12), normal(48, 24, 3, 3, seed=1)
    forward = normal(*signal.shape, seed=3).relu()
    masked = gate in ("backprop", "guided")

    def down(x, w, f):
        return (ops.deconv2d(x, w, stride=2, gate=gate, forward=f if masked else None),)

    assert agree(down, signal, weight, forward) == {"deconv2d_workspace"}
    above, switches = reference.max_pool2d(signal, 3, 2)
    blocks = normal(*above.shape, seed=4).relu()

    def unpooled(x, w, f, s):
        options = {"pool_kernel_size": 3, "pool_stride": 2, "pool_output_size": signal.shape[2:]}
        return (ops.unpool_relu_deconv2d(x, s, w, stride=2, **options, gate=gate, forward=f if masked else None),)

    assert agree(unpooled, above, weight, blocks, switches) == {"unpool_relu_deconv2d_workspace"}


@pytest.mark.parametrize("mode", ["ieee"], indirect=True)
def test_larger_tiles_are_worth_copies_too(agree):
    """By FMA NHWC has a tile of 128 x 128, and images of few channels have theirs."""
    for size, filters in [((2, 64, 14, 13), (128, 64, 3, 3)), ((2, 3, 35, 34), (96, 3, 7, 7))]:
        assert agree(lambda *t: (ops.conv2d_relu(*t),), *_tensors(size, filters)) == {"conv2d_workspace"}


def test_copies_that_cost_more_than_they_bring(backend):
    """A product of few terms stays in NCHW, and there by FMA, whatever the mode."""
    tensors = _tensors((2, 8, 14, 13), (40, 8, 1, 1))
    with zfcuda.set_fp32_precision("tf32"):
        contiguous = ops.conv2d_relu(*tensors)
    assert torch.equal(contiguous, ops.conv2d_relu(*tensors))
