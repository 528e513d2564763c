"""ZFNet's own layers at full size, on every backend: values and gradients against float64.

The other tests take small shapes at the edges; these take the many tiles, blocks and chunks of the real ones. The
emulator runs them without its checks.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from oracles import Sample, check_exact, check_values, normal, whole_numbers

from zfcuda import ops, reference
from zfcuda.bench.shapes import CONVOLUTIONS, NORMS, POOLS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.parametrize(
        "backend", ["cpu", "simt_fast", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
    ),
]
LAYOUTS = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


def layers(of):
    return pytest.mark.parametrize("layer", of, ids=lambda layer: layer.name)


def conv2d_relu(input, weight, bias, stride, padding):
    return F.conv2d(input, weight, bias, stride, padding).relu()


def deconv2d(signal, weight, **options):
    return F.conv_transpose2d(signal.relu(), weight, **options)


@layers(CONVOLUTIONS)
def test_convolution(backend, layer):
    """On whole numbers: rounded sums near 0 would pass or block the gradient by chance."""
    image = whole_numbers(1, layer.channels, layer.size, layer.size)
    weight = whole_numbers(layer.maps, layer.channels, layer.kernel, layer.kernel, seed=1)
    options = {"stride": layer.stride, "padding": layer.padding}
    sample = Sample([image, weight, whole_numbers(layer.maps, seed=2)], options)
    check_exact(ops.conv2d_relu, conv2d_relu, sample, backend)


@LAYOUTS
@layers(CONVOLUTIONS)
def test_deconvolution(backend, layer, layout):
    signal = normal(1, layer.maps, layer.out_size, layer.out_size)
    weight = normal(layer.maps, layer.channels, layer.kernel, layer.kernel, seed=1)
    options = {"stride": layer.stride, "padding": layer.padding, "output_padding": layer.output_padding}
    sample = Sample([signal, weight], options)
    check_values(ops.deconv2d, deconv2d, deconv2d, sample, backend.device, torch.float32, layout)


@LAYOUTS
@layers(POOLS)
def test_pool_and_unpool(backend, layer, layout):
    """Up and down again: the sum over the windows that chose a position, times its value."""

    def there_and_back(pool, unpool):
        def function(image):
            pooled, where = pool(image)
            return unpool(pooled, where, image.shape)

        return function

    def scatter(pooled, indices, size):
        return pooled.new_zeros(size).flatten(2).scatter_add(2, indices.flatten(2), pooled.flatten(2)).view(size)

    ours = there_and_back(
        lambda image: ops.max_pool2d(image, 3, 2, ceil_mode=True),
        lambda pooled, switches, size: ops.max_unpool2d(pooled, switches, 3, 2, output_size=size),
    )
    torchs = there_and_back(
        lambda image: F.max_pool2d(image, 3, 2, ceil_mode=True, return_indices=True),
        scatter,
    )
    sample = Sample([normal(2, layer.channels, layer.size, layer.size)])
    check_values(ours, torchs, torchs, sample, backend.device, torch.float32, layout)


FUSED = {"pool_kernel_size": 3, "pool_stride": 2}
POOLED = [layer for layer in CONVOLUTIONS if layer.name in ("conv1", "conv2", "conv5")]


def conv2d_relu_max_pool2d(image, weight, bias, stride, padding):
    maps = conv2d_relu(image, weight, bias, stride, padding)
    output, indices = F.max_pool2d(maps, 3, 2, ceil_mode=True, return_indices=True)
    return output, ops.indices_to_switches(indices, maps.shape, 3, 2)


@pytest.mark.parametrize(("arch", "processors"), [(86, 132), (90, 10)], ids=["streamed weights", "weights that stay"])
@layers(POOLED)
def test_layer_with_its_pool(backend, fast_emulator, monkeypatch, layer, arch, processors):
    """On -1, 0 and 1, whose many ties the switches must settle alike: sums below 256, exact in bfloat16 too."""
    if arch == 90 and backend.name != "simt":
        pytest.skip("it is the GPU that it is")
    monkeypatch.setattr(fast_emulator, "arch", arch)
    monkeypatch.setattr(fast_emulator, "processors", processors)
    image = whole_numbers(1, layer.channels, layer.size, layer.size, top=1)
    weight = whole_numbers(layer.maps, layer.channels, layer.kernel, layer.kernel, seed=1, top=1)
    options = {"stride": layer.stride, "padding": layer.padding}
    sample = Sample([image, weight, whole_numbers(layer.maps, seed=2)], options)
    fused = partial(ops.conv2d_relu_max_pool2d, pool_ceil_mode=True, **FUSED)
    check_exact(fused, conv2d_relu_max_pool2d, sample, backend)


@LAYOUTS
@layers(POOLED[:2])
def test_layer_with_its_pool_and_normalisation(backend, layer, layout):
    """By the paper's constants: of exact sums, so that only the normalisation rounds."""
    image = whole_numbers(1, layer.channels, layer.size, layer.size, top=1)
    weight = whole_numbers(layer.maps, layer.channels, layer.kernel, layer.kernel, seed=1, top=1)
    slide = {"stride": layer.stride, "padding": layer.padding}
    sample = Sample([image, weight, whole_numbers(layer.maps, seed=2)], slide, differentiable=False)
    norm = {"norm_size": 5, "norm_alpha": 5e-4, "norm_beta": 0.75, "norm_k": 2.0}
    fused = partial(ops.conv2d_relu_max_pool2d_norm, pool_ceil_mode=True, **FUSED, **norm)
    output, switches = sample.on(backend.device, torch.float32, layout).call(fused)
    pooled, expected = sample.call(conv2d_relu_max_pool2d)
    assert torch.equal(switches.cpu(), expected)
    exact = F.local_response_norm(pooled, 5, 5e-4, 0.75, 2.0)
    torch.testing.assert_close(output.cpu().double(), exact, rtol=2e-6, atol=0)


@LAYOUTS
@layers(POOLED)
def test_switches_of_rounded_sums(backend, layer, layout):
    """Each points to a value that is the window's maximum, but for the rounding of two sums."""
    image = normal(1, layer.channels, layer.size, layer.size)
    weight = normal(layer.maps, layer.channels, layer.kernel, layer.kernel, seed=1)
    sample = Sample([image, weight], {"stride": layer.stride, "padding": layer.padding}, differentiable=False)
    exact, rounded = (
        F.conv2d(*(t.to(d) for t in sample.tensors), **sample.options) for d in (torch.float64, torch.float32)
    )
    floor = 2 * torch.finfo(torch.float32).eps * weight[0].numel() ** 0.5 * exact.abs().max()  # as in assert_within
    error = 2 * float((rounded - exact).abs().max()) + float(floor)
    placed = sample.on(backend.device, torch.float32, layout)
    output, switches = placed.call(partial(ops.conv2d_relu_max_pool2d, pool_ceil_mode=True, **FUSED))
    largest, _ = F.max_pool2d(exact.relu(), 3, 2, ceil_mode=True, return_indices=True)
    chosen = reference.switch_gather(exact.relu(), switches.cpu(), 3, 2)
    assert float((largest - chosen).max()) <= 2 * error
    assert float((output.cpu() - largest).abs().max()) <= error


@LAYOUTS
@layers(POOLED)
def test_step_down_from_its_pool(backend, layer, layout):
    maps = normal(1, layer.maps, layer.out_size, layer.out_size).relu()
    _, switches = reference.max_pool2d(maps, 3, 2, ceil_mode=True)
    weight = normal(layer.maps, layer.channels, layer.kernel, layer.kernel, seed=1)
    options = {"stride": layer.stride, "padding": layer.padding, "output_padding": layer.output_padding}

    def torchs(signal, switches, weight, **slide):
        indices = reference.switches_to_indices(switches, maps.shape[2:], 3, 2).flatten(2)
        unpooled = torch.zeros(maps.shape, dtype=signal.dtype).flatten(2).scatter_add(2, indices, signal.flatten(2))
        return F.conv_transpose2d(unpooled.view(maps.shape).relu(), weight, **slide)

    step = partial(ops.unpool_relu_deconv2d, pool_output_size=maps.shape[2:], **FUSED)
    sample = Sample([normal(*switches.shape, seed=2), switches, weight], options)
    check_values(step, torchs, torchs, sample, backend.device, torch.float32, layout)


@LAYOUTS
@layers(NORMS)
def test_normalisation(backend, layer, layout):
    sample = Sample(
        [10 * normal(2, layer.channels, layer.size, layer.size)], {"size": 5, "alpha": 5e-4, "beta": 0.75, "k": 2.0}
    )
    functions = ops.local_response_norm, reference.local_response_norm, F.local_response_norm
    check_values(*functions, sample, backend.device, torch.float32, layout)
