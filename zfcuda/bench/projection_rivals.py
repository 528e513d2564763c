"""Other ways to project activations of ZFNet to pixels: captum, and two that one would write in plain torch.

Each is timed in the format and batch that suits it best. They are given every advantage: int64 switches ready on the
right scale, the first step as a slice of the filters, crops without clipping at the image's border (where their results
are wrong, therefore).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from zfcuda.bench.nets import torch_twin
from zfcuda.bench.rivals import need
from zfcuda.deconv import Record
from zfcuda.models import ZFNet

#: Of the convolutions of ZFNet: stride, padding and output_padding of the transposed convolution.
SLIDES = {1: (2, 1, 1), 2: (2, 0, 0), 3: (1, 1, 0), 4: (1, 1, 0), 5: (1, 1, 0)}
POOLED = {1: "pool1", 2: "pool2"}  # what follows a convolution


@dataclass
class Activations:
    """A sample of a layer's strongest activations with the images that they were found in."""

    net: ZFNet
    layer: int
    images: Tensor  # (n, 3, 224, 224)
    record: Record  # of the images
    units: Tensor
    positions: Tensor
    values: Tensor
    windows: dict[str, Tensor] = field(default_factory=dict)  # switches by pool, uint8 (n, h, w, C)

    def weight(self, layer: int) -> Tensor:
        return self.net.get_parameter(f"conv{layer}.weight").detach()

    def first_step(self) -> Tensor:
        """The filters of the units, times the activations: the signal below the layer."""
        return self.weight(self.layer)[self.units] * self.values[:, None, None, None]


def in_float64(sample: Activations) -> Activations:
    """The same activations and switches, so that `dense` computes in float64."""
    record = sample.record
    maps = {name: map_.double() for name, map_ in record.maps.items()}
    return replace(
        sample,
        net=copy.deepcopy(sample.net).double(),
        record=Record(record.images, maps, record.switches, record.logits),
        values=sample.values.double(),
    )


def _unpool(signal: Tensor, indices: Tensor, below: Tensor) -> Tensor:
    """Sums where windows overlap: torch's backward pass of its pool; `below` gives the size."""
    back = torch.ops.aten.max_pool2d_with_indices_backward
    return back(signal, below, [3, 3], [2, 2], [0, 0], [1, 1], True, indices)


def dense(sample: Activations, channels_last: bool) -> Callable[[], Tensor]:
    """Whole maps in plain torch, all activations of the sample as one batch."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    maps, indices = {}, {}
    for name in POOLED.values():
        map_ = sample.record.maps[name.replace("pool", "conv")].contiguous(memory_format=layout)
        maps[name] = map_
        indices[name] = F.max_pool2d(map_, 3, 2, ceil_mode=True, return_indices=True)[1].contiguous(
            memory_format=layout
        )

    def project() -> Tensor:
        signal = _placed(sample).contiguous(memory_format=layout)
        for layer in range(sample.layer - 1, 0, -1):
            if layer in POOLED:
                name = POOLED[layer]
                signal = _unpool(signal.contiguous(memory_format=layout), indices[name], maps[name])
            stride, padding, more = SLIDES[layer]
            signal = F.conv_transpose2d(signal.relu(), sample.weight(layer), None, stride, padding, more)
        return signal

    return project


def _placed(sample: Activations) -> Tensor:
    """The first step in the whole map below."""
    stride, padding, _ = SLIDES[sample.layer]
    below = {1: (3, 224), 2: (96, 55), 3: (256, 13), 4: (384, 13), 5: (384, 13)}[sample.layer]
    kernel = sample.weight(sample.layer).shape[-1]
    whole = sample.values.new_zeros(len(sample.units), below[0], *(below[1] + 2 * padding + kernel,) * 2)
    for i, (filter_, (y, x)) in enumerate(zip(sample.first_step(), sample.positions.tolist(), strict=True)):
        whole[i, :, y * stride : y * stride + kernel, x * stride : x * stride + kernel] = filter_
    return whole[:, :, padding : padding + below[1], padding : padding + below[1]]


def crops(sample: Activations, channels_last: bool) -> Callable[[], Tensor]:
    """Receptive fields alone in plain torch, all activations of the sample as one batch."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    below, indices = {}, {}
    for name, switches in sample.windows.items():
        taps = switches.permute(0, 3, 1, 2).long().clamp(max=8)  # 255, outside the map, goes to any place
        side = 2 * taps.shape[2] + 1
        corner = 2 * torch.arange(taps.shape[2], device=taps.device)
        flat = (corner[:, None] + taps // 3) * side + corner + taps % 3
        indices[name] = flat.contiguous(memory_format=layout)
        below[name] = sample.values.new_empty(*taps.shape[:2], side, side).contiguous(memory_format=layout)

    def project() -> Tensor:
        signal = sample.first_step()
        for layer in range(sample.layer - 1, 0, -1):
            signal = signal.contiguous(memory_format=layout)
            if layer in POOLED:
                signal = _unpool(signal, indices[POOLED[layer]], below[POOLED[layer]])
            signal = F.conv_transpose2d(signal.relu(), sample.weight(layer), None, SLIDES[layer][0])
        return signal

    return project


def captum(sample: Activations) -> Callable[[], Tensor]:
    """captum's NeuronDeconvolution, all activations of the sample as one batch."""
    attribution = need("captum.attr", "captum")
    net = torch_twin(sample.net)
    each = torch.arange(len(sample.units))
    method = attribution.NeuronDeconvolution(net, net.get_submodule(f"relu{sample.layer}"))

    def neurons(map_: Tensor) -> Tensor:
        return map_[each, sample.units, sample.positions[:, 0], sample.positions[:, 1]]

    images = sample.images.clone().requires_grad_()
    return lambda: method.attribute(images, neuron_selector=neurons)
