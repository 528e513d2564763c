"""The receptive-field-local path against the dense one in float64, which test_deconvnet.py checks by autograd."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, example, given, settings
from torch import nn

import zfcuda
from zfcuda import DeconvNet
from zfcuda.deconv import deconvnet as module
from zfcuda.deconv.windows import pack_bits, unpack_bits

GATES = ["deconvnet", "backprop", "guided"]


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    """The local path for small images, too, where it would not pay."""
    monkeypatch.setattr(module, "pays", lambda path: True)


def randomise(net, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        scale = (2 / p[0].numel()) ** 0.5 if p.dim() > 1 else 0.1
        p.data = torch.randn(p.shape, generator=generator) * scale
    return net.eval()


def narrow(size=96):
    return randomise(zfcuda.models.zfnet(10, widths=(6, 9, 10, 17, 6), fc_width=12, input_size=size))


def at_corners(size):
    """The corners, an edge and the middle of a map, row by row."""
    rows, columns = ([*dict.fromkeys((0, n // 2, n - 1))] for n in size)
    return torch.tensor([(y, x) for y in rows for x in columns])


def check(net, images, layer, units, positions, gate, atol=0.0):
    """Local in the net's dtype against dense in float64: at most twice the error of dense in the net's dtype.

    And a floor: sums round by the size of their terms, not by what is left of these where they cancel. The same
    projection with every number's absolute value says how large the terms are.
    """
    exact = DeconvNet(module_in_double(net))
    record = exact(images.double())
    small = DeconvNet(net)
    narrow_record = zfcuda.deconv.Record(
        images,
        {name: map_.to(images.dtype) for name, map_ in record.maps.items()},
        record.switches,
        record.logits.to(images.dtype),
    )
    asked = dict(position=positions, gate=gate)
    truth = exact.project(record, layer, units, dense=True, **asked)
    dense = small.project(narrow_record, layer, units, dense=True, **asked)
    local = small.project(narrow_record, layer, units, **asked)
    assert local.shape == dense.shape
    scale = truth.flatten(2).norm(dim=2)
    errors = [(values.double() - truth).flatten(2).norm(dim=2) for values in (local, dense)]
    absolute = module_in_double(net)
    for parameter in absolute.parameters():
        parameter.data.abs_()
    positive = {name: map_.abs() for name, map_ in record.maps.items()}
    everything = zfcuda.deconv.Record(images.double(), positive, record.switches, record.logits)
    terms = DeconvNet(absolute).project(everything, layer, units, dense=True, **asked).flatten(2).norm(dim=2)
    floor = 4 * torch.finfo(images.dtype).eps * terms + atol
    assert (errors[0] <= 2 * errors[1].amax() / scale.amax().clamp(min=1e-30) * scale + floor).all()


def module_in_double(net):
    import copy

    return copy.deepcopy(net).double()


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("layer", ["conv1", "pool1", "norm1", "conv2", "norm2", "conv3", "conv4", "conv5", "pool5"])
def test_every_layer_at_corners(layer, gate):
    net = narrow()
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    info = next(info for info in DeconvNet(net).layers if info.name == layer)
    positions = at_corners(info.size)
    units = torch.arange(len(positions)) % info.channels
    check(net, images, layer, units, positions.expand(2, -1, -1), gate)


@st.composite
def nets(draw):
    """A random chain and the size of its images."""
    pairs = lambda low, high: st.tuples(st.integers(low, high), st.integers(low, high))  # noqa: E731
    channels, layers = 3, []
    for _ in range(draw(st.integers(1, 4))):
        groups = draw(st.sampled_from([1, 1, channels]))
        kernel, dilation = draw(pairs(1, draw(st.sampled_from([3, 11])))), draw(pairs(1, 2))
        width = groups * draw(st.integers(1, 3))
        layers.append(
            nn.Conv2d(
                channels,
                width,
                kernel,
                draw(pairs(1, draw(st.sampled_from([1, 4])))),
                draw(pairs(0, 4)),
                dilation,
                groups,
            )
        )
        channels = width
        layers += [nn.ReLU()] * draw(st.booleans())
        if draw(st.booleans()):
            window = draw(pairs(1, 4))
            padding = tuple(draw(st.integers(0, k // 2)) for k in window)
            layers.append(
                nn.MaxPool2d(window, draw(pairs(1, 4)), padding, draw(pairs(1, 2)), ceil_mode=draw(st.booleans()))
            )
            layers += [nn.ReLU()] * draw(st.booleans())
        layers += [nn.LocalResponseNorm(3)] * draw(st.booleans())
    return nn.Sequential(*layers), draw(pairs(8, 40))


@settings(max_examples=60)
@given(nets(), st.sampled_from(GATES), st.integers(0, 2**32))
def test_random_nets(net_and_size, gate, seed):
    net, size = net_and_size
    randomise(net, seed)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(seed))
    try:
        net(images)
        DeconvNet(net)(images)
    except RuntimeError:
        assume(False)  # the image is too small for the net
    for info in DeconvNet(net, input_size=size).layers:
        positions = at_corners(info.size)
        units = torch.arange(len(positions)) % info.channels
        check(net, images, info.name, units, positions.expand(2, -1, -1), gate, atol=1e-30)


@pytest.mark.parametrize("layer", ["conv1", "conv3", "conv5"])
def test_no_images(layer):
    crops = DeconvNet(narrow()).project(torch.zeros(0, 3, 96, 96), layer, [0, 1], position=(1, 1), crop=True)
    assert crops.pixels.shape[:3] == (0, 2, 3) and crops.boxes.shape == (0, 2, 4)


def test_values_and_places_of_crops():
    net = narrow()
    deconvnet = DeconvNet(net)
    images = torch.randn(2, 3, 96, 96)
    record = deconvnet(images)
    units = [0, 3, 5]
    for layer in ("conv1", "conv3", "pool5"):
        info = next(info for info in deconvnet.layers if info.name == layer)
        whole = deconvnet.project(record, layer, units, dense=True)
        crops = deconvnet.project(record, layer, units, crop=True)
        assert crops.pixels.shape == (2, 3, 3, *info.receptive_field)
        for n in range(2):
            for u, unit in enumerate(units):
                position = deconvnet.strongest(record, layer, unit).positions[n]
                box = deconvnet.box(layer, position.tolist())
                assert tuple(crops.boxes[n, u].tolist()) == tuple(box)
                inside = box.clip(96, 96)
                want = torch.zeros(3, *info.receptive_field)
                want[
                    :, inside.top - box.top : inside.bottom - box.top, inside.left - box.left : inside.right - box.left
                ] = whole[n, u, :, inside.top : inside.bottom, inside.left : inside.right]
                torch.testing.assert_close(crops.pixels[n, u], want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("dense", [True, False])
def test_crops_of_a_single_unit_and_of_fully_connected_ones(dense):
    deconvnet = DeconvNet(narrow())
    images = torch.randn(2, 3, 96, 96)
    crops = deconvnet.project(images, "conv2", 1, crop=True, dense=dense)
    assert crops.pixels.shape == (2, 3, 27, 27) and crops.boxes.shape == (2, 4)
    crops = deconvnet.project(images, "fc6", [1, 2], crop=True, dense=dense)
    assert crops.pixels.shape == (2, 2, 3, 96, 96)
    assert (crops.boxes == torch.tensor([0, 0, 96, 96])).all()
    assert torch.equal(crops.pixels, deconvnet.project(images, "fc6", [1, 2]))


def test_overwrite_takes_the_dense_path():
    deconvnet = DeconvNet(narrow())
    record = deconvnet(torch.randn(1, 3, 96, 96))
    result = deconvnet.project(record, "conv3", 2, overlap="overwrite")
    assert torch.equal(result, deconvnet.project(record, "conv3", 2, overlap="overwrite", dense=True))
    assert not torch.allclose(result, deconvnet.project(record, "conv3", 2))


def test_a_dead_map_projects_to_zero():
    net = narrow()
    net.get_parameter("conv3.bias").data.fill_(-1e6)
    assert not DeconvNet(net).project(torch.randn(2, 3, 96, 96), "conv3", [0, 1]).any()


def test_many_activations_go_down_in_parts(monkeypatch):
    """The result does not depend on how the batch is split."""
    deconvnet = DeconvNet(narrow())
    record = deconvnet(torch.randn(3, 3, 96, 96))
    whole = deconvnet.project(record, "conv4", list(range(17)))
    monkeypatch.setattr(zfcuda.deconv.local, "STEP_BYTES", 100_000)
    monkeypatch.setattr(module, "CHUNK_BYTES", 1_000_000)
    torch.testing.assert_close(deconvnet.project(record, "conv4", list(range(17))), whole, rtol=1e-4, atol=1e-6)


def test_on_every_backend(backend):
    """The same projections from the same record, on the CPU, the emulator and the GPU."""
    net = randomise(zfcuda.models.zfnet(3, widths=(3, 4, 5, 4, 3), fc_width=4, input_size=64))
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    record = DeconvNet(net)(images)
    place = torch.tensor([[[0, 1], [2, 2]]])
    want = DeconvNet(module_in_double(net)).project(
        zfcuda.deconv.Record(
            images.double(), {k: v.double() for k, v in record.maps.items()}, record.switches, record.logits.double()
        ),
        "conv3",
        [1, 2],
        place,
        dense=True,
    )
    there = zfcuda.deconv.Record(
        images.to(backend.device),
        {k: v.to(backend.device) for k, v in record.maps.items()},
        {k: v.to(backend.device) for k, v in record.switches.items()},
        record.logits.to(backend.device),
    )
    local = DeconvNet(net.to(backend.device)).project(there, "conv3", [1, 2], place.to(backend.device))
    error = (local.cpu().double() - want).norm() / want.norm()
    assert error < 2e-6


@given(st.integers(1, 40), st.integers(0, 2**32))
@example(8, 0)
def test_bits(channels, seed):
    map_ = torch.randn(2, channels, 3, 2, generator=torch.Generator().manual_seed(seed)).round()
    map_[0, 0, 0, 0] = torch.nan
    bits = pack_bits(map_)
    assert bits.shape == (2, 3, 2, -(-channels // 8)) and bits.dtype == torch.uint8
    assert torch.equal(unpack_bits(bits, channels), ~(map_ <= 0).permute(0, 2, 3, 1))
