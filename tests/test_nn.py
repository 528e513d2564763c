"""The modules: drop-in for torch's, with the same state dicts, arguments and results."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
from oracles import assert_within, normal
from torch import nn

import zfcuda
import zfcuda.nn as zf


def pairs():
    """A module of torch's (and what follows it), and the one that replaces it."""
    return {
        "conv": (nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU()), zf.ConvReLU2d(3, 4, 3, 2, 1)),
        "conv without bias": (
            nn.Sequential(nn.Conv2d(3, 6, (3, 2), groups=3, bias=False), nn.ReLU()),
            zf.ConvReLU2d(3, 6, (3, 2), groups=3, bias=False),
        ),
        "conv of the same size": (
            nn.Sequential(nn.Conv2d(3, 4, (4, 3), padding="same", dilation=(1, 2)), nn.ReLU()),
            zf.ConvReLU2d(3, 4, (4, 3), padding="same", dilation=(1, 2)),
        ),
        "conv and pool": (
            nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)),
            zf.ConvReLUMaxPool2d(3, 4, 3, 2, 1, pool_kernel_size=3, pool_stride=2, pool_ceil_mode=True),
        ),
        "conv and pool, stride of the window": (
            nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.ReLU(), nn.MaxPool2d(2, padding=1, dilation=2)),
            zf.ConvReLUMaxPool2d(4, 6, 3, groups=2, bias=False, pool_kernel_size=2, pool_padding=1, pool_dilation=2),
        ),
        "conv of the same size and pool": (
            nn.Sequential(nn.Conv2d(3, 4, (4, 3), padding="same", dilation=(1, 2)), nn.ReLU(), nn.MaxPool2d(2)),
            zf.ConvReLUMaxPool2d(3, 4, (4, 3), padding="same", dilation=(1, 2), pool_kernel_size=2),
        ),
        "conv, pool and norm": (
            nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.LocalResponseNorm(5, 0.5, 0.6, 2.0)),
            zf.ConvReLUMaxPool2dNorm(
                3, 6, 3, pool_kernel_size=2, norm_size=5, norm_alpha=0.5, norm_beta=0.6, norm_k=2.0
            ),
        ),
        "relu and pool": (nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 2, 1)), zf.ReLUMaxPool2d(3, 2, 1)),
        "pool": (nn.MaxPool2d(3, 2, 1, 1, False, True), zf.MaxPool2d(3, 2, 1, 1, False, True)),
        "pool, stride of the window": (nn.MaxPool2d(2), zf.MaxPool2d(2)),
        "norm": (nn.LocalResponseNorm(5, 5e-4, 0.75, 2.0), zf.LocalResponseNorm(5, 5e-4, 0.75, 2.0)),
    }


@pytest.mark.parametrize("name", pairs())
def test_replaces_torchs(backend, name):
    theirs, ours = pairs()[name]
    first = theirs[0] if isinstance(theirs, nn.Sequential) else theirs
    assert list(ours.state_dict()) == list(first.state_dict())
    ours.load_state_dict(first.state_dict())
    ours = pickle.loads(pickle.dumps(copy.deepcopy(ours))).to(backend.device)
    x = normal(2, getattr(ours, "in_channels", 3), 9, 8)
    theirs64 = copy.deepcopy(theirs).double()
    with torch.no_grad():
        assert_within(ours(x.float().to(backend.device)), theirs(x.float()), theirs64(x), terms=27)
        if name != "norm":  # torch takes three dimensions of that for a batch
            assert torch.equal(ours(x[0].float().to(backend.device)), ours(x.float().to(backend.device))[0])


def test_the_same_initialisation():
    torch.manual_seed(1)
    theirs = nn.Conv2d(3, 4, 3)
    torch.manual_seed(1)
    ours = zf.ConvReLU2d(3, 4, 3)
    assert torch.equal(theirs.weight, ours.weight) and torch.equal(theirs.bias, ours.bias)


@pytest.mark.parametrize("ceil_mode", [False, True])
def test_unpooling_with_torchs_signature(backend, ceil_mode):
    """Indices as torch's, switches for our own unpooling; without overlap both put values back alike."""
    x = normal(2, 3, 8, 9).float()
    expected, indices = nn.MaxPool2d(2, 2, 0, 1, True, ceil_mode)(x)
    output, ours = zf.MaxPool2d(2, 2, 0, 1, True, ceil_mode)(x.to(backend.device))
    assert torch.equal(ours.cpu(), indices) and torch.equal(output.cpu(), expected)
    output, switches = zf.MaxPool2d(2, ceil_mode=ceil_mode, return_switches=True)(x.to(backend.device))
    for overlap in ("sum", "overwrite"):
        back = zf.MaxUnpool2d(2, overlap=overlap)(output, switches, x.shape)
        assert torch.equal(back.cpu(), nn.MaxUnpool2d(2)(expected, indices, x.shape))


def test_switches_of_the_fused_modules(backend):
    """… are those of the pool by itself, and unpool by MaxUnpool2d; indices are torch's."""
    x, pool = normal(2, 3, 8, 9).float(), (3, 2, 1)
    conv = zf.ConvReLUMaxPool2d(3, 4, 3, pool_kernel_size=2, return_switches=True).to(backend.device)
    norm = zf.ConvReLUMaxPool2dNorm(3, 4, 3, pool_kernel_size=2, return_switches=True, norm_size=3)
    maps = zf.ConvReLU2d(3, 4, 3).to(backend.device)
    maps.load_state_dict(conv.state_dict())
    placed = x.to(backend.device)
    expected = zf.MaxPool2d(2, return_switches=True)(maps(placed))
    assert all(torch.equal(a, b) for a, b in zip(conv(placed), expected, strict=True))
    norm.to(backend.device).load_state_dict(conv.state_dict())
    assert torch.equal(norm(placed)[1], expected[1])
    output, switches = zf.ReLUMaxPool2d(*pool, return_switches=True)(placed)
    assert zf.MaxUnpool2d(*pool)(output, switches, x.shape).shape == x.shape
    _, indices = zf.ReLUMaxPool2d(*pool, return_indices=True)(placed)
    assert torch.equal(indices.cpu(), nn.MaxPool2d(*pool, return_indices=True)(x.relu())[1])


def test_the_deconvnet_refuses_what_it_does_not_know():
    """A fused module is not taken for the module that it derives from."""
    norm = zf.ConvReLUMaxPool2dNorm(3, 4, 3, pool_kernel_size=2, norm_size=5)
    for module in (zf.ConvReLUMaxPool2d(3, 4, 3, pool_kernel_size=2), norm, zf.ReLUMaxPool2d(2)):
        with pytest.raises(TypeError, match=r"overrides the forward\(\)"):
            zfcuda.DeconvNet(nn.Sequential(module))


@pytest.mark.parametrize(
    ("change", "inference", "training"),
    [
        (lambda x: x, True, True),
        (lambda x: x.double(), True, True),
        (lambda x: x.bfloat16(), True, True),
        (lambda x: x.half(), True, True),
        (lambda x: x.contiguous(memory_format=torch.channels_last), True, False),
        (lambda x: x[0], False, False),
        (lambda x: x[:, :, :80].contiguous(), True, False),
        (lambda x: x[:, :, :4].contiguous(), False, False),
        (lambda x: x.transpose(2, 3), False, False),
        (lambda x: x.to("meta"), False, False),
    ],
)
def test_the_faster_pool_of_the_two(change, inference, training, monkeypatch):
    """Ours where it is measured to be the faster one; always with torch's results, gradients among them."""
    called = []
    pool = zf.ops.max_pool2d
    monkeypatch.setattr(zf.ops, "max_pool2d", lambda *args: called.append(args) or pool(*args))
    x = change(normal(2, 3, 160, 144).float()).detach().requires_grad_()
    window = {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True}
    with torch.no_grad():
        zf.FastestMaxPool2d(**window)(x)
    assert bool(called) == inference
    called.clear()
    output, expected = zf.FastestMaxPool2d(**window)(x), nn.MaxPool2d(**window)(x)
    assert bool(called) == training and output.shape == expected.shape and output.dtype == expected.dtype
    if x.device.type != "meta":
        grad = torch.ones_like(expected)
        assert torch.equal(output, expected)
        assert torch.equal(*(torch.autograd.grad(y, x, grad)[0] for y in (output, expected)))


def test_repr():
    expected = "ConvReLUMaxPool2d(3, 4, kernel_size=(3, 3), stride=(1, 1), pool_kernel_size=2, pool_stride=2, "
    expected += "pool_padding=0, pool_dilation=1, pool_ceil_mode=False)"
    assert repr(zf.ConvReLUMaxPool2d(3, 4, 3, pool_kernel_size=2)) == expected
    expected = f"{expected[:-1]}, norm_size=5, norm_alpha=0.0001, norm_beta=0.75, norm_k=1.0)"
    expected = expected.replace("MaxPool2d", "MaxPool2dNorm")
    assert repr(zf.ConvReLUMaxPool2dNorm(3, 4, 3, pool_kernel_size=2, norm_size=5)) == expected
    assert repr(zf.ReLUMaxPool2d(3, 2)) == repr(nn.MaxPool2d(3, 2)).replace("MaxPool2d", "ReLUMaxPool2d")
    assert repr(zf.ConvReLU2d(3, 4, 3, 2)) == "ConvReLU2d(3, 4, kernel_size=(3, 3), stride=(2, 2))"
    assert repr(zf.MaxPool2d(3, 2)) == repr(nn.MaxPool2d(3, 2))
    assert repr(zf.LocalResponseNorm(5)) == repr(nn.LocalResponseNorm(5))
    expected = "MaxUnpool2d(kernel_size=3, stride=2, padding=0, dilation=1, overlap='sum')"
    assert repr(zf.MaxUnpool2d(3, 2)) == expected


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (RuntimeError, "padding_mode is 'reflect'", lambda: zf.ConvReLU2d(3, 4, 3, padding=1, padding_mode="reflect")),
        (TypeError, "pool_kernel_size", lambda: zf.ConvReLUMaxPool2d(3, 4, 3)),
        (TypeError, "norm_size", lambda: zf.ConvReLUMaxPool2dNorm(3, 4, 3, pool_kernel_size=2)),
        (RuntimeError, "return_switches", lambda: zf.MaxPool2d(2, return_indices=True, return_switches=True)),
        (ValueError, "overlap is 'max'", lambda: zf.MaxUnpool2d(2, overlap="max")),
    ],
)
def test_refuses(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_a_layer_of_the_paper_compiles_and_trains(backend):
    """Convolution, pool, normalisation in channels_last, one graph: gradients equal the eager ones."""
    torch.manual_seed(0)
    layer = nn.Sequential(zf.ConvReLU2d(3, 8, 5, 2, 1), zf.MaxPool2d(3, 2, ceil_mode=True), zf.LocalResponseNorm(5))
    layer = layer.to(backend.device, memory_format=torch.channels_last)
    x = normal(2, 3, 16, 16).float().to(backend.device, memory_format=torch.channels_last)
    results = []
    for module in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        layer.zero_grad()
        output = module(x)
        output.square().sum().backward()
        results.append([output.detach(), *(p.grad.clone() for p in layer.parameters())])
        assert all(p.grad.stride() == p.stride() for p in layer.parameters())
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def _network():
    """Weights in channels_last, whose strides the gradients must have."""
    torch.manual_seed(0)
    layers = zf.ConvReLU2d(3, 8, 3, padding=1), zf.MaxPool2d(2), zf.LocalResponseNorm(3), zf.ConvReLU2d(8, 4, 3)
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def _rank(rank, folder):
    """One of two processes: its half of the batch; DDP warns of a gradient with other strides than its weight's."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    network = nn.parallel.DistributedDataParallel(_network())
    network(normal(4, 3, 8, 8).float()[rank::2]).square().sum().backward()
    torch.save([p.grad for p in network.parameters()], f"{folder}/{rank}")
    dist.destroy_process_group()


def test_two_processes_train_by_ddp(tmp_path):
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    network = _network()
    (network(normal(4, 3, 8, 8).float()).square().sum() / 2).backward()
    for rank in (0, 1):
        for gradient, parameter in zip(torch.load(tmp_path / str(rank)), network.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad)
            assert gradient.stride() == parameter.stride() == parameter.grad.stride()
