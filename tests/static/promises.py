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

    ``round`` is the least share in the shortest round of the loop, of those that promise one; ``bare`` in the shortest
    one that brings nothing, of those whose factors may all lie in shared memory before. ``converts`` and
    ``copies_narrow`` say why a product converts between formats, or copies asynchronously by less than 16 bytes, in its
    loop.
    """

    kernel: str
    share: float
    per_shared_load: float
    round: float = 0.0
    bare: float = 0.0
    converts: str = ""
    copies_narrow: str = ""


#: Sources that gather count whole in the loop, and so does what a loop does once in many chunks, where it enters a tap:
#: their shares are poor lower bounds.
_SPLIT = "factors are split into two tf32 in registers"


def _conv(tile: str, how: str) -> str:
    """The products of tap_product.cuh on a tensor; ``how``: NHWC, channels of a load."""
    return (
        rf"tap_gemm_kernel<\w+, Tile<{tile}, \d+>, false, {how}, TensorSource<\w+> >$"
        rf"|conv2d_relu_max_pool2d_kernel<\w+, Tile<{tile}, \d+>, {how}>$"
    )


def _transposed(tile: str, how: str, source: str) -> str:
    """The same of the transposed convolution."""
    return rf"tap_gemm_kernel<\w+, Tile<{tile}, \d+>, true, {how}, {source}Source<\w+> >$"


def _mma(loop: str, factors: str, tile: str) -> str:
    """The convolution's products of tap_mma.cuh, halo_mma.cuh and patch_mma.cuh, with a pool or not."""
    if loop == "patch":
        return rf"(conv2d_relu_max_pool2d_)?patch_kernel<{factors}, MmaTile<{tile}> ?>$"
    source = r", false, TensorSource<\w+>" if loop == "halo" else ""
    return (
        rf"{loop}_mma_kernel<{factors}, MmaTile<{tile}>{source} ?>$"
        rf"|conv2d_relu_max_pool2d_loop_kernel<{factors}, MmaTile<{tile}>, By{loop.capitalize()}s?<.*>$"
    )


def _patch(columns: int) -> str:
    """The convolution's products of patch_fma.cuh, with a pool or not."""
    return rf"(conv2d_relu_max_pool2d_)?patch_kernel<Fma, PatchTile<{columns}> ?>$"


def _halo_down(factors: str, tile: str, source: str) -> str:
    """The transposed convolution's products of halo_mma.cuh."""
    return rf"halo_mma_kernel<{factors}, MmaTile<{tile}>, true, {source}Source<\w+> >$"


def _gradient(dtype: str, how: str, source: str) -> str:
    return rf"weight_gradient_kernel<{dtype}, {how}, {source}Source<\w+> >$"


def _gradient_mma(factors: str, side: str, source: str) -> str:
    """The products of gradient_mma.cuh."""
    tile = {"128": "128, 128, 64, 64", "64": "64, 64, 32, 64"}[side]
    return rf"weight_gradient_mma_kernel<{factors}, MmaTile<{tile}>, {source}Source<\w+> >$"


PRODUCTS = [
    Product(_conv("float, 128, 64, 4", "false, 1"), 0.49, 10.2),
    Product(_conv("float, 128, 64, 4", "true, 1"), 0.54, 8.0),
    Product(_conv("float, 128, 64, 4", "true, 4"), 0.61, 9.8),
    Product(_conv("float, 256, 16, 4", "false, 1"), 0.25, 7.5),
    Product(_conv("float, 256, 16, 4", "true, 1"), 0.31, 4.0),
    Product(_conv("float, 256, 16, 4", "true, 4"), 0.41, 6.4),
    Product(_conv("double, 64, 64, 4", "false, 1"), 0.15, 3.7),
    Product(_conv("double, 64, 64, 4", "true, 1"), 0.15, 3.5),
    Product(_conv("float, 128, 128, 8", "true, 4"), 0.86, 19.6, round=0.9),
    Product(_patch(96), 0.85, 8.7),
    Product(_patch(64), 0.8, 6.4),
    Product(_transposed("float, 128, 64, 4", "false, 1", "Masked"), 0.37, 10.2),
    Product(_transposed("float, 128, 64, 4", "true, 1", "Masked"), 0.43, 6.4),
    Product(_transposed("float, 128, 64, 4", "true, 4", "Masked"), 0.57, 9.8),
    Product(_transposed("float, 256, 16, 4", "false, 1", "Masked"), 0.15, 7.5),
    Product(_transposed("float, 256, 16, 4", "true, 1", "Masked"), 0.2, 2.6),
    Product(_transposed("float, 256, 16, 4", "true, 4", "Masked"), 0.34, 6.4),
    Product(_transposed("double, 64, 64, 4", "false, 1", "Masked"), 0.14, 3.7),
    Product(_transposed("double, 64, 64, 4", "true, 1", "Masked"), 0.14, 3.2),
    Product(_transposed("float, 128, 64, 4", "false, 1", "Unpooled"), 0.34, 10.2),
    Product(_transposed("float, 128, 64, 4", "true, 1", "Unpooled"), 0.33, 9.8),
    Product(_transposed("float, 128, 64, 4", "true, 4", "Unpooled"), 0.2, 9.4),
    Product(_transposed("float, 256, 16, 4", "false, 1", "Unpooled"), 0.21, 7.5),
    Product(_transposed("float, 256, 16, 4", "true, 1", "Unpooled"), 0.2, 7.1),
    Product(_transposed("float, 256, 16, 4", "true, 4", "Unpooled"), 0.06, 5.8),
    Product(_transposed("double, 64, 64, 4", "false, 1", "Unpooled"), 0.08, 3.7),
    Product(_transposed("double, 64, 64, 4", "true, 1", "Unpooled"), 0.08, 3.5),
    Product(_mma("tap", r"Halves<\w+>", "128, 64, 64, 32"), 0.15, 2.1),
    Product(_mma("tap", r"Halves<\w+>", "128, 128, 64, 64"), 0.23, 3.3, round=0.32),
    Product(_mma("tap", r"Halves<\w+>", "128, 16, 32, 16"), 0.04, 0.6),
    Product(_mma("tap", "Tf32x3", "128, 64, 64, 32"), 0.2, 6.4),
    Product(_mma("tap", "Tf32x3", "128, 16, 32, 16"), 0.08, 2.0),
    Product(_mma("tap", "Tf32", "128, 64, 64, 32"), 0.15, 2.1),
    Product(_mma("tap", "Tf32", "128, 128, 64, 64"), 0.23, 3.3, round=0.32),
    Product(_mma("tap", "Tf32", "128, 16, 32, 16"), 0.04, 0.6),
    Product(_mma("halo", r"Halves<\w+>", "128, 64, 64, 32"), 0.08, 1.6),
    Product(_mma("halo", r"Halves<\w+>", "128, 128, 64, 64"), 0.16, 2.6, round=0.3),
    Product(_mma("halo", r"Halves<\w+>", "128, 16, 32, 16"), 0.02, 0.5),
    Product(_mma("halo", "Tf32x3", "128, 64, 64, 32"), 0.16, 4.8),
    Product(_mma("halo", "Tf32x3", "128, 16, 32, 16"), 0.06, 1.7),
    Product(_mma("halo", "Tf32", "128, 64, 64, 32"), 0.08, 1.6),
    Product(_mma("halo", "Tf32", "128, 128, 64, 64"), 0.16, 2.6, round=0.3),
    Product(_mma("halo", "Tf32", "128, 16, 32, 16"), 0.02, 0.5),
    Product(_mma("patch", r"Halves<\w+>", "128, 64, 64, 32"), 0.17, 0.7, bare=0.19),
    Product(_mma("patch", r"Halves<\w+>", "128, 96, 64, 48"), 0.21, 1.0, bare=0.24),
    Product(_mma("patch", "Tf32x3", "128, 64, 64, 32"), 0.22, 2.2, bare=0.23),
    Product(_mma("patch", "Tf32x3", "128, 96, 64, 48"), 0.25, 3.2, bare=0.27),
    Product(_mma("patch", "Tf32", "128, 64, 64, 32"), 0.17, 0.7, bare=0.19),
    Product(_mma("patch", "Tf32", "128, 96, 64, 48"), 0.21, 1.0, bare=0.24),
    Product(_halo_down(r"Halves<\w+>", "128, 64, 64, 32", "Masked"), 0.04, 1.1),
    Product(_halo_down(r"Halves<\w+>", "128, 128, 64, 64", "Masked"), 0.08, 2.0, round=0.24),
    Product(_halo_down(r"Halves<\w+>", "128, 96, 64, 48", "Masked"), 0.05, 1.6, round=0.2),
    Product(_halo_down(r"Halves<\w+>", "128, 16, 32, 16", "Masked"), 0.01, 0.3),
    Product(_halo_down("Tf32x3", "128, 64, 64, 32", "Masked"), 0.12, 3.5),
    Product(_halo_down("Tf32x3", "128, 96, 64, 48", "Masked"), 0.16, 4.9, round=0.26),
    Product(_halo_down("Tf32x3", "128, 16, 32, 16", "Masked"), 0.04, 1.1),
    Product(_halo_down("Tf32", "128, 64, 64, 32", "Masked"), 0.05, 1.1),
    Product(_halo_down("Tf32", "128, 128, 64, 64", "Masked"), 0.1, 2.0, round=0.28),
    Product(_halo_down("Tf32", "128, 96, 64, 48", "Masked"), 0.07, 1.6, round=0.24),
    Product(_halo_down("Tf32", "128, 16, 32, 16", "Masked"), 0.01, 0.3),
    Product(_halo_down(r"Halves<\w+>", "128, 64, 64, 32", "Unpooled"), 0.01, 1.5),
    Product(_halo_down(r"Halves<\w+>", "128, 128, 64, 64", "Unpooled"), 0.03, 2.5, round=0.24),
    Product(_halo_down(r"Halves<\w+>", "128, 96, 64, 48", "Unpooled"), 0.02, 2.0, round=0.2),
    Product(_halo_down(r"Halves<\w+>", "128, 16, 32, 16", "Unpooled"), 0.0, 0.5),
    Product(_halo_down("Tf32x3", "128, 64, 64, 32", "Unpooled"), 0.03, 4.5),
    Product(_halo_down("Tf32x3", "128, 96, 64, 48", "Unpooled"), 0.04, 6.2, round=0.25),
    Product(_halo_down("Tf32x3", "128, 16, 32, 16", "Unpooled"), 0.0, 1.6),
    Product(_halo_down("Tf32", "128, 64, 64, 32", "Unpooled"), 0.01, 1.5),
    Product(_halo_down("Tf32", "128, 128, 64, 64", "Unpooled"), 0.02, 2.5, round=0.25),
    Product(_halo_down("Tf32", "128, 96, 64, 48", "Unpooled"), 0.01, 2.0, round=0.2),
    Product(_halo_down("Tf32", "128, 16, 32, 16", "Unpooled"), 0.0, 0.5),
    Product(_gradient("double", "false, 1", "Unpooled"), 0.08, 3.5),
    Product(_gradient("double", "true, 1", "Unpooled"), 0.08, 4.0),
    Product(_gradient("double", "false, 1", "Masked"), 0.13, 3.2),
    Product(_gradient("double", "true, 1", "Masked"), 0.14, 4.0),
    Product(_gradient(r"\w+", "false, 1", "Unpooled"), 0.17, 6.4),
    Product(_gradient(r"\w+", "true, 1", "Unpooled"), 0.15, 8.0),
    Product(_gradient(r"\w+", "true, 4", "Unpooled"), 0.19, 8.0),
    Product(_gradient(r"\w+", "false, 1", "Masked"), 0.33, 5.3),
    Product(_gradient(r"\w+", "true, 1", "Masked"), 0.25, 8.0),
    Product(_gradient(r"\w+", "true, 4", "Masked"), 0.52, 8.0),
    Product(_gradient_mma(r"Halves<\w+>", "64", "Unpooled"), 0.05, 1.6),
    Product(_gradient_mma(r"Halves<\w+>", "128", "Unpooled"), 0.1, 2.7, round=0.21),
    Product(_gradient_mma(r"Halves<\w+>", "64", "Masked"), 0.06, 1.6),
    Product(_gradient_mma(r"Halves<\w+>", "128", "Masked"), 0.11, 2.7, round=0.22),
    Product(_gradient_mma("Tf32x3", "64", "Unpooled"), 0.12, 4.1),
    Product(_gradient_mma("Tf32", "64", "Unpooled"), 0.05, 1.3),
    Product(_gradient_mma("Tf32", "128", "Unpooled"), 0.09, 2.0, round=0.22),
    Product(_gradient_mma("Tf32x3", "64", "Masked"), 0.15, 4.1),
    Product(_gradient_mma("Tf32", "64", "Masked"), 0.08, 1.3),
    Product(_gradient_mma("Tf32", "128", "Masked"), 0.14, 2.0, round=0.24),
]

#: Kernels that are compiled for vectors and yet load them by less than 16 bytes, and why.
NARROW = {
    "max_unpool2d_kernel<float, 4>": "sm_100, 120: nvcc loads halves of a pack, as some values are not wanted",
    "window_maps_kernel<float, 4>": "likewise",
}


def product(name: str) -> Product | None:
    """What the kernel of this name promises."""
    return next((p for p in PRODUCTS if re.match(p.kernel, name)), None)
