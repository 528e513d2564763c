"""Convolutions with groups, and contiguous ones of few channels, against torch eager: forward, and each gradient."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from conftest import BATCH, rivals

from zfcuda import ops


@dataclass(frozen=True)
class Shape:
    channels: int
    maps: int
    groups: int
    size: int
    kernel: int
    stride: int = 1

    @property
    def out_size(self) -> int:
        return (self.size + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1

    def flops(self) -> int:
        return 2 * BATCH * self.maps * self.out_size**2 * self.channels // self.groups * self.kernel**2


SHAPES = {
    "depthwise 32 at 112": Shape(32, 32, 32, 112, 3),
    "depthwise 96 at 112, stride 2": Shape(96, 96, 96, 112, 3, 2),
    "depthwise 144 at 56": Shape(144, 144, 144, 56, 3),
    "depthwise 384 at 14": Shape(384, 384, 384, 14, 3),
    "depthwise 96 at 28, 7x7": Shape(96, 96, 96, 28, 7),
    "32 groups of 4 at 56": Shape(128, 128, 32, 56, 3),
    "32 groups of 8 at 28": Shape(256, 256, 32, 28, 3),
    "8 groups of 16 at 28": Shape(128, 128, 8, 28, 3),
    "2 groups, 96 to 256 at 27": Shape(96, 256, 2, 27, 5),
    "3 to 64 at 224": Shape(3, 64, 1, 224, 3),
    "64 to 64 at 56": Shape(64, 64, 1, 56, 3),
}


@pytest.mark.parametrize("what", ["forward", "by input", "by weight"])
@pytest.mark.parametrize("name", SHAPES)
def bench_convolution(compare, device: torch.device, layout: torch.memory_format, name: str, what: str) -> None:
    shape = SHAPES[name]
    x = torch.randn(BATCH, shape.channels, shape.size, shape.size, device=device).contiguous(memory_format=layout)
    weight = torch.randn(shape.maps, shape.channels // shape.groups, shape.kernel, shape.kernel, device=device)
    slide = shape.stride, shape.kernel // 2, 1, shape.groups

    def ours(image, filters):
        return ops.conv2d_relu(image, filters, None, *slide)

    def torchs(image, filters):
        return F.conv2d(image, filters, None, *slide).relu_()

    def prepared(function, image):
        if what == "forward":
            return lambda: function(image, weight)
        leaf = (image if what == "by input" else weight).clone(memory_format=torch.preserve_format).requires_grad_()
        output = function(leaf, weight) if what == "by input" else function(image, leaf)
        cotangent = torch.ones_like(output)
        return lambda: torch.autograd.grad(output, leaf, cotangent, retain_graph=True)

    calls = {}

    def rival(image):
        return calls.setdefault(image.data_ptr(), prepared(torchs, image))()

    compare(
        prepared(ours, x),
        rivals(rival, x),
        bytes=4 * (x.numel() + weight.numel() + BATCH * shape.maps * shape.out_size**2),
        flops=shape.flops(),
    )
