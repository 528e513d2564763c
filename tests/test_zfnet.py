"""ZFNet: the paper's sizes and counts, every variant, and a plain torch build as the oracle."""

import pytest
import torch
from torch import nn

from zfcuda.models import zfnet

PAPER_SIZES = {
    "conv1": 110, "pool1": 55, "norm1": 55, "conv2": 26, "pool2": 13, "norm2": 13,
    "conv3": 13, "conv4": 13, "conv5": 13, "pool5": 6,
}  # fmt: skip


def plain(first, second, rest, norm_first=False, size=224):
    """An independent build: (channels, kernel, stride, padding, groups) of each convolution."""
    layers, channels = [], 3

    def conv(width, kernel, stride, padding, groups):
        nonlocal channels
        layers.extend([nn.Conv2d(channels, width, kernel, stride, padding, groups=groups), nn.ReLU()])
        channels = width

    for spec in (first, second):
        conv(*spec)
        tail = [nn.MaxPool2d(3, 2, ceil_mode=True), nn.LocalResponseNorm(5, 5e-4, 0.75, 2.0)]
        layers.extend(reversed(tail) if norm_first else tail)
    for spec in rest:
        conv(*spec)
    layers.extend([nn.MaxPool2d(3, 2, ceil_mode=True), nn.Flatten()])
    with torch.no_grad():
        features = nn.Sequential(*layers)(torch.zeros(1, 3, size, size)).shape[1]
    layers.extend([nn.Linear(features, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)])
    return nn.Sequential(*layers)


def sizes(net, height=224, width=224):
    """Shape of every named layer's output, by the modules' own arithmetic."""
    x, out = torch.zeros(1, net.in_channels, height, width), {}
    with torch.no_grad():
        for name, module in net.named_children():
            x = module(x)
            out[name] = tuple(x.shape[1:])
    return out


def test_parameter_count_of_the_paper():
    assert sum(p.numel() for p in zfnet().parameters()) == 62_357_608


def test_sizes_of_the_paper():
    shapes = sizes(zfnet(fc_width=16).eval())
    assert {k: v[1:] for k, v in shapes.items() if k in PAPER_SIZES} == {k: (s, s) for k, s in PAPER_SIZES.items()}
    assert shapes["flatten"] == (9216,)


def test_order_and_state_dict_keys():
    net = zfnet(fc_width=16)
    names = " ".join(n for n, _ in net.named_children())
    convolutional = "conv1 pool1 norm1 conv2 pool2 norm2 conv3 conv4 conv5 pool5"
    assert names == f"{convolutional} flatten fc6 relu6 drop6 fc7 relu7 drop7 fc8"
    before = zfnet(fc_width=16, norm="before")
    assert " ".join(n for n, _ in before.named_children()).startswith("conv1 norm1 pool1 conv2 norm2 pool2 conv3")
    layers = ["conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8"]
    assert list(net.state_dict()) == [f"{n}.{p}" for n in layers for p in ("weight", "bias")]


def test_initialisation():
    net = zfnet(fc_width=64)
    for name, p in net.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all()
        elif p.numel() > 10_000:
            assert abs(p.mean()) < 5e-4 and abs(p.std() - 0.01) < 5e-4


@pytest.mark.parametrize("norm", ["after", "before"])
def test_outputs_equal_a_plain_torch_build(norm):
    torch.manual_seed(0)
    widths = (12, 16, 20, 24, 16)
    net = zfnet(10, widths=widths, fc_width=64, norm=norm, dropout=0.0).eval()
    plan = [(12, 7, 2, 1, 1), (16, 5, 2, 0, 1), [(20, 3, 1, 1, 1), (24, 3, 1, 1, 1), (16, 3, 1, 1, 1)]]
    oracle = plain(*plan, norm_first=norm == "before")
    _check_same(net, oracle)


def test_krizhevsky_equals_a_plain_torch_build():
    torch.manual_seed(1)
    net = zfnet(10, base="krizhevsky", widths=(12, 16, 24, 24, 16), fc_width=64, norm="before").eval()
    plan = [(12, 11, 4, 2, 1), (16, 5, 1, 2, 2), [(24, 3, 1, 1, 1), (24, 3, 1, 1, 2), (16, 3, 1, 1, 2)]]
    oracle = plain(*plan, norm_first=True)
    _check_same(net, oracle)


def _check_same(net, oracle):
    """Same weights, same images, float64 oracle; error at most twice that of torch in float32."""
    for ours, theirs in zip(net.parameters(), oracle.parameters(), strict=True):
        nn.init.normal_(ours, std=ours.numel() ** -0.5 * ours.shape[0] ** 0.5)
        theirs.data.copy_(ours.data)
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        single, exact, got = oracle(images), oracle.double()(images.double()), net(images)
    assert exact.abs().max() > 0.1
    assert (got - exact).abs().max() <= 2 * (single - exact).abs().max() + 1e-6 * exact.abs().max()


VARIANTS = {
    "b": ({"widths": "b"}, {"conv3": 512, "conv4": 1024, "conv5": 512}),
    "narrow": ({"widths": (8, 16, 24, 24, 16)}, {"conv1": 8, "conv5": 16}),
    "without 3, 4": ({"remove": (3, 4)}, {"conv3": None, "conv4": None, "conv5": 256}),
    "without 7": ({"remove": (7,)}, {"fc6": 32, "fc7": None, "relu7": None, "fc8": 1000}),
    "without 6, 7": ({"remove": (6, 7)}, {"fc6": None, "fc7": None, "fc8": 1000}),
    "without 3, 4, 6, 7": ({"remove": (3, 4, 6, 7)}, {"conv3": None, "fc6": None, "fc8": 1000}),
    "krizhevsky": ({"base": "krizhevsky"}, {"conv1": 96, "conv2": 256, "conv5": 256}),
    "grey": ({"in_channels": 1, "input_size": (96, 128)}, {"conv1": 96, "fc6": 32}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name):
    options, expected = VARIANTS[name]
    net = zfnet(**{"fc_width": 32, **options}).eval()
    shapes = sizes(net, *net.input_size)
    for layer, width in expected.items():
        assert shapes.get(layer, (None,))[0] == width
    assert shapes["fc8"] == (1000,)


@pytest.mark.parametrize("width", [2048, 8192])
def test_fully_connected_widths_of_table_3(width):
    with torch.device("meta"):
        net = zfnet(fc_width=width)
    convs = sum(p.numel() for n, p in net.named_parameters() if n.startswith("conv"))
    total = sum(p.numel() for p in net.parameters())
    assert total - convs == (9216 + 1) * width + (width + 1) * width + (width + 1) * 1000


def test_slices_are_networks():
    net = zfnet(widths=(4, 4, 4, 4, 4), fc_width=8).eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(net[10:](net[:10](images)), net(images))


def test_krizhevsky_sizes():
    shapes = sizes(zfnet(base="krizhevsky", fc_width=16).eval())
    assert [shapes[n][1] for n in ("conv1", "pool1", "conv2", "pool2", "conv5", "pool5")] == [55, 27, 27, 13, 13, 6]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"base": "alexnet"}, "alexnet"),
        ({"norm": "none"}, "'none'"),
        ({"widths": (1, 2, 3)}, r"\(1, 2, 3\)"),
        ({"widths": "c"}, "'c'"),
        ({"remove": (5,)}, "layer 5"),
        ({"input_size": 20}, "larger"),
    ],
)
def test_errors(options, words):
    with pytest.raises(ValueError, match=words):
        zfnet(**options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_halves(dtype):
    """Forward and backward, as in float64 but for the roundings of each layer; not by more than torch's layers do."""
    torch.manual_seed(0)
    net = zfnet(fc_width=16, num_classes=5).eval().to(dtype)
    images = torch.randn(2, 3, 224, 224).to(dtype)
    exact = zfnet(fc_width=16, num_classes=5).eval().double()
    exact.load_state_dict(net.state_dict())
    output, expected = net(images), exact(images.double())
    assert output.dtype == dtype
    assert (output - expected).abs().max() <= 2 * len(list(net.children())) * torch.finfo(
        dtype
    ).eps * expected.abs().max()
    output.sum().backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in net.parameters())
