"""Whole networks after ``zfcuda.optimize`` against the same networks in torch eager, forward."""

import copy

import pytest
import torch
from conftest import BATCH, FORMATS
from layers import CONVOLUTIONS
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import zfcuda
from zfcuda.models import torchvision

NETWORKS = ("zfnet", "alexnet", "vgg11", "squeezenet1_1", "googlenet", "resnet18")


def network(name: str) -> nn.Module:
    if name != "zfnet":
        options = {"init_weights": False} if name == "googlenet" else {}
        return getattr(torchvision.load().models, name)(weights=None, **options)
    layers: list[nn.Module] = []
    for conv in CONVOLUTIONS:
        layers += [nn.Conv2d(conv.channels, conv.maps, conv.kernel, conv.stride, conv.padding), nn.ReLU(inplace=True)]
        if conv.name in ("conv1", "conv2", "conv5"):
            layers.append(nn.MaxPool2d(3, 2, ceil_mode=True))
        if conv.name in ("conv1", "conv2"):
            layers.append(nn.LocalResponseNorm(5, 5e-4, 0.75, 2.0))
    return nn.Sequential(*layers)


@pytest.mark.parametrize("name", NETWORKS)
def bench_optimize(compare, device: torch.device, layout: torch.memory_format, name: str) -> None:
    model = network(name).eval().to(device)
    optimised = zfcuda.optimize(copy.deepcopy(model).to(memory_format=layout))
    x = torch.randn(BATCH, 3, 224, 224, device=device)
    ours = x.contiguous(memory_format=layout)
    rivals = {}
    for format_name, format_ in FORMATS.items():
        rival, images = copy.deepcopy(model).to(memory_format=format_), x.contiguous(memory_format=format_)
        rivals[f"torch {format_name}"] = lambda rival=rival, images=images: rival(images)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    with torch.no_grad():
        compare(lambda: optimised(ours), rivals, bytes=4 * x.numel(), flops=counter.get_total_flops())
