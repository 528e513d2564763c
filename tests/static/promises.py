"""What each product promises of its main loop: the one place where a share is stated, for the tests and the documents.

A kernel whose main loop is a product must be named here; the first pattern that its name matches holds. The figures are
the least over all architectures, by the compiler of build.NVCC_PACKAGES.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Product:
    """A main loop's least share of multiply-adds in what it issues, and multiply-adds for each shared load.

    ``reason`` says why a product converts between formats, or copies asynchronously by less than 16 bytes, in its loop.
    """

    kernel: str
    share: float
    per_shared_load: float
    converts: str = ""
    copies_narrow: str = ""


def _conv(tile: str, how: str) -> str:
    """The products of tap_product.cuh on a tensor; ``how``: NHWC, channels of a load."""
    return (
        rf"tap_gemm_kernel<\w+, Tile<{tile}>, \w+, {how}, TensorSource<\w+> >$"
        rf"|conv2d_relu_max_pool2d_kernel<\w+, Tile<{tile}>, {how}>$"
    )


def _gathered(tile: str, how: str) -> str:
    """The same on an unpooled source. The gathering in the loop counts whole, unrolled: a poor lower bound."""
    return rf"tap_gemm_kernel<\w+, Tile<{tile}>, true, {how}, UnpooledSource<\w+> >$"


PRODUCTS = [
    Product(_conv("float, 128, 64", "false, 1"), 0.39, 10.6),
    Product(_conv("float, 128, 64", "true, 1"), 0.47, 6.4),
    Product(_conv("float, 128, 64", "true, 4"), 0.58, 9.1),
    Product(_conv("float, 256, 16", "false, 1"), 0.16, 8.0),
    Product(_conv("float, 256, 16", "true, 1"), 0.21, 2.6),
    Product(_conv("float, 256, 16", "true, 4"), 0.35, 5.3),
    Product(_conv("double, 64, 64", r"\w+, 1"), 0.14, 3.2),
    Product(_gathered("float, 128, 64", r"\w+, 1"), 0.07, 6.4),
    Product(_gathered("float, 128, 64", "true, 4"), 0.21, 9.8),
    Product(_gathered("float, 256, 16", r"\w+, 1"), 0.02, 2.6),
    Product(_gathered("float, 256, 16", "true, 4"), 0.06, 6.4),
    Product(_gathered("double, 64, 64", r"\w+, 1"), 0.05, 3.2),
    Product("weight_gradient_kernel<float, false, 1>", 0.32, 5.3),
    Product("weight_gradient_kernel<float, true, 1>", 0.24, 6.9),
    Product("weight_gradient_kernel<float, true, 4>", 0.52, 7.5),
    Product("weight_gradient_kernel<double", 0.13, 3.2),
]

#: Kernels that are compiled for vectors and yet load them by less than 16 bytes, and why.
NARROW = {
    "max_unpool2d_kernel<float, 4>": "sm_100, 120: nvcc loads halves of a pack, as some values are not wanted",
    "window_maps_kernel<float, 4>": "likewise",
}


def product(name: str) -> Product | None:
    """What the kernel of this name promises."""
    return next((p for p in PRODUCTS if re.match(p.kernel, name)), None)
