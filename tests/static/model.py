"""A model of what each product takes on a GPU, from its tile and its machine code: docs/model.md, by ``make model``.

A launch of equal blocks takes

    waves × resident blocks × (cycles of a block)         waves = blocks / (multiprocessors × resident), rounded up

at the clock, or the least bytes at the memory's speed, whichever is more. A block's cycles are its tile's
multiply-adds, padding included, over the lanes of a multiprocessor, or its main loop's instructions over its four
schedulers, whichever is more. Nothing else is in it: no latency, no epilogue, no caches.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from cubins import Kernel, compile_all
from report import markdown
from tools import ROOT

sys.path.append(str(ROOT / "benchmarks"))
from layers import CONVOLUTIONS, POOLS, Conv

BATCH = 128


@dataclass(frozen=True)
class Gpu:
    """Multiprocessors, float32 lanes of each, GHz, TB/s; the peaks are those that docs quote from data sheets."""

    name: str
    arch: int
    processors: int
    lanes: int
    clock: float
    memory: float

    @property
    def tflops(self) -> float:
        return 2 * self.processors * self.lanes * self.clock / 1000


GPUS = (
    Gpu("A100", 80, 108, 64, 1.41, 1.94),
    Gpu("H100 SXM", 90, 132, 128, 1.98, 3.35),
    Gpu("RTX 4090", 89, 128, 128, 2.52, 1.01),
)


@dataclass(frozen=True)
class Launch:
    """One product: rows of each slice (stride phase), result columns, products of a sum, bytes, useful work."""

    layer: str
    kernel: str  # pattern of the name
    slices: tuple[tuple[int, int], ...]  # rows, products of a sum
    columns: int
    bytes: float
    flops: float


def _tile(columns: int) -> str:
    return "256, 16" if columns <= 16 else "128, 64"


def launches() -> Iterator[Launch]:
    """ZFNet's convolutions in float32, NHWC: up, up with the pool, down."""
    for conv in CONVOLUTIONS:
        pixels, vector = BATCH * conv.out_size**2, 4 if conv.channels % 4 == 0 else 1
        image, maps = BATCH * conv.channels * conv.size**2, pixels * conv.maps
        weights, depth = conv.maps * conv.channels * conv.kernel**2, conv.channels * conv.kernel**2
        kernel = rf"tap_gemm_kernel<float, Tile<float, {_tile(conv.maps)}>, false, true, {vector}, Tensor"
        least, flops = 4.0 * (image + weights + maps), conv.flops(BATCH)
        yield Launch(f"{conv.name}: conv2d_relu", kernel, ((pixels, depth),), conv.maps, least, flops)
        for pool in (p for p in POOLS if p.name[4:] == conv.name[4:]):
            rows, pooled = _boxes(conv.out_size, pool.pooled_size), BATCH * conv.maps * pool.pooled_size**2
            kernel = rf"conv2d_relu_max_pool2d_kernel<float, Tile<float, {_tile(conv.maps)}>, true, {vector}>"
            least = 4.0 * (image + weights) + 5.0 * pooled
            yield Launch(f"{conv.name}: with pool", kernel, ((rows, depth),), conv.maps, least, flops)
        kernel = rf"tap_gemm_kernel<float, Tile<float, {_tile(conv.channels)}>, true, true, 4, Tensor"
        least = 4.0 * (image + weights + maps)
        yield Launch(f"{conv.name}: deconv2d", kernel, tuple(_phases(conv)), conv.channels, least, flops)


def _boxes(size: int, pooled: int) -> int:
    """Rows of the fused kernel: 128 for each block of windows, the halo that blocks share counted in each."""
    tiles = (
        math.ceil(pooled / rows) * math.ceil(pooled / columns)
        for rows in range(1, pooled + 1)
        for columns in range(1, pooled + 1)
        if (2 * rows + 1) * (2 * columns + 1) <= 128
    )
    return 128 * BATCH * min(tiles)


def _phases(conv: Conv) -> Iterator[tuple[int, int]]:
    """Pixels and products of a sum of each phase of the stride."""
    for y in range(conv.stride):
        for x in range(conv.stride):
            pixels = math.prod(math.ceil((conv.size - phase) / conv.stride) for phase in (y, x))
            taps = math.prod(
                sum((phase + conv.padding - t) % conv.stride == 0 for t in range(conv.kernel)) for phase in (y, x)
            )
            yield BATCH * pixels, taps * conv.maps


def microseconds(launch: Launch, gpu: Gpu, kernel: Kernel) -> float:
    """The model of the head of this file."""
    loop, occupancy, found = kernel.code.main_loop, kernel.occupancy, re.search(r", (\d+), (\d+)>", kernel.name)
    assert loop and occupancy and kernel.threads and found
    tile_rows, tile_columns = map(int, found.groups())
    threads = 1536 if kernel.arch == 89 else 2048
    resident = round(occupancy * threads / kernel.threads)
    blocks, cycles = 0, 0.0
    for rows, depth in launch.slices:
        mine = math.ceil(rows / tile_rows) * math.ceil(launch.columns / tile_columns)
        multiply_adds = tile_rows * tile_columns * math.ceil(depth / 16) * 16
        blocks += mine
        cycles += mine * multiply_adds * max(1 / gpu.lanes, 1 / (128 * loop.share))
    waves = math.ceil(blocks / (gpu.processors * resident))
    compute = waves * resident * cycles / blocks / (gpu.clock * 1000)
    return max(compute, launch.bytes / gpu.memory / 1e6)


def page(kernels: list[Kernel]) -> str:
    """``docs/model.md``."""
    rows = []
    for launch in launches():
        cells = []
        for gpu in GPUS:
            (kernel,) = {k.name: k for k in kernels if k.arch == gpu.arch and re.match(launch.kernel, k.name)}.values()
            floor = max(launch.flops / gpu.tflops / 1e6, launch.bytes / gpu.memory / 1e6)
            time = microseconds(launch, gpu, kernel)
            cells += [f"{floor:.0f}", f"{time:.0f}", f"{floor / time:.0%}"]
        rows.append([launch.layer, *cells])
    head = [cell for gpu in GPUS for cell in (f"{gpu.name}: floor", "model", "floor / model")]
    peaks = ", ".join(f"{gpu.name} {gpu.tflops:.1f} TFLOP/s and {gpu.memory} TB/s" for gpu in GPUS)
    return f"""# A model of the kernels' times

**A model: nothing on this page was measured.** Microseconds of ZFNet's convolutions, float32 multiply-adds, NHWC, batch
{BATCH}; written by `make model` from the tiles and the machine code ([shares](kernels.md)), for information.

- **floor**: the useful work at the peak, or the least bytes at the memory's peak, whichever is more:
  {peaks}.
- **model**: as many waves of blocks as the grid takes, of tiles padded to their size, a block's main loop at the rate
  at which its instructions can be issued; or the bytes. No latency, no epilogue, no caches: a GPU will take longer.
  Shares are lower bounds where a loop has branches, so that a loop may also be faster than its model.

{markdown(["layer", *head], rows)}
"""


if __name__ == "__main__":
    print(page(compile_all()), end="")
