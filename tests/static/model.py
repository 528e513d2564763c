"""A model of what each product takes on a GPU, from its tile and its machine code: docs/model.md, by ``make model``.

A launch of equal blocks takes

    waves × resident blocks × (cycles of a block)         waves = blocks / (multiprocessors × resident), rounded up

at the clock, or the least bytes at the memory's speed, whichever is more. A block's cycles are the most of its tile's
multiply-adds, padding included, over what a multiprocessor does in a cycle; the instructions of its main loop's
shortest round over its four schedulers; and the bytes that it reads over what the second-level cache gives a
multiprocessor. Nothing else is in it: no latency, no epilogue, no gathering.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from cubins import ARCHS, Kernel, compile_all
from report import markdown
from tools import ROOT

sys.path.append(str(ROOT))
from zfcuda.bench.shapes import CONVOLUTIONS, POOLED, Conv

BATCH = 128


@dataclass(frozen=True)
class Mode:
    """Bytes of an element, and the factors of the tensor cores' kernels, if it runs there."""

    name: str
    size: int
    factors: str = ""


MODES = (Mode("ieee", 4), Mode("tf32", 4, "Tf32"), Mode("bf16", 2, "Halves<__nv_bfloat16>"))


@dataclass(frozen=True)
class Gpu:
    """GHz and TB/s of the data sheet; of a multiprocessor, a cycle: multiply-adds by mode, bytes of the second level.

    The second level's bytes are what microbenchmarks of others report, roughly.
    """

    name: str
    arch: int
    processors: int
    clock: float
    memory: float
    rates: dict[str, int]
    second_level: int

    def tflops(self, mode: Mode) -> float:
        return 2 * self.processors * self.rates[mode.name] * self.clock / 1000

    def floor(self, launch: Launch) -> float:
        """Microseconds at the peaks."""
        return max(launch.flops / self.tflops(launch.mode), launch.least / self.memory) / 1e6


GPUS = (
    Gpu("A100", 80, 108, 1.41, 1.94, {"ieee": 64, "tf32": 512, "bf16": 1024}, 40),
    Gpu("H100 SXM", 90, 132, 1.83, 3.35, {"ieee": 128, "tf32": 1024, "bf16": 2048}, 24),
    Gpu("RTX 4090", 89, 128, 2.52, 1.01, {"ieee": 128, "tf32": 128, "bf16": 256}, 16),
)


@dataclass(frozen=True)
class Teams:
    """Of a kernel whose weights may stay in shared memory (patch_product.cuh): their bytes, those of a team."""

    weights: int
    own: int
    most: int
    threads: int = 128

    def on(self, kernel: Kernel) -> int:
        """How many a multiprocessor holds; 0 where weights are streamed."""
        teams = min(self.most, ((ARCHS[kernel.arch].shared_kib - 1) * 1024 - self.weights) // self.own)
        return teams if teams > 1 else 0


@dataclass(frozen=True)
class Launch:
    """One product of a layer. ``slices``: rows and products of a sum, of each phase of a stride."""

    layer: str
    mode: Mode
    kernel: str  # a pattern of its name
    slices: list[tuple[int, int]]
    columns: int
    least: float  # bytes of all tensors
    flops: float  # the useful ones
    dynamic: int = field(default=0)  # shared memory of a block
    read: float = field(default=1.0)  # the part of its rows' factors that a block reads, the rest being the same again
    then: float = field(default=0.0)  # bytes of a second kernel
    teams: Teams | None = None


@dataclass(frozen=True)
class Layer:
    """What the launches of a layer have in common."""

    conv: Conv
    mode: Mode

    @property
    def few(self) -> bool:
        """Channels: images of three colours."""
        return self.conv.channels % 4 != 0

    @property
    def depth(self) -> int:
        return self.conv.channels * self.conv.kernel**2

    @property
    def merged(self) -> int:
        """Products of a sum where rows of taps are merged: whole words each, whole chunks of 64 bytes in all."""
        word, chunk = 4 // self.mode.size, 64 // self.mode.size
        words = math.ceil(self.conv.kernel * self.conv.channels / word)
        return math.ceil(self.conv.kernel * words * word / chunk) * chunk

    @property
    def folded(self) -> int:
        """Columns of a weight gradient on the tensor cores: csrc/cuda/folded_image.cuh."""
        conv, piece, folds = self.conv, 16 // self.mode.size, {1, self.conv.stride} if self.few else {1}
        return min(
            math.ceil(conv.kernel / y) * math.ceil(conv.kernel / x) * math.ceil(conv.channels * y * x / piece) * piece
            for y in folds
            for x in folds
        )

    def gradient_tiles(self, side: int, columns: int) -> int:
        return math.ceil(self.conv.maps / side) * math.ceil(columns / side)

    def launch(self, what: str, kernel: str, slices: list[tuple[int, int]], columns: int, **more: float) -> Launch:
        given = {"least": self.mode.size * self.conv.elements(BATCH), "flops": self.conv.flops(BATCH)} | more
        return Launch(f"{self.conv.name} {what}", self.mode, kernel, slices, columns, **given)  # type: ignore[arg-type]

    def up(self) -> Iterator[Launch]:
        conv, factors, rows = self.conv, self.mode.factors, BATCH * self.conv.out_size**2
        pool = POOLED.get(conv)
        more: dict[str, Any] = {}
        after: dict[str, Any] = {}  # with the pool
        depth = self.depth
        if not factors and self.few:
            weights = self.depth * 96 * 4
            more = {"dynamic": 49_152, "read": 0.1, "teams": Teams(weights, 10_240, 2)}
            after = {"teams": Teams(weights, 49_152, 2)}
            forward = "patch_kernel<Fma, PatchTile<96>"
            fused = "conv2d_relu_max_pool2d_patch_kernel<Fma, PatchTile<96>"
        elif not factors:
            forward = "tap_gemm_kernel<float, Tile<float, 128, 128,.*false, true, 4, Tensor"
            fused = "conv2d_relu_max_pool2d_kernel<float, Tile<float, 128, 64,.*true, 4>"
        elif self.few:
            depth = self.merged
            weights = depth * 96 * self.mode.size + 2 * depth * self.mode.size  # and the table
            more = {"dynamic": 29_000, "read": 0.1, "teams": Teams(weights, 10_240, 3)}
            after = {"teams": Teams(weights, 49_152 if self.mode.size == 4 else 28_672, 3)}
            forward = f"patch_kernel<{factors}, MmaTile<128, 96,"
            fused = f"conv2d_relu_max_pool2d_patch_kernel<{factors}, MmaTile<128, 96,"
        else:
            more = {"dynamic": 80_160, "read": 2.2 * conv.stride**2 / conv.kernel**2}
            forward = f"halo_mma_kernel<{factors}, MmaTile<128, 128,.*false, Tensor"
            fused = f"conv2d_relu_max_pool2d_loop_kernel<{factors}, MmaTile<128, 64,.*ByHalo"
        yield self.launch("forward", forward, [(rows, depth)], conv.maps, **more)
        if pool is None:
            return
        pooled = BATCH * conv.maps * pool.pooled_size**2
        more["least"] = self.mode.size * (conv.inputs(BATCH) + conv.weights + pooled) + pooled
        boxed = 128 * BATCH * _boxes(pool.pooled_size)
        yield self.launch("forward with pool, in boxes", fused, [(boxed, depth)], conv.maps, **more | after)
        then = self.mode.size * (BATCH * conv.maps * conv.out_size**2 + pooled) + pooled
        yield self.launch("forward, then its pool", forward, [(rows, depth)], conv.maps, then=then, **more)

    def down(self) -> Iterator[Launch]:
        conv, factors = self.conv, self.mode.factors
        narrow = conv.channels <= 16
        slices, columns, taps = [*_phases(conv)], conv.channels, conv.kernel / conv.stride
        if narrow:  # the phases are columns: csrc/cuda/columns.cuh
            taps = math.ceil(conv.padding / conv.stride) + 1 + (conv.kernel - 1 - conv.padding) // conv.stride
            slices = [(BATCH * math.ceil(conv.size / conv.stride) ** 2, taps**2 * conv.maps)]
            columns *= conv.stride**2
        if factors:
            tile = "16" if narrow else next(n for n in ("128", "96", "64") if conv.channels % int(n) == 0)
            kernel = f"halo_mma_kernel<{factors}, MmaTile<128, {tile},.*true, Masked"
            more = {"dynamic": 80_160, "read": 2.2 / taps**2}
        else:
            tile, more = "256, 16" if narrow else "128, 64", {}
            kernel = rf"tap_gemm_kernel<float, Tile<float, {tile},.*true, true, 4, Masked"
        yield self.launch("data gradient", kernel, slices, columns, **more)
        columns = self.folded if factors else self.depth
        side = 128 if 3 * self.gradient_tiles(128, columns) <= self.gradient_tiles(64, columns) else 64
        vector = 1 if self.few else 4
        kernel = (
            rf"weight_gradient_mma_kernel<{factors}, MmaTile<{side}, {side},.*Masked"
            if factors
            else rf"weight_gradient_kernel<float, true, {vector}, Masked"
        )
        # Splits of the pixels make as many blocks as fill the GPU: equal parts of the whole.
        pixels = BATCH * conv.out_size**2
        yield self.launch("weight gradient", kernel, [(conv.maps, pixels)], columns, dynamic=49_152 * bool(factors))


def _boxes(pooled: int) -> int:
    """Blocks of an image in the fused kernel: boxes of at most 128 pixels, what windows share counted in each."""
    return min(
        math.ceil(pooled / rows) * math.ceil(pooled / columns)
        for rows in range(1, pooled + 1)
        for columns in range(1, pooled + 1)
        if (2 * rows + 1) * (2 * columns + 1) <= 128
    )


def _phases(conv: Conv) -> Iterator[tuple[int, int]]:
    """Pixels and products of a sum of each phase of the stride."""
    for y in range(conv.stride):
        for x in range(conv.stride):
            pixels = math.prod(math.ceil((conv.size - phase) / conv.stride) for phase in (y, x))
            taps = math.prod(
                sum((phase + conv.padding - t) % conv.stride == 0 for t in range(conv.kernel)) for phase in (y, x)
            )
            yield BATCH * pixels, taps * conv.maps


def _tile(kernel: Kernel) -> tuple[int, int]:
    if by_patch := re.search(r"PatchTile<(\d+)>", kernel.name):
        return 128, int(by_patch[1])
    found = re.search(r"Tile<(?:[a-z]+, )?(\d+), (\d+)", kernel.name)
    return (int(found[1]), int(found[2])) if found else (64, 64)


def _resident(kernel: Kernel, dynamic: int, threads: int) -> int:
    """Blocks that a multiprocessor holds."""
    limits = ARCHS[kernel.arch]
    registers = limits.registers // (math.ceil(kernel.registers / 8) * 8 * threads)
    return max(1, min(registers, limits.shared_kib * 1024 // (kernel.shared + dynamic + 1024)))


def microseconds(launch: Launch, gpu: Gpu, kernel: Kernel) -> float:
    """The model of the head of this file."""
    rows, columns = _tile(kernel)
    teams = launch.teams.on(kernel) if launch.teams else 0
    loop = (kernel.code.bare_round if teams else kernel.code.shortest_round) or kernel.code.main_loop
    threads = launch.teams.threads if launch.teams else kernel.threads
    assert loop and threads
    warps = threads // 32
    per_product = {"FFMA": 32, "HMMA": 16 * 8 * (8 if launch.mode.size == 4 else 16)}[loop.product or ""]
    round_products = warps * loop.products * per_product  # multiply-adds of a block
    blocks, cycles = 0, 0.0
    for count, depth in launch.slices:
        mine = math.ceil(count / rows) * math.ceil(launch.columns / columns)
        products = rows * columns * depth
        issue = products / round_products * len(loop.instructions) * warps / 4
        bytes_read = depth * launch.mode.size * (launch.read * rows + (0 if teams else columns))
        block = max(products / gpu.rates[launch.mode.name], issue, bytes_read / gpu.second_level)
        blocks += mine
        cycles += mine * block
    resident = teams or _resident(kernel, launch.dynamic, threads)
    if "weight_gradient" in kernel.name:  # splits make whole waves
        waves = blocks / (gpu.processors * resident)
    else:
        waves = math.ceil(blocks / (gpu.processors * resident))
    compute = waves * resident * cycles / blocks / (gpu.clock * 1000)
    return max(compute, launch.least / gpu.memory / 1e6) + launch.then / gpu.memory / 1e6


def table(kernels: list[Kernel], mode: Mode) -> str:
    rows = []
    for launch in (
        launch for conv in CONVOLUTIONS for way in (Layer.up, Layer.down) for launch in way(Layer(conv, mode))
    ):
        cells = []
        for gpu in GPUS:
            (kernel,) = {k.name: k for k in kernels if k.arch == gpu.arch and re.match(launch.kernel, k.name)}.values()
            floor, time = gpu.floor(launch), microseconds(launch, gpu, kernel)
            cells += [f"{floor:.0f}", f"{time:.0f}", f"{floor / time:.0%}"]
        rows.append([launch.layer, *cells])
    return markdown(["layer", *(c for gpu in GPUS for c in (f"{gpu.name}: floor", "model", "floor / model"))], rows)


def page(kernels: list[Kernel]) -> str:
    """``docs/model.md``."""
    peaks = "; ".join(
        f"{gpu.name} {' · '.join(f'{gpu.tflops(mode):.0f}' for mode in MODES)} TFLOP/s, {gpu.memory} TB/s"
        for gpu in GPUS
    )
    tables = "\n\n".join(f"## {mode.name}\n\n{table(kernels, mode)}" for mode in MODES)
    return f"""# A model of the kernels' times

**A model: nothing on this page was measured.** Microseconds of ZFNet's convolutions, NHWC, batch {BATCH}; written by
`make model` from the tiles and the machine code ([shares](kernels.md)), for information.

- **floor**: the useful work at the peak, or the least bytes at the memory's peak, whichever is more
  ({" · ".join(mode.name for mode in MODES)}): {peaks}.
- **model**: as many waves of blocks as the grid takes, of tiles padded to their size; a block's main loop at the rate
  of its multiply-adds, of issuing the instructions of its shortest round, or of reading from the second-level cache,
  whichever takes longest; or the bytes. No latency, no epilogue, nothing of what gathers: a GPU will take longer. On
  Hopper `mma.sync` reaches less than two thirds of the peak.
- Where weights of images of few channels stay in shared memory (`csrc/cuda/patch_product.cuh`), a multiprocessor has as
  many tiles at once as teams, and reads weights for none of them.
- What only moves data (pools, unpooling, normalisation, ReLU) is bound by its bytes: its floor is its model.
- A layer with its pool runs in boxes, which compute some pixels twice but write no maps, or one after the other. The
  library takes what its own estimate (`csrc/cuda/tap_choice.cuh`) finds cheaper: here boxes for conv1, in every mode,
  and the other for conv2 and conv5.

{tables}
"""


if __name__ == "__main__":
    print(page(compile_all()), end="")
