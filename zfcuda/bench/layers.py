"""ZFNet's convolutional layers, fused with what follows them and not, and convolutions with groups; and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zfcuda import ops
from zfcuda.bench.case import FORMATS, Built, Case, Contender, Mode, Outputs, Setting
from zfcuda.bench.operators import CONSTANTS, pooled_outputs, pooled_reference, switched_outputs, torch_pool
from zfcuda.bench.rivals import laid_out, ours, runtimes, torch_ways
from zfcuda.bench.shapes import CONVOLUTIONS, GROUPED, NORMED, POOLED, Conv
from zfcuda.ops._conv import Filters, conv2d_weight_gradient

#: How far a layer goes, our operators for that, and their options.
Through = Literal["maps", "pool", "norm"]
THROUGH: tuple[Through, ...] = get_args(Through)
OPERATORS: dict[Through, Any] = {
    "maps": ops.conv2d_relu,
    "pool": ops.conv2d_relu_max_pool2d,
    "norm": ops.conv2d_relu_max_pool2d_norm,
}
_POOL: dict[str, Any] = {"pool_kernel_size": 3, "pool_stride": 2, "pool_ceil_mode": True}
_NORM = dict(zip(("norm_size", "norm_alpha", "norm_beta", "norm_k"), CONSTANTS, strict=True))
OPTIONS: dict[Through, dict[str, Any]] = {"maps": {}, "pool": _POOL, "norm": _POOL | _NORM}


def cases(setting: Setting, modes: list[Mode]) -> Iterator[Case]:
    """Quick ones: layers 1 and 3."""
    for mode in modes:
        for conv in CONVOLUTIONS:
            yield from of_layer("layers", conv, setting.batch, mode, quick=conv.name in ("conv1", "conv3"))


def grouped(setting: Setting, modes: list[Mode]) -> Iterator[Case]:
    """Quick: one that is no longer depthwise and not yet a layer."""
    for mode in modes:
        for conv in GROUPED:
            yield from of_layer("grouped", conv, setting.batch, mode, quick=conv.name == "32 groups of 4 at 56")


def of_layer(group: str, conv: Conv, batch: int, mode: Mode, quick: bool) -> Iterator[Case]:
    size = mode.dtype.itemsize
    case = partial(Case, group, mode=mode, flops=conv.flops(batch), quick=quick)
    tensors = size * conv.elements(batch)
    yield case(f"{conv.name} forward", build=partial(forward, conv), bytes=tensors)
    if conv in POOLED:
        pooled = batch * conv.maps * POOLED[conv].pooled_size ** 2
        least = size * (conv.inputs(batch) + conv.weights + pooled) + pooled
        yield case(f"{conv.name} forward with pool", build=partial(forward, conv, through="pool"), bytes=least)
        if conv in NORMED:
            name = f"{conv.name} forward with pool and normalisation"
            yield case(name, build=partial(forward, conv, through="norm"), bytes=least)
    yield case(f"{conv.name} data gradient", build=partial(data_gradient, conv), bytes=tensors)
    yield case(f"{conv.name} weight gradient", build=partial(weight_gradient, conv), bytes=tensors)


def tensors_of(conv: Conv, setting: Setting, mode: Mode) -> tuple[Tensor, Tensor, Tensor]:
    """Images, weight, bias."""
    x = setting.normal(setting.batch, conv.channels, conv.size, conv.size, mode=mode)
    scale = (conv.weights / conv.maps) ** -0.5
    return x, scale * setting.normal(*conv.weight_shape, mode=mode), 0.1 * setting.normal(conv.maps, mode=mode)


def torch_behind(through: Through, maps: Tensor) -> Any:
    """What follows the rectified maps, by torch."""
    if through == "maps":
        return maps
    pooled, indices = torch_pool(maps)
    return (pooled if through == "pool" else F.local_response_norm(pooled, *CONSTANTS)), indices


def torch_layer(conv: Conv, through: Through, x: Tensor, weight: Tensor, bias: Tensor) -> Any:
    return torch_behind(through, F.conv2d(x, weight, bias, conv.stride, conv.padding, 1, conv.groups).relu_())


def cudnn_layer(conv: Conv, through: Through, x: Tensor, weight: Tensor, bias: Tensor) -> Any:
    """cuDNN's own fusion of convolution, bias and ReLU."""
    pairs = [conv.stride] * 2, [conv.padding] * 2, [1, 1]
    return torch_behind(through, torch.cudnn_convolution_relu(x, weight, bias, *pairs, conv.groups))


def as_modules(conv: Conv, through: Through, weight: Tensor, bias: Tensor) -> nn.Sequential:
    layer = nn.Conv2d(conv.channels, conv.maps, conv.kernel, conv.stride, conv.padding, groups=conv.groups)
    layer.load_state_dict({"weight": weight, "bias": bias})
    behind = [nn.MaxPool2d(3, 2, ceil_mode=True), nn.LocalResponseNorm(*CONSTANTS)]
    return nn.Sequential(layer, nn.ReLU(), *behind[: THROUGH.index(through)])


def forward(conv: Conv, setting: Setting, mode: Mode, through: Through = "maps") -> Built:
    x, weight, bias = tensors_of(conv, setting, mode)
    slide = conv.stride, conv.padding, 1, conv.groups
    call, pools = partial(OPERATORS[through], **OPTIONS[through]), through != "maps"
    theirs = partial(torch_layer, conv, through)
    read = pooled_outputs if pools else Outputs.of
    contenders = [
        *ours(
            call,
            [x, weight, bias, *slide],
            partial(switched_outputs, conv.out_size) if pools else Outputs.of,
            (lambda result: result) if pools else None,
        ),
        *torch_ways(setting, theirs, [x, weight, bias], mode, read),
    ]
    if setting.kind == "cuda":
        contenders += [
            Contender(f"cuDNN convolution_relu {name}", partial(_cudnn, conv, through, given, mode), read=read)
            for name, layout in FORMATS.items()
            for given in [laid_out([x, weight, bias], layout)]
        ]
    lacks = "records no switches" if pools else ""
    contenders += runtimes(setting, as_modules(conv, through, weight, bias), x, mode, lacks=lacks)

    def exact() -> Outputs:
        maps = torch_layer(conv, "maps", x[:1].double(), weight.double(), bias.double())
        if not pools:
            return Outputs([maps])
        found = pooled_reference(maps)
        return Outputs([torch_behind(through, maps)[0]], found.indices, found.maps)

    return Built(contenders, exact)


def _cudnn(conv: Conv, through: Through, given: list[Tensor], mode: Mode) -> Any:
    mode.require_torch()
    return partial(cudnn_layer, conv, through, *given)


def _gradients(conv: Conv, of_data: bool, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """torch's."""
    pairs = [conv.stride] * 2, [conv.padding] * 2, [1, 1]
    mask = [of_data, not of_data, False]
    both = torch.ops.aten.convolution_backward(grad, x, weight, None, *pairs, False, [0, 0], conv.groups, mask)
    return both[0 if of_data else 1]


def _gradient_tensors(conv: Conv, setting: Setting, mode: Mode) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, _ = tensors_of(conv, setting, mode)
    return setting.normal(setting.batch, conv.maps, conv.out_size, conv.out_size, mode=mode), x, weight


def data_gradient(conv: Conv, setting: Setting, mode: Mode) -> Built:
    grad, x, weight = _gradient_tensors(conv, setting, mode)
    slide = conv.stride, conv.padding, conv.output_padding, conv.groups
    return Built(
        [
            *ours(partial(ops.deconv2d, gate="none"), [grad, weight, None, *slide]),
            *torch_ways(setting, partial(_gradients, conv, True), [grad, x, weight], mode),
        ],
        lambda: Outputs([_gradients(conv, True, grad[:1].double(), x[:1].double(), weight.double())]),
    )


def weight_gradient(conv: Conv, setting: Setting, mode: Mode) -> Built:
    grad, x, weight = _gradient_tensors(conv, setting, mode)
    filters = Filters([conv.stride] * 2, [conv.padding] * 2, [1, 1], conv.groups)

    def call(image: Tensor, signal: Tensor, weight: Tensor) -> Tensor:
        return conv2d_weight_gradient(image, signal, None, weight, filters, "none", False)[0]

    return Built(
        [
            *ours(call, [x, grad, weight]),
            *torch_ways(setting, partial(_gradients, conv, False), [grad, x, weight], mode),
        ],
        lambda: Outputs([_gradients(conv, False, grad.double(), x.double(), weight.double())]),
    )
