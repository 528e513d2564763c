"""The operators on ZFNet's layers beside torch's way to the same result, and what a call costs before any work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zfcuda import ops
from zfcuda.bench.case import MODES, Built, Case, Contender, Mode, Outputs, Setting
from zfcuda.bench.rivals import ours, runtimes, torch_ways
from zfcuda.bench.shapes import CONVOLUTIONS, NORMS, POOLED, POOLS, Conv, Map

POOL = 3, 2  # the paper's
CONSTANTS = 5, 5e-4, 0.75, 2.0  # of its normalisation


def cases(setting: Setting, modes: list[Mode]) -> Iterator[Case]:
    """Quick ones: the first layer, which takes the longest, of each kind."""
    batch = setting.batch
    for mode in modes:
        size = mode.dtype.itemsize
        for layer in POOLS:
            quick, maps = layer is POOLS[0], batch * layer.channels * layer.size**2
            pooled = batch * layer.channels * layer.pooled_size**2
            case = partial(Case, "operators", mode=mode, quick=quick)
            name = layer.name
            yield case(f"max_pool2d {name}", build=partial(pool, layer), bytes=size * (maps + pooled) + pooled)
            rectified = partial(pool, layer, rectify=True)
            yield case(f"relu_max_pool2d {name}", build=rectified, bytes=size * (maps + pooled) + pooled)
            alone = partial(case, bytes=size * (maps + pooled))
            yield alone(f"max_pool2d {name} maxima alone", build=partial(maxima, layer))
            yield alone(f"max_pool2d {name} maxima alone backward too", build=partial(maxima, layer, backward=True))
            yield case(f"max_unpool2d {name}", build=partial(unpool, layer), bytes=size * (maps + pooled) + pooled)
            yield case(f"switch_gather {name}", build=partial(gather, layer), bytes=(2 * size + 1) * pooled)
        for layer in NORMS:
            maps = batch * layer.channels * layer.size**2
            case = partial(Case, "operators", mode=mode, quick=layer is NORMS[0])
            name = f"local_response_norm {layer.name}"
            yield case(name, build=partial(norm, layer), bytes=2 * size * maps)
            yield case(f"{name} backward too", build=partial(norm, layer, backward=True), bytes=5 * size * maps)
        for conv in CONVOLUTIONS:
            case = partial(Case, "operators", mode=mode, quick=conv is CONVOLUTIONS[0])
            flops, tensors = conv.flops(batch), size * conv.elements(batch)
            yield case(f"deconv2d {conv.name}", build=partial(deconv, conv), flops=flops, bytes=tensors)
        for conv, layer in POOLED.items():
            case = partial(Case, "operators", mode=mode, quick=conv is CONVOLUTIONS[0])
            pooled = batch * layer.channels * layer.pooled_size**2
            least = size * (pooled + conv.weights + conv.inputs(batch)) + pooled
            step = partial(unpool_deconv, conv)
            yield case(f"unpool_relu_deconv2d {conv.name}", build=step, flops=conv.flops(batch), bytes=least)
    for conv in CONVOLUTIONS:
        case = partial(Case, "operators", mode=MODES["ieee"], quick=conv is CONVOLUTIONS[0])
        yield case(f"renormalize_filters_ {conv.name}", build=partial(renormalise, conv), bytes=8 * conv.weights)
    for name in CALLS:
        yield Case("calls", name, MODES["ieee"], partial(small, name), unit="call of a 4 x 4 image")


# ---------------------------------------------------------------- pools


def torch_pool(x: Tensor) -> tuple[Tensor, Tensor]:
    return F.max_pool2d(x, *POOL, ceil_mode=True, return_indices=True)


def pooled_outputs(result: tuple[Tensor, Tensor]) -> Outputs:
    """Of torch's pool."""
    return Outputs([result[0]], result[1])


def switched_outputs(size: int, result: tuple[Tensor, Tensor]) -> Outputs:
    """Of ours."""
    return Outputs([result[0]], ops.switches_to_indices(result[1], (size, size), *POOL))


def pooled_reference(maps: Tensor) -> Outputs:
    values, indices = torch_pool(maps.double())
    return Outputs([values], indices, maps.double())


def pool(layer: Map, setting: Setting, mode: Mode, rectify: bool = False) -> Built:
    x = setting.normal(setting.batch, layer.channels, layer.size, layer.size, mode=mode)
    call = partial(ops.relu_max_pool2d if rectify else ops.max_pool2d, ceil_mode=True)

    def theirs(t: Tensor) -> tuple[Tensor, Tensor]:
        return torch_pool(t.relu() if rectify else t)

    read = partial(switched_outputs, layer.size)
    out = (lambda result: result) if rectify else None
    return Built(
        [
            *ours(call, [x, *POOL], read, out),
            *torch_ways(setting, theirs, [x], mode, pooled_outputs),
        ],
        lambda: pooled_reference(x[:1].relu() if rectify else x[:1]),
    )


def maxima(layer: Map, setting: Setting, mode: Mode, backward: bool = False) -> Built:
    """Where nobody asks for switches: the choice of ``zfcuda.nn.fastest_max_pool2d``."""
    x = setting.normal(setting.batch, layer.channels, layer.size, layer.size, mode=mode)
    grad = setting.normal(setting.batch, layer.channels, layer.pooled_size, layer.pooled_size, mode=mode)

    def step(function: Callable[..., Tensor], t: Tensor, by: Tensor) -> Any:
        if not backward:
            return function(t)
        t = t.detach().requires_grad_()
        return torch.autograd.grad(function(t), t, by)

    def mine(t: Tensor) -> Tensor:
        return ops.max_pool2d(t, *POOL, ceil_mode=True)[0]

    def theirs(t: Tensor) -> Tensor:
        return F.max_pool2d(t, *POOL, ceil_mode=True)

    return Built(
        [*ours(partial(step, mine), [x, grad]), *torch_ways(setting, partial(step, theirs), [x, grad], mode)],
        lambda: Outputs.of(step(theirs, x[:1].double(), grad[:1].double())),
    )


def torch_unpool(pooled: Tensor, maps: Tensor, indices: Tensor) -> Tensor:
    """The sum where windows overlap: torch's backward pass of its pool, which reads the size of the maps."""
    back = torch.ops.aten.max_pool2d_with_indices_backward
    return back(pooled, maps, [3, 3], [2, 2], [0, 0], [1, 1], True, indices)


def pooled_maps(setting: Setting, layer: Map, mode: Mode) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rectified maps, their pool, its switches and torch's indices."""
    maps = setting.normal(setting.batch, layer.channels, layer.size, layer.size, mode=mode).relu()
    pooled, indices = torch_pool(maps)
    switches = ops.indices_to_switches(indices, maps.shape, *POOL)
    return maps, pooled, switches, indices


def unpool(layer: Map, setting: Setting, mode: Mode) -> Built:
    maps, pooled, switches, indices = pooled_maps(setting, layer, mode)
    call = partial(ops.max_unpool2d, output_size=maps.shape[2:])
    return Built(
        [
            *ours(call, [pooled, switches, *POOL]),
            *torch_ways(setting, torch_unpool, [pooled, maps, indices], mode),
        ],
        lambda: Outputs([torch_unpool(pooled[:1].double(), maps[:1].double(), indices[:1])]),
    )


def gather(layer: Map, setting: Setting, mode: Mode) -> Built:
    maps, _, switches, indices = pooled_maps(setting, layer, mode)

    def theirs(x: Tensor, where: Tensor) -> Tensor:
        return x.flatten(2).gather(2, where.flatten(2)).view(where.shape)

    return Built(
        [
            *ours(ops.switch_gather, [maps, switches, *POOL], out=lambda result: result),
            *torch_ways(setting, theirs, [maps, indices.contiguous()], mode),
        ],
        lambda: Outputs([theirs(maps[:1].double(), indices[:1])]),
    )


# ---------------------------------------------------------------- normalisation


def norm(layer: Map, setting: Setting, mode: Mode, backward: bool = False) -> Built:
    x = setting.normal(setting.batch, layer.channels, layer.size, layer.size, mode=mode).relu()
    grad = setting.normal(*x.shape[:3], x.shape[3] + 1, mode=mode)[..., 1:].contiguous()

    def step(function: Callable[..., Tensor], t: Tensor, by: Tensor) -> Any:
        if not backward:
            return function(t, *CONSTANTS)
        t = t.detach().requires_grad_()
        return torch.autograd.grad(function(t, *CONSTANTS), t, by)

    contenders = [
        *ours(partial(step, ops.local_response_norm), [x, grad]),
        *torch_ways(setting, partial(step, F.local_response_norm), [x, grad], mode),
    ]
    if not backward:
        contenders += runtimes(setting, nn.Sequential(nn.LocalResponseNorm(*CONSTANTS)), x, mode)
    exact = partial(step, F.local_response_norm)
    return Built(contenders, lambda: Outputs.of(exact(x[:1].double(), grad[:1].double())))


# ---------------------------------------------------------------- the way down


def deconv(conv: Conv, setting: Setting, mode: Mode) -> Built:
    signal = setting.normal(setting.batch, conv.maps, conv.out_size, conv.out_size, mode=mode)
    weight = setting.normal(*conv.weight_shape, mode=mode)
    slide = conv.stride, conv.padding, conv.output_padding

    def theirs(s: Tensor, w: Tensor) -> Tensor:
        return F.conv_transpose2d(s.relu(), w, None, *slide)

    return Built(
        [
            *ours(ops.deconv2d, [signal, weight, None, *slide]),
            *torch_ways(setting, theirs, [signal, weight], mode),
        ],
        lambda: Outputs([theirs(signal[:1].double(), weight.double())]),
    )


def unpool_deconv(conv: Conv, setting: Setting, mode: Mode) -> Built:
    maps, pooled, switches, indices = pooled_maps(setting, Map("", conv.maps, conv.out_size), mode)
    weight = setting.normal(*conv.weight_shape, mode=mode)
    slide = conv.stride, conv.padding, conv.output_padding
    window: dict[str, Any] = {
        "pool_kernel_size": 3,
        "pool_stride": 2,
        "pool_output_size": (conv.out_size, conv.out_size),
    }

    def theirs(p: Tensor, m: Tensor, i: Tensor, w: Tensor) -> Tensor:
        return F.conv_transpose2d(torch_unpool(p, m, i).relu_(), w, None, *slide)

    call = partial(ops.unpool_relu_deconv2d, **window)
    return Built(
        [
            *ours(call, [pooled, switches, weight, None, *slide], out=lambda result: result),
            *torch_ways(setting, theirs, [pooled, maps, indices, weight], mode),
        ],
        lambda: Outputs([theirs(pooled[:1].double(), maps[:1].double(), indices[:1], weight.double())]),
    )


# ---------------------------------------------------------------- filters, calls


def renormalise(conv: Conv, setting: Setting, mode: Mode) -> Built:
    """In place; from the second call on all filters are within the constraint, for all contenders alike."""
    weight = 0.05 * setting.normal(*conv.weight_shape, mode=mode)

    def theirs(w: Tensor) -> Tensor:
        rms = torch.linalg.vector_norm(w, dim=(1, 2, 3), keepdim=True) / w[0].numel() ** 0.5
        return w.mul_((0.04 / rms).clamp(max=1.0))

    return Built(
        [
            Contender(
                "zfcuda", lambda: partial(ops.renormalize_filters_, weight.clone(), 0.04), ours=True, family="zfcuda"
            ),
            Contender("torch eager", lambda: partial(theirs, weight.clone())),
        ],
        lambda: Outputs([theirs(weight.double())]),
    )


def _small() -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=draw) for shape in ((1, 1, 4, 4), (1, 1, 3, 3), (1,)))  # type: ignore[return-value]


CALLS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "conv2d_relu": (ops.conv2d_relu, lambda x, w, b: F.conv2d(x, w, b).relu_()),
    "deconv2d": (ops.deconv2d, lambda x, w, b: F.conv_transpose2d(x.relu(), w, b)),
    "max_pool2d": (lambda x, w, b: ops.max_pool2d(x, 2)[0], lambda x, w, b: F.max_pool2d(x, 2, return_indices=True)[0]),
    "local_response_norm": (
        lambda x, w, b: ops.local_response_norm(x, 5),
        lambda x, w, b: F.local_response_norm(x, 5),
    ),
}


def small(name: str, setting: Setting, mode: Mode) -> Built:
    tensors = [t.to(setting.device) for t in _small()]
    mine, theirs = CALLS[name]
    return Built(
        [
            Contender("zfcuda", lambda: partial(mine, *tensors), ours=True, family="zfcuda"),
            Contender("torch eager", lambda: partial(theirs, *tensors)),
        ],
        lambda: Outputs.of(theirs(*(t.double() for t in tensors))),
    )
