"""The deconvnet against an oracle by autograd, captum, and the properties that the paper states.

The oracle is plain torch: the net is run forwards with its ReLUs, pools and normalisations replaced by
functions whose backward is the deconvnet's rule, and autograd goes down from one activation.
"""

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captum.attr import Deconvolution, GuidedBackprop, NeuronDeconvolution
from PIL import Image
from torch import nn
from torch.autograd import Function

import zfcuda
from zfcuda.deconv import deconvnet as dense
from zfcuda.deconv.receptive_field import Window

GATES = ["deconvnet", "backprop", "guided"]
UNITS = [0, 1, 2, 3]


class Rectify(Function):
    @staticmethod
    def forward(ctx, x, gate):
        ctx.gate, ctx.blocked = gate, x <= 0
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, grad):
        if ctx.gate in ("deconvnet", "guided"):
            grad = grad.clamp(min=0)
        if ctx.gate in ("backprop", "guided"):
            grad = torch.where(ctx.blocked, 0.0, grad)
        return grad, None


class OverwritePool(Function):
    @staticmethod
    def forward(ctx, x, pool):
        out, ctx.index = F.max_pool2d(
            x, pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode, return_indices=True
        )
        ctx.shape = x.shape
        return out

    @staticmethod
    def backward(ctx, grad):
        below = grad.new_zeros(ctx.shape).flatten(2)
        for window in range(grad.shape[2] * grad.shape[3]):
            which = slice(window, window + 1)
            below.scatter_(2, ctx.index.flatten(2)[..., which], grad.flatten(2)[..., which])
        return below.view(ctx.shape), None


class Skip(Function):
    @staticmethod
    def forward(ctx, x, function):
        return function(x)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def oracle_forward(modules, x, gate, overlap, skip_norm=True):
    """The output of every module in the list, with the rules of the deconvnet behind it."""
    outputs = []
    for m in modules:
        if isinstance(m, nn.Conv2d):
            x = F.conv2d(x, m.weight, m.bias, m.stride, m.padding, m.dilation, m.groups)
            if isinstance(m, zfcuda.nn.ConvReLU2d):
                x = Rectify.apply(x, gate)
        elif isinstance(m, nn.ReLU):
            x = Rectify.apply(x, gate)
        elif isinstance(m, nn.MaxPool2d):
            slide = (m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode)
            x = OverwritePool.apply(x, m) if overlap == "overwrite" else F.max_pool2d(x, *slide)
        elif isinstance(m, nn.LocalResponseNorm):
            norm = nn.LocalResponseNorm(m.size, m.alpha, m.beta, m.k)
            x = Skip.apply(x, norm) if skip_norm else norm(x)
        elif isinstance(m, nn.Linear):
            x = F.linear(x, m.weight, m.bias)
        elif isinstance(m, nn.Flatten):
            x = x.flatten(1)
        outputs.append(x)
    return outputs


def oracle(modules, images, at, unit, position=None, start="value", gate="deconvnet", overlap="sum", skip_norm=True):
    """Projection of one unit of the output of ``modules[at]`` for each image, one image at a time."""
    projections = []
    for image in images:
        x = image[None].clone().requires_grad_()
        map_ = oracle_forward(modules, x, gate, overlap, skip_norm)[at][0, unit]
        if map_.dim():
            where = (
                np.unravel_index(int(np.argmax(map_.detach().numpy())), map_.shape) if position is None else position
            )
            map_ = map_[tuple(where)]
        seed = map_.detach() if start == "value" else torch.tensor(start, dtype=x.dtype)
        projections.append(torch.autograd.grad(map_, x, seed)[0][0])
    return torch.stack(projections)


def leaves(net):
    return [m for m in net.modules() if not list(m.children())]


def randomise(net, seed=0):
    """Weights that keep activations about 1 and alive."""
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        scale = (2 / p[0].numel()) ** 0.5 if p.dim() > 1 else 0.1
        p.data = torch.randn(p.shape, generator=generator) * scale
    return net


def zf():
    return randomise(zfcuda.models.zfnet(10, widths=(6, 8, 10, 8, 6), fc_width=12, input_size=64)), 64


def overlapping():
    return randomise(
        nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 1, 1),
            nn.Conv2d(6, 8, 3, stride=2, bias=False), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, ceil_mode=True),
            nn.Conv2d(8, 5, 2),
        )
    ), 20  # fmt: skip


def odd():
    """Rectangles, dilation, groups, a ReLU after the pool, convolutions without ReLU, nesting, live dropout."""
    maps = nn.Sequential(
        nn.Identity(),
        nn.Conv2d(3, 6, (3, 5), stride=(1, 2), padding=(0, 2), dilation=(2, 1), groups=3),
        zfcuda.nn.MaxPool2d((3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
        nn.ReLU(),
        nn.LocalResponseNorm(3, alpha=0.5),
        nn.Sequential(nn.Conv2d(6, 8, 3, padding="same"), nn.Dropout2d(0.9), nn.ReLU()),
        nn.Flatten(),
    )
    features = maps.eval()(torch.zeros(1, 3, 15, 15)).shape[1]
    net = nn.Sequential(*maps, nn.Linear(features, 7), nn.ReLU(), nn.Dropout(0.9), nn.Linear(7, 4))
    return randomise(net).train(), 15


def build(make, dtype=torch.float64, batch=2):
    net, size = make()
    images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(6), dtype=dtype)
    return net.to(dtype), images


def close(got, want, rel):
    assert got.shape == want.shape
    scale = want.abs().max()
    assert scale > 0, "the oracle is zero everywhere; the test says nothing"
    assert (got - want).abs().max() <= rel * scale


CASES = [
    (zf, "conv1", 0), (zf, "pool1", 1), (zf, "norm1", 2), (zf, "conv2", 3), (zf, "conv4", 7), (zf, "conv5", 8),
    (zf, "pool5", 9), (zf, "fc6", 12), (zf, "fc8", 17),
    (overlapping, "0", 1), (overlapping, "3", 4), (overlapping, "5", 5), (overlapping, "6", 6),
    (odd, "1", 1), (odd, "2", 2), (odd, "3", 3), (odd, "5.0", 7), (odd, "6", 8), (odd, "7", 10), (odd, "10", 12),
]  # fmt: skip
ids = [f"{make.__name__}-{layer}" for make, layer, _ in CASES]


@pytest.mark.parametrize("overlap", ["sum", "overwrite"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("make, layer, at", CASES, ids=ids)
def test_equals_the_oracle(make, layer, at, gate, overlap):
    net, images = build(make)
    got = zfcuda.DeconvNet(net).project(images, layer, UNITS, gate=gate, overlap=overlap)
    want = [oracle(leaves(net), images, at, u, gate=gate, overlap=overlap) for u in UNITS]
    close(got, torch.stack(want, 1), 1e-12)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("make, layer, at", [CASES[5], CASES[8], CASES[12], CASES[19]])
def test_equals_the_oracle_in_float32(make, layer, at, gate):
    net, images = build(make, torch.float32)
    close(
        zfcuda.DeconvNet(net).project(images, layer, 2, gate=gate), oracle(leaves(net), images, at, 2, gate=gate), 1e-5
    )


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make, layer, at", [CASES[0], CASES[3], CASES[5], CASES[8], CASES[12], CASES[19]])
def test_nearly_equals_the_oracle_in_halves(make, layer, at, gate, dtype):
    """Of the same rounded weights: the same picture, in which rounded maps may have chosen other switches."""
    net, images = build(make)
    net, images = net.to(dtype), images.to(dtype)
    got = zfcuda.DeconvNet(net).project(images, layer, 2, gate=gate)
    want = oracle(leaves(copy.deepcopy(net).double()), images.double(), at, 2, gate=gate)
    assert got.dtype == dtype and want.abs().max() > 0
    likeness = F.cosine_similarity(got.double().flatten(), want.flatten(), 0)
    if at == 0:
        assert likeness > 1 - torch.finfo(dtype).eps  # no switch is between
    assert likeness > 0.95


@pytest.mark.parametrize("gate", GATES)
def test_equals_the_oracle_on_every_backend(backend, gate):
    net, images = build(overlapping, torch.float32)
    want = torch.stack([oracle(leaves(net), images, 5, u, gate=gate) for u in UNITS], 1)
    d = zfcuda.DeconvNet(net.to(backend.device))
    record = d(images.to(backend.device))
    values, positions = d.strongest(record, "5", UNITS)
    assert values.device == positions.device == record.images.device
    close(d.project(record, "5", UNITS, gate=gate).cpu(), want, 1e-5)
    close(d.project(record, "5", UNITS, position=positions.cpu(), start=values.cpu(), gate=gate).cpu(), want, 1e-5)


def test_backprop_is_the_gradient_where_there_is_no_normalisation():
    net, images = build(overlapping)
    images.requires_grad_()
    logits = net(images)
    gradient = torch.autograd.grad(logits[:, 2, 1, 1].sum(), images)[0]
    got = zfcuda.DeconvNet(net).project(images.detach(), "6", 2, position=(1, 1), start=1, gate="backprop")
    close(got, gradient, 1e-13)


def test_record_holds_what_the_model_computes():
    net, images = build(zf)
    record = zfcuda.DeconvNet(net)(images)
    x = images
    with torch.no_grad():
        for name, module in net.eval().named_children():
            x = module(x)
            want = x.relu() if name in ("fc6", "fc7") else x
            close(record.maps[name], want, 1e-12)
    assert record.logits is record.maps["fc8"] and set(record.switches) == {"pool1", "pool2", "pool5"}


def test_the_model_is_left_as_it_was():
    net, images = build(odd)
    state, modes = {k: v.clone() for k, v in net.state_dict().items()}, [m.training for m in net.modules()]
    rng = torch.get_rng_state()
    record = zfcuda.DeconvNet(net)(images)
    assert torch.equal(rng, torch.get_rng_state()), "dropout ran"
    assert modes == [m.training for m in net.modules()] and net.training
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert not record.logits.requires_grad and all(p.grad is None for p in net.parameters())
    assert torch.equal(record.logits, zfcuda.DeconvNet(net.eval())(images).logits)


def test_inplace_relu_does_not_touch_images_or_maps():
    net = randomise(nn.Sequential(nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.ReLU(inplace=True)))
    images = torch.randn(1, 3, 4, 4)
    kept = images.clone()
    zfcuda.DeconvNet(net)(images)
    assert torch.equal(images, kept)


def test_a_module_used_twice_is_two_layers():
    conv, relu = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()
    net = randomise(nn.Sequential(conv, relu, conv, relu)).double()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    got = zfcuda.DeconvNet(net).project(images, "2", 1)
    close(got, oracle([conv, relu, conv, relu], images, 3, 1), 1e-12)


def test_nested_convrelu_equals_conv_and_relu():
    net, images = build(overlapping)
    fused = nn.Sequential(
        nn.Sequential(zfcuda.nn.ConvReLU2d(3, 6, 3, padding=1), zfcuda.nn.MaxPool2d(3, 1, 1)),
        zfcuda.nn.ConvReLU2d(6, 8, 3, stride=2, bias=False),
    ).double()
    for ours, theirs in zip(fused.parameters(), net.parameters(), strict=False):
        ours.data = theirs.data
    close(zfcuda.DeconvNet(fused).project(images, "1", 3), oracle(leaves(net), images, 4, 3), 1e-12)


# Units, positions and starts.


def test_different_units_for_each_image_equal_one_by_one():
    net, images = build(zf, batch=3)
    d = zfcuda.DeconvNet(net)
    units = torch.tensor([[0, 5], [3, 3], [7, 1]])
    got = d.project(images, "conv4", units)
    assert got.shape == (3, 2, 3, 64, 64)
    for n in range(3):
        for u in range(2):
            close(got[n : n + 1, u], d.project(images[n : n + 1], "conv4", int(units[n, u])), 1e-13)


def test_shapes():
    net, images = build(zf)
    d = zfcuda.DeconvNet(net)
    record = d(images)
    assert d.project(record, "conv1", 0).shape == (2, 3, 64, 64)
    assert d.project(record, "conv1", [0]).shape == (2, 1, 3, 64, 64)
    assert d.project(record, "conv1", torch.tensor(2)).shape == (2, 3, 64, 64)
    assert d.project(record, "conv1", []).shape == (2, 0, 3, 64, 64)
    assert d.project(images[:0], "conv3", [1, 2]).shape == (0, 2, 3, 64, 64)
    assert d.strongest(record, "conv3", 1).values.shape == (2,)
    assert d.strongest(record, "conv3", [1, 2, 3]).positions.shape == (2, 3, 2)
    assert d.strongest(record, "fc6", [1]).positions is None


def test_given_positions_and_starts():
    net, images = build(zf)
    d, modules = zfcuda.DeconvNet(net), leaves(net)
    record = d(images)
    one = d.project(record, "conv2", 2, position=(1, 3), start=1)
    close(one, oracle(modules, images, 3, 2, position=(1, 3), start=1.0), 1e-12)
    positions = torch.tensor([[[1, 3], [0, 2]], [[4, 4], [5, 0]]])
    starts = torch.tensor([[1.0, 2.0], [0.5, 3.0]], dtype=torch.float64)
    got = d.project(record, "conv2", [2, 4], position=positions, start=starts)
    for n in range(2):
        for u, unit in enumerate((2, 4)):
            single = oracle(modules, images[n : n + 1], 3, unit, tuple(positions[n, u].tolist()), float(starts[n, u]))
            close(got[n : n + 1, u], single, 1e-12)
    each = d.project(record, "conv2", 2, position=positions[:, 0], start=starts[:, 0])
    close(each, got[:, 0], 1e-13)


def test_strongest_is_the_default_position_and_value():
    net, images = build(zf)
    d = zfcuda.DeconvNet(net)
    record = d(images)
    values, positions = d.strongest(record, "conv3", [1, 4])
    map_ = record.maps["conv3"][:, [1, 4]]
    assert torch.equal(values, map_.amax((2, 3)))
    explicit = d.project(record, "conv3", [1, 4], position=positions, start=values)
    assert torch.equal(d.project(record, "conv3", [1, 4]), explicit)
    best = d.strongest_unit(record, "conv3")
    assert torch.equal(record.maps["conv3"][torch.arange(2), best].amax((1, 2)), record.maps["conv3"].amax((1, 2, 3)))


def test_ties_go_to_the_first_position_in_row_major_order():
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU())
    nn.init.ones_(net[0].weight)
    nn.init.zeros_(net[0].bias)
    image = torch.zeros(1, 1, 40, 50)
    image[0, 0, 7, 30] = image[0, 0, 7, 44] = image[0, 0, 31, 2] = 3.0
    d = zfcuda.DeconvNet(net)
    record = d(image)
    assert d.strongest(record, "0", 0).positions.tolist() == [[7, 30]]
    assert d.project(record, "0", 0).nonzero().tolist() == [[0, 0, 7, 30]]
    assert d.strongest_unit(record, "0").tolist() == [0]


def test_a_dead_map_projects_to_zeros():
    net, images = build(zf)
    net.conv3.bias.data[4] = -1e6
    d = zfcuda.DeconvNet(net)
    for gate in GATES:
        assert (d.project(images, "conv3", 4, gate=gate) == 0).all()
    # Started from 1 a dead unit still has filters to show, but no gradient.
    assert (d.project(images, "conv3", 4, start=1) != 0).any()
    assert (d.project(images, "conv3", 4, start=1, gate="backprop") == 0).all()


def test_projections_stay_inside_the_receptive_field():
    net, images = build(zf)
    d = zfcuda.DeconvNet(net)
    record = d(images)
    positions = d.strongest(record, "conv2", 3).positions
    outside = d.project(record, "conv2", 3)
    for n in range(2):
        top, left, bottom, right = d.box("conv2", positions[n].tolist()).clip(64, 64)
        assert (outside[n, :, top:bottom, left:right] != 0).any()
        outside[n, :, top:bottom, left:right] = 0
    assert (outside == 0).all()


def test_deterministic_and_independent_of_chunks(monkeypatch):
    net, images = build(zf, torch.float32)
    d = zfcuda.DeconvNet(net)
    whole = d.project(images, "conv5", [0, 1, 2, 3])
    assert torch.equal(whole, d.project(images, "conv5", [0, 1, 2, 3]))
    monkeypatch.setattr(dense, "CHUNK_BYTES", 3 * 3 * 64 * 64 * 4)  # three projections: the image is the largest map
    batches = []
    for name in ("deconv2d", "unpool_relu_deconv2d"):
        step = getattr(zfcuda.ops, name)
        monkeypatch.setattr(zfcuda.ops, name, lambda s, *a, step=step, **k: batches.append(len(s)) or step(s, *a, **k))
    close(d.project(images, "conv5", [0, 1, 2, 3]), whole, 1e-6)
    assert batches == [3] * 10 + [2] * 5


# Receptive fields and sizes.


def support_model(net):
    """The same geometry with every weight 1 and means for maxima: each input pixel counts."""
    layers = []
    for m in leaves(net):
        if isinstance(m, nn.Conv2d):
            twin = nn.Conv2d(m.in_channels, m.out_channels, m.kernel_size, m.stride, m.padding, m.dilation, m.groups)
            nn.init.ones_(twin.weight)
            layers.append(twin)
        elif isinstance(m, nn.MaxPool2d):
            layers.append(nn.AvgPool2d(m.kernel_size, m.stride, m.padding, m.ceil_mode))
        else:
            layers.append(nn.Identity())
    return layers


@pytest.mark.parametrize("make", [zf, overlapping])
def test_boxes_are_the_support_of_the_gradient(make):
    net, images = build(make)
    d = zfcuda.DeconvNet(net)
    modules, size = support_model(net), images.shape[2]
    names = [name for name, m in net.named_modules() if not list(m.children())]
    for layer in d.layers:
        if layer.receptive_field is None:
            continue
        chain = nn.Sequential(*modules[: names.index(layer.name) + 1]).double()
        x = torch.zeros(1, 3, size, size, dtype=torch.float64, requires_grad=True)
        map_ = chain(x)[0, 0]
        for position in [(0, 0), (map_.shape[0] - 1, map_.shape[1] // 2), (map_.shape[0] // 2, map_.shape[1] - 1)]:
            hit = torch.autograd.grad(map_[position], x, retain_graph=True)[0][0, 0].nonzero()
            found = (*hit.amin(0).tolist(), *(hit.amax(0) + 1).tolist())
            assert d.box(layer.name, position).clip(size, size) == found, layer.name


@pytest.mark.parametrize("make", [zf, overlapping, odd])
def test_sizes_and_channels_are_those_of_the_maps(make):
    net, images = build(make)
    d = zfcuda.DeconvNet(net, images.shape[2:])
    record = d(images)
    for layer in d.layers:
        map_ = record.maps[layer.name]
        assert layer.channels == map_.shape[1]
        assert layer.size == (tuple(map_.shape[2:]) or None)


def test_output_sizes_are_those_of_torch_for_every_small_window():
    cases = itertools.product(range(1, 10), (1, 2, 3), (1, 2, 3), (0, 1), (1, 2), (False, True))
    checked = 0
    for size, kernel, stride, padding, dilation, ceil in cases:
        if 2 * padding > kernel or dilation * (kernel - 1) + 1 > size + 2 * padding:
            continue
        pooled = F.max_pool2d(torch.zeros(1, 1, size, size + 1), kernel, stride, padding, dilation, ceil)
        window = Window((kernel,) * 2, (stride,) * 2, (padding,) * 2, (dilation,) * 2, ceil)
        assert window.output_size((size, size + 1)) == tuple(pooled.shape[2:])
        checked += 1
    assert checked > 300


def test_receptive_fields_of_the_paper():
    with torch.device("meta"):
        layers = zfcuda.DeconvNet(zfcuda.models.zfnet()).layers
    got = {x.name: (x.receptive_field[0], x.jump[0]) for x in layers if x.jump}
    paper = {
        "conv1": (7, 2), "pool1": (11, 4), "conv2": (27, 8), "pool2": (43, 16),
        "conv3": (75, 16), "conv4": (107, 16), "conv5": (139, 16), "pool5": (171, 32),
    }  # fmt: skip
    assert paper.items() <= got.items()


def test_layers_name_the_aliases():
    layers = {x.name: x for x in zfcuda.DeconvNet(zf()[0]).layers}
    assert layers["fc6"].aliases == ("relu6", "drop6") and layers["conv1"].kind == "conv"
    net, images = build(zf)
    d = zfcuda.DeconvNet(net)
    assert torch.equal(d.project(images, "relu6", 1), d.project(images, "fc6", 1))


# Captum, where it is right and where it is not.


def plain_net():
    """Module ReLUs, pools that overlap, no normalisation: what captum supports."""
    net = nn.Sequential(
        nn.Conv2d(3, 6, 5, stride=2), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(8 * 9, 16), nn.ReLU(), nn.Linear(16, 5),
    )  # fmt: skip
    return randomise(net).double().eval(), torch.randn(
        2, 3, 29, 29, generator=torch.Generator().manual_seed(1)
    ).double()


@pytest.mark.filterwarnings("ignore:Setting backward hooks")
@pytest.mark.parametrize("gate, method", [("deconvnet", Deconvolution), ("guided", GuidedBackprop)])
def test_logits_equal_captum(gate, method):
    net, images = plain_net()
    got = zfcuda.DeconvNet(net).project(images, "9", 3, start=1, gate=gate)
    close(got, method(net).attribute(images.clone().requires_grad_(), target=3).detach(), 1e-12)


@pytest.mark.filterwarnings("ignore:Setting backward hooks")
def test_units_equal_captum():
    net, images = plain_net()
    d = zfcuda.DeconvNet(net)
    position = d.strongest(d(images), "3", 2).positions[0].tolist()
    captum = NeuronDeconvolution(net, net[4]).attribute(images.clone().requires_grad_(), (2, *position))
    close(d.project(images, "3", 2, position=position, start=1), captum.detach(), 1e-12)


class Functional(nn.Module):
    """The same net with ``F.relu`` in its forward()."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        for m in self.net:
            x = F.relu(x) if isinstance(m, nn.ReLU) else m(x)
        return x


@pytest.mark.filterwarnings("ignore:Setting backward hooks")
def test_functional_relu_is_rectified_where_captum_returns_the_plain_gradient():
    net, images = plain_net()
    hidden, x = Functional(net), images.clone().requires_grad_()
    gradient = torch.autograd.grad(hidden(x)[:, 3].sum(), x)[0]
    close(Deconvolution(hidden).attribute(x, target=3).detach(), gradient, 1e-12)
    wanted = oracle(leaves(net), images, 9, 3, start=1.0)
    assert (gradient - wanted).norm() > 0.1 * wanted.norm()
    close(zfcuda.DeconvNet(hidden).project(images, "net.9", 3, start=1), wanted, 1e-12)


@pytest.mark.filterwarnings("ignore:Setting backward hooks")
def test_normalisation_is_skipped_where_captum_goes_through_its_gradient():
    net, images = plain_net()
    net.insert(3, nn.LocalResponseNorm(5, alpha=5.0, k=2.0))
    captum = Deconvolution(net).attribute(images.clone().requires_grad_(), target=3).detach()
    close(captum, oracle(leaves(net), images, 10, 3, start=1.0, skip_norm=False), 1e-12)
    got = zfcuda.DeconvNet(net).project(images, "10", 3, start=1)
    close(got, oracle(leaves(net), images, 10, 3, start=1.0), 1e-12)
    assert (got - captum).norm() > 0.1 * got.norm()


# Refusals and errors.


class Strange(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


@pytest.mark.parametrize(
    "layer, words",
    [
        (nn.LPPool2d(2, 2), r"1 \(LPPool2d\).*MaxPool2d"),
        (nn.LeakyReLU(), "LeakyReLU.*ReLU only"),
        (nn.Softmax(1), "Softmax.*logits"),
        (nn.MaxPool2d(2, return_indices=True), "return_indices"),
        (zfcuda.nn.MaxPool2d(2, return_switches=True), "return_switches"),
        (nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"), "padding_mode='reflect'"),
        (nn.Conv2d(3, 3, 2, padding="same"), "even kernel"),
        (nn.Linear(3, 3), "Flatten"),
        (nn.Flatten(2), "start_dim=1"),
        (Strange(3, 3, 3), "overrides"),
        (nn.PixelShuffle(2), "PixelShuffle.*none of"),
    ],
)
def test_layers_that_cannot_be_projected_are_refused_by_name(layer, words):
    with pytest.raises(TypeError, match=words):
        zfcuda.DeconvNet(nn.Sequential(nn.Conv2d(3, 3, 3), layer))


def test_an_adaptive_pool_to_the_size_it_has_changes_nothing():
    net = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d((6, None)), nn.Flatten()))
    d = zfcuda.DeconvNet(net)
    image = torch.randn(1, 3, 8, 8)
    assert torch.equal(d.project(image, "2", 1), d.project(image, "0", 1))


@pytest.mark.parametrize(
    "arguments, options, error, words",
    [
        (("conv9", 0), {}, ValueError, "conv9.*conv1, pool1.*fc8"),
        (("conv1", 6), {}, IndexError, "units has 6.*0 to 5"),
        (("conv1", -1), {}, IndexError, "units has -1"),
        (("conv1", [[0], [1], [2]]), {}, RuntimeError, r"\(3, 1\).*N = 2"),
        (("conv1", 0.5), {}, TypeError, "integers"),
        (("conv1", 0), {"position": (30, 0)}, IndexError, r"\(30, 0\).*30 rows"),
        (("conv1", 0), {"position": (0, -1)}, IndexError, r"\(0, -1\)"),
        (("conv1", 0), {"position": torch.zeros(3, 2, dtype=torch.long)}, RuntimeError, r"\(3, 2\).*\(2, 2\)"),
        (("fc6", 0), {"position": (0, 0)}, ValueError, "fc6.*leave it out"),
        (("conv1", 0), {"start": "one"}, ValueError, "'one'"),
        (("conv1", 0), {"start": torch.ones(5)}, RuntimeError, r"start has shape \(5,\)"),
        (("conv1", 0), {"gate": "relu"}, ValueError, "'relu'.*'guided'"),
        (("conv1", 0), {"overlap": "max"}, ValueError, "'max'.*'overwrite'"),
    ],
)
def test_errors_name_argument_value_and_remedy(arguments, options, error, words):
    net, images = build(zf)
    with pytest.raises(error, match=words):
        zfcuda.DeconvNet(net).project(images, *arguments, **options)


def test_images_of_wrong_rank_or_type():
    d = zfcuda.DeconvNet(zf()[0])
    with pytest.raises(RuntimeError, match="unsqueeze"):
        d(torch.zeros(3, 64, 64))
    with pytest.raises(TypeError, match="ndarray"):
        d(np.zeros((1, 3, 64, 64)))
    with pytest.raises(ValueError, match="whole image"):
        d.box("fc6", (0, 0))
    with pytest.raises(TypeError, match="function"):
        zfcuda.DeconvNet(F.relu)


# The one-liner.


def test_show_puts_the_projection_beside_the_patch_it_came_from():
    net, _ = build(zf, torch.float32)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    shown = np.asarray(zfcuda.show(net, pixels, "conv2", 3, size=27))
    assert shown.shape == (27, 2 * 27 + 8, 3)
    d = zfcuda.DeconvNet(net)
    record = d(torch.from_numpy(pixels.transpose(2, 0, 1)[None] - np.float32(128)))
    position = d.strongest(record, "conv2", 3).positions[0].tolist()
    top, left, bottom, right = d.box("conv2", position)
    padded = np.pad(pixels, ((50, 50), (50, 50), (0, 0)), constant_values=128)
    np.testing.assert_array_equal(shown[:, 35:], padded[50 + top : 50 + bottom, 50 + left : 50 + right])
    assert len(np.unique(shown[:, :27])) > 10


def test_show_takes_paths_images_arrays_and_tensors(tmp_path):
    net, _ = build(zf, torch.float32)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    photo = Image.fromarray(pixels)
    photo.save(tmp_path / "photo.png")
    tensor = torch.from_numpy(pixels.transpose(2, 0, 1) - np.float32(128))
    wanted = np.asarray(zfcuda.show(net, pixels, "conv3"))
    for same in (photo, tmp_path / "photo.png", str(tmp_path / "photo.png"), pixels / 255.0, tensor, tensor[None]):
        np.testing.assert_array_equal(np.asarray(zfcuda.show(zfcuda.DeconvNet(net), same, "conv3")), wanted)


def test_show_turns_photographs_upright(tmp_path):
    net, _ = build(zf, torch.float32)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise when shown
    Image.fromarray(np.rot90(pixels).copy()).save(tmp_path / "turned.png", exif=exif)
    shown, wanted = zfcuda.show(net, tmp_path / "turned.png", "conv3"), zfcuda.show(net, pixels, "conv3")
    np.testing.assert_array_equal(np.asarray(shown), np.asarray(wanted))


def test_show_takes_grey_networks():
    net = randomise(zfcuda.models.zfnet(4, widths=(4,) * 5, fc_width=4, in_channels=1, input_size=64))
    assert zfcuda.show(net, np.random.default_rng(0).random((80, 90, 3)), "conv2", size=30).size == (68, 30)


def test_show_scales_to_the_network_and_serves_fully_connected_units():
    net, _ = build(zf, torch.float32)
    shown = zfcuda.show(net, np.full((100, 150), 0.25), "fc8", size=64)
    assert shown.size == (64 + 8 + 64, 64)
    assert (np.asarray(shown)[:, 72:] == 64).all()
    with pytest.raises(ValueError, match="conv1, pool1"):
        zfcuda.show(net, np.zeros((64, 64)), "layer1")
    with pytest.raises(TypeError, match="int64"):
        zfcuda.show(net, np.zeros((64, 64), dtype=np.int64), "conv1")
