"""Slow, plain torch oracles of every operator, in any floating-point dtype.

Each says what its operator in :mod:`zfcuda.ops` computes in the fewest words, without the compiled core and
without torch's own convolution or pool, and differentiates through torch's autograd. Arguments are those of
the operators, unchecked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Size = int | Sequence[int]


def conv2d_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> Tensor:
    """Oracle of :func:`zfcuda.ops.conv2d_relu`."""
    kernel, stride, padding, dilation = weight.shape[2:], _pair(stride), _pair(padding), _pair(dilation)
    size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(input.shape[2:], kernel, stride, padding, dilation, strict=True)
    ]
    y, x = _taps(size, kernel, stride, padding, dilation)
    windows, _ = _read(input, y, x)
    windows = windows.unflatten(1, (groups, -1))
    maps = torch.einsum("ngiyxhw,goihw->ngoyx", windows, weight.unflatten(0, (groups, -1))).flatten(1, 2)
    if bias is not None:
        maps = maps + bias[:, None, None]
    return _keep(maps, maps)


def conv2d_relu_max_pool2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    pool_kernel_size: Size,
    pool_stride: Size | None = None,
    pool_padding: Size = 0,
    pool_dilation: Size = 1,
    pool_ceil_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    """Oracle of :func:`zfcuda.ops.conv2d_relu_max_pool2d`."""
    maps = conv2d_relu(input, weight, bias, stride, padding, dilation, groups)
    return max_pool2d(maps, pool_kernel_size, pool_stride, pool_padding, pool_dilation, pool_ceil_mode)


def conv2d_relu_max_pool2d_maximum(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    dilation: Size = 1,
    groups: int = 1,
    **pool: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Oracle of :func:`zfcuda.ops.conv2d_relu_max_pool2d_maximum`, for maps without NaN."""
    maps = conv2d_relu(input, weight, bias, stride, padding, dilation, groups)
    return *max_pool2d(maps, **_options(pool, "pool_")), *map_maximum(maps)


def conv2d_relu_max_pool2d_norm(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    dilation: Size = 1,
    groups: int = 1,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Oracle of :func:`zfcuda.ops.conv2d_relu_max_pool2d_norm`."""
    pool, norm = _options(options, "pool_"), _options(options, "norm_")
    pooled, switches = max_pool2d(conv2d_relu(input, weight, bias, stride, padding, dilation, groups), **pool)
    return local_response_norm(pooled, **norm), switches


def deconv2d(
    signal: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
    *,
    gate: str = "deconvnet",
    forward: Tensor | None = None,
) -> Tensor:
    """Oracle of :func:`zfcuda.ops.deconv2d`."""
    kernel, stride, padding, dilation = weight.shape[2:], _pair(stride), _pair(padding), _pair(dilation)
    if gate in ("deconvnet", "guided"):
        signal = _keep(signal, signal)
    if forward is not None:
        signal = _keep(signal, forward)
    size = [
        (n - 1) * s - 2 * p + d * (k - 1) + o + 1
        for n, k, s, p, d, o in zip(
            signal.shape[2:], kernel, stride, padding, dilation, _pair(output_padding), strict=True
        )
    ]
    windows = torch.einsum(
        "ngoyx,goihw->ngiyxhw", signal.unflatten(1, (groups, -1)), weight.unflatten(0, (groups, -1))
    ).flatten(1, 2)
    y, x = _taps(signal.shape[2:], kernel, stride, padding, dilation)
    image = _add(windows, y, x, size)
    return image if bias is None else image + bias[:, None, None]


def max_pool2d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    """Oracle of :func:`zfcuda.ops.max_pool2d`."""
    kernel, stride, padding, dilation = _pool(kernel_size, stride, padding, dilation)
    size = []
    for n, k, s, p, d in zip(input.shape[2:], kernel, stride, padding, dilation, strict=True):
        # Every window that fits; with ceil_mode the next one too, if it starts before the right padding
        # and the last one that fits leaves a position over.
        count = sum(start + d * (k - 1) < n + p for start in range(-p, n + p, s))
        left_over = n + p - ((count - 1) * s - p + d * (k - 1) + 1)
        size.append(count + int(ceil_mode and left_over > 0 and count * s - p < n))
    y, x = _taps(size, kernel, stride, padding, dilation)
    windows, inside = _read(input, y, x)
    windows, inside = windows.flatten(4), inside.expand(windows.shape).flatten(4)
    position = torch.arange(windows.size(-1), device=input.device).expand(windows.shape)
    largest = windows.masked_fill(~inside, -torch.inf).amax(-1, keepdim=True)
    first = position.where(inside & (windows == largest), position.size(-1)).amin(-1)
    last_nan = position.where(inside & windows.isnan(), -1).amax(-1)
    switches = last_nan.where(last_nan >= 0, first)
    return windows.gather(-1, switches[..., None]).squeeze(-1), switches.to(torch.uint8)


def relu_max_pool2d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    """Oracle of :func:`zfcuda.ops.relu_max_pool2d`."""
    return max_pool2d(_keep(input, input), kernel_size, stride, padding, dilation, ceil_mode)


def max_unpool2d(
    input: Tensor,
    switches: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    output_size: Sequence[int] | None = None,
    overlap: str = "sum",
) -> Tensor:
    """Oracle of :func:`zfcuda.ops.max_unpool2d`."""
    kernel, stride, padding, dilation = _pool(kernel_size, stride, padding, dilation)
    if output_size is None:
        output_size = [
            (n - 1) * s - 2 * p + d * (k - 1) + 1
            for n, k, s, p, d in zip(input.shape[2:], kernel, stride, padding, dilation, strict=True)
        ]
    height, width = output_size[-2:]
    indices = switches_to_indices(switches, (height, width), kernel, stride, padding, dilation).flatten(2)
    values = input.flatten(2)
    if overlap == "overwrite":
        last = torch.full((*input.shape[:2], height * width), -1, device=input.device)
        for window in range(indices.size(2)):
            last.scatter_(2, indices[:, :, window : window + 1], window)
        winners = last.gather(2, indices) == torch.arange(indices.size(2), device=input.device)
        values = torch.where(winners, values, 0)
    output = values.new_zeros(*input.shape[:2], height * width).scatter_add(2, indices, values)
    return output.unflatten(2, (height, width))


def unpool_relu_deconv2d(
    signal: Tensor,
    switches: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
    *,
    pool_kernel_size: Size,
    pool_stride: Size | None = None,
    pool_padding: Size = 0,
    pool_dilation: Size = 1,
    pool_output_size: Sequence[int] | None = None,
    overlap: str = "sum",
    gate: str = "deconvnet",
    forward: Tensor | None = None,
) -> Tensor:
    """Oracle of :func:`zfcuda.ops.unpool_relu_deconv2d`."""
    if forward is not None:
        signal = _keep(signal, forward)
    pool = pool_kernel_size, pool_stride, pool_padding, pool_dilation, pool_output_size, overlap
    maps = max_unpool2d(signal, switches, *pool)
    rest = {"backprop": "none", "guided": "deconvnet"}.get(gate, gate)
    return deconv2d(maps, weight, bias, stride, padding, output_padding, groups, dilation, gate=rest)


def switch_gather(
    input: Tensor,
    switches: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
) -> Tensor:
    """Oracle of :func:`zfcuda.ops.switch_gather`."""
    indices = switches_to_indices(switches, input.shape[2:], kernel_size, stride, padding, dilation)
    return input.flatten(2).gather(2, indices.flatten(2)).view(switches.shape)


def switches_to_indices(
    switches: Tensor,
    input_size: Sequence[int],
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
) -> Tensor:
    """Oracle of :func:`zfcuda.ops.switches_to_indices`."""
    kernel, stride, padding, dilation = _pool(kernel_size, stride, padding, dilation)
    y, x = (taps.to(switches.device) for taps in _taps(switches.shape[2:], kernel, stride, padding, dilation))
    flat = (y * input_size[-1] + x).flatten(2)
    return flat.expand(*switches.shape, -1).gather(-1, switches.long()[..., None]).squeeze(-1)


def local_response_norm(input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Tensor:
    """Oracle of :func:`zfcuda.ops.local_response_norm`."""
    maps = []
    for c in range(input.size(1)):
        near = input[:, max(c - size // 2, 0) : c + (size - 1) // 2 + 1]
        maps.append(input[:, c] / (k + alpha / size * near.square().sum(1)) ** beta)
    return torch.stack(maps, 1)


def renormalize_filters_(weight: Tensor, max_rms: float) -> Tensor:
    """Oracle of :func:`zfcuda.ops.renormalize_filters_`."""
    with torch.no_grad():
        for i in range(len(weight)):
            rms = weight[i].square().mean().sqrt()
            if max_rms < rms < torch.inf:
                weight[i] *= max_rms / rms
    return weight


def window_deconv2d(
    signal: Tensor,
    weight: Tensor,
    origins: Tensor,
    map_size: Sequence[int],
    stride: Size = 1,
    dilation: Size = 1,
    groups: int = 1,
    *,
    gate: str = "none",
    positive: Tensor | None = None,
    switches: Tensor | None = None,
    pool: Sequence[Size] | None = None,
) -> Tensor:
    """Oracle of :func:`zfcuda.ops.window_deconv2d`."""
    maps = signal.movedim(3, 1)
    if pool is not None and switches is not None:
        kernel, step, spread = map(_pair, pool)
        size = [(n - 1) * s + (k - 1) * d + 1 for n, k, s, d in zip(maps.shape[2:], kernel, step, spread, strict=True)]
        taps = torch.arange(kernel[0] * kernel[1], device=switches.device)
        chosen = switches.movedim(3, 1)[..., None] == taps
        windows = torch.where(chosen, maps[..., None], 0).unflatten(4, kernel)
        maps = _add(windows, *_taps(maps.shape[2:], kernel, step, (0, 0), spread), size)
    forward = None
    if positive is not None:
        bits = positive[..., None] >> torch.arange(8, device=positive.device) & 1
        forward = bits.flatten(3).movedim(3, 1)[:, : maps.size(1)]
    image = deconv2d(maps, weight, None, stride, 0, 0, groups, dilation, gate=gate, forward=forward)
    _, _, inside = _windows(origins, image.shape[2:], map_size)
    return torch.where(inside[:, None], image, 0).movedim(1, 3)


def crop_windows(input: Tensor, images: Tensor, origins: Tensor, size: Size, fill: int = 0) -> Tensor:
    """Oracle of :func:`zfcuda.ops.crop_windows`."""
    y, x, inside = _windows(origins, _pair(size), input.shape[1:3])
    inner = input[images[:, None, None], y.clamp(0, input.size(1) - 1), x.clamp(0, input.size(2) - 1)]
    pixel = inner.contiguous().view(torch.uint8)
    return torch.where(inside[..., None], pixel, fill).view(input.dtype)


def map_maximum(
    input: Tensor,
    pooled: Tensor | None = None,
    switches: Tensor | None = None,
    kernel_size: Size = 1,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
) -> tuple[Tensor, Tensor]:
    """Oracle of :func:`zfcuda.ops.map_maximum`, from the input alone: without NaN the pool says the same."""
    maps = input.flatten(2).nan_to_num(-torch.inf, torch.inf, -torch.inf)
    largest = maps.amax(2, keepdim=True)
    places = torch.arange(maps.size(2), device=input.device).where(maps == largest, maps.size(2))
    return largest.squeeze(2), places.amin(2)


def _windows(origins: Tensor, size: Sequence[int], whole: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (windows, h, 1) and columns (windows, 1, w) of each window, and which positions are inside the whole."""
    y = origins[:, 0, None, None] + torch.arange(size[0], device=origins.device)[:, None]
    x = origins[:, 1, None, None] + torch.arange(size[1], device=origins.device)
    return y, x, (y >= 0) & (y < whole[0]) & (x >= 0) & (x < whole[1])


def _pool(kernel_size: Size, stride: Size | None, padding: Size, dilation: Size) -> list[tuple[int, int]]:
    """The arguments of a pool as pairs."""
    return [_pair(value) for value in (kernel_size, kernel_size if stride is None else stride, padding, dilation)]


def _pair(value: Size) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _options(given: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Those whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): value for name, value in given.items() if name.startswith(prefix)}


def _keep(value: Tensor, test: Tensor) -> Tensor:
    """``value``, zero where ``test <= 0``: NaN passes."""
    return torch.where(test <= 0, 0, value)


def _taps(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Rows (out_h, 1, kernel_h, 1) and columns (1, out_w, 1, kernel_w) that each window reads."""
    rows, columns = (
        torch.arange(n)[:, None] * s - p + torch.arange(k) * d
        for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    )
    return rows[:, None, :, None], columns[None, :, None, :]


def _read(image: Tensor, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Every window of the image, (batch, channels, out_h, out_w, kernel_h, kernel_w), zero outside; where inside."""
    y, x = y.to(image.device), x.to(image.device)
    height, width = image.shape[2:]
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    return image[:, :, y.clamp(0, height - 1), x.clamp(0, width - 1)].where(inside, 0), inside


def _add(windows: Tensor, y: Tensor, x: Tensor, size: Sequence[int]) -> Tensor:
    """The transpose of :func:`_read`: an image of height and width ``size``."""
    y, x = y.to(windows.device), x.to(windows.device)
    inside = (y >= 0) & (y < size[0]) & (x >= 0) & (x < size[1])
    flat = torch.where(inside, y * size[1] + x, size[0] * size[1]).flatten()
    image = windows.new_zeros(*windows.shape[:2], size[0] * size[1] + 1).index_add(2, flat, windows.flatten(2))
    return image[:, :, :-1].unflatten(2, tuple(size))
