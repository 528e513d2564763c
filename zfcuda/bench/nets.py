"""Whole networks forward, and a training step, after ``zfcuda.optimize``."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import zfcuda
from zfcuda.bench.case import Built, Case, Mode, Outputs, Setting, Unavailable
from zfcuda.bench.rivals import compiled_modules, modules, runtimes
from zfcuda.models import ZFNet, torchvision

NETWORKS = ("zfnet", "alexnet", "vgg11", "squeezenet1_1", "googlenet", "resnet18")
QUICK = ("zfnet", "alexnet")


def cases(setting: Setting, modes: list[Mode]) -> Iterator[Case]:
    """Quick ones: ZFNet and AlexNet, one image; and ZFNet's training step."""
    for mode in modes:
        for name in NETWORKS:
            flops, values = counted(name)
            for batch in dict.fromkeys((1, setting.batch)):
                yield Case(
                    "nets",
                    f"{name} batch {batch}",
                    mode,
                    partial(forward, name, batch),
                    flops=batch * flops,
                    bytes=mode.dtype.itemsize * (values + batch * 3 * 224**2),
                    quick=name in QUICK and batch == 1,
                    notes=["activations are not in the least bytes"],
                )
        flops, values = counted("zfnet")
        first = 2 * 110**2 * 96 * 3 * 49  # images need no gradient
        yield Case(
            "training",
            f"zfnet batch {setting.batch}",
            mode,
            training,
            flops=setting.batch * (3 * flops - first),
            bytes=mode.dtype.itemsize * 5 * values,
            notes=["forward, loss, backward, SGD with momentum; no dropout", "activations are not in the least bytes"],
        )


def counted(name: str) -> tuple[int, int]:
    """FLOPs of an image, and parameters; 0, 0 without torchvision."""
    try:
        with torch.device("meta"):
            net, image = network(name), torch.empty(1, 3, 224, 224)
    except Unavailable:
        return 0, 0
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(image)
    return counter.get_total_flops(), sum(p.numel() for p in net.parameters())


def network(name: str) -> nn.Module:
    """The network of torch's own modules, random weights at the scale that keeps activations alive, for evaluation."""
    if name == "zfnet":
        return torch_twin(zfnet())
    try:
        library = torchvision.load()
    except ImportError as error:
        raise Unavailable(str(error)) from error
    options = {"init_weights": False} if name == "googlenet" else {}
    net = getattr(library.models, name)(weights=None, **options).eval()
    return chain(net) if name == "alexnet" else net


def zfnet() -> ZFNet:
    """Ours, with He's initialisation, the same one each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = zfcuda.models.zfnet()
        for parameter in net.parameters():
            if parameter.dim() > 1:
                nn.init.kaiming_normal_(parameter)
    return net.eval()


def torch_twin(net: ZFNet) -> nn.Sequential:
    """The same network of torch's modules, each ReLU by itself."""
    out = nn.Sequential()
    for name, module in net.named_children():
        if isinstance(module, nn.Conv2d):
            sizes: Any = (module.kernel_size, module.stride, module.padding)
            conv = nn.Conv2d(module.in_channels, module.out_channels, *sizes)
            conv.weight, conv.bias = module.weight, module.bias
            out.add_module(name, conv)
            out.add_module(name.replace("conv", "relu"), nn.ReLU())
        elif name.startswith("pool"):
            out.add_module(name, nn.MaxPool2d(3, 2, ceil_mode=True))
        elif name.startswith("norm"):
            out.add_module(name, nn.LocalResponseNorm(5, 5e-4, 0.75, 2.0))
        else:
            out.add_module(name, module)
    return out.eval()


def chain(alexnet: nn.Module) -> nn.Sequential:
    """torchvision's AlexNet as a chain, without its adaptive pool, which changes nothing at 224 x 224."""
    return nn.Sequential(*alexnet.features, nn.Flatten(), *alexnet.classifier).eval()  # type: ignore[misc]


@torch.no_grad()
def run(net: nn.Module, images: Tensor) -> Tensor:
    return net(images)


def forward(name: str, batch: int, setting: Setting, mode: Mode) -> Built:
    plain = network(name)
    fast = zfcuda.optimize(zfnet() if name == "zfnet" else copy.deepcopy(plain))
    images = setting.normal(batch, 3, 224, 224)
    return Built(
        [
            *modules(setting, "zfcuda", fast, images.to(mode.dtype), mode, run, ours=True),
            *modules(setting, "torch eager", plain, images.to(mode.dtype), mode, run, ours=False),
            *compiled_modules(setting, plain, images.to(mode.dtype), mode, run),
            *runtimes(setting, plain, images, mode),
        ],
        lambda: Outputs([run(copy.deepcopy(plain).to(setting.device).double(), images[:1].double())]),
    )


class Step:
    """A training step, whose learning rate is too small to change float32 weights: every call does the same work."""

    def __init__(self) -> None:
        self.optimisers: dict[int, torch.optim.Optimizer] = {}

    def __call__(self, net: nn.Module, images: Tensor) -> list[Tensor]:
        parameters = list(net.parameters())
        optimiser = self.optimisers.get(id(net))
        if optimiser is None:
            optimiser = torch.optim.SGD(parameters, lr=1e-12, momentum=0.9)
            self.optimisers[id(net)] = optimiser
        optimiser.zero_grad()
        labels = torch.arange(len(images), device=images.device)
        nn.functional.cross_entropy(net(images), labels).backward()
        optimiser.step()
        first = parameters[0].grad
        assert first is not None
        return [first]


def training(setting: Setting, mode: Mode) -> Built:
    images = setting.normal(setting.batch, 3, 224, 224)
    # For evaluation: no dropout, whose draw would differ.
    fast, plain = zfcuda.optimize(zfnet()), torch_twin(zfnet())

    def step(contenders: list[Any]) -> list[Any]:
        for contender in contenders:
            contender.graph = False  # the optimiser's step and the gradients are made anew
        return contenders

    given = images.to(mode.dtype)
    return Built(
        [
            *step(modules(setting, "zfcuda", fast, given, mode, Step(), ours=True)),
            *step(modules(setting, "torch eager", plain, given, mode, Step(), ours=False)),
            *step(compiled_modules(setting, plain, given, mode, Step(), training=True)),
        ],
        lambda: Outputs(Step()(copy.deepcopy(plain).to(setting.device).double(), images.double())),
    )
