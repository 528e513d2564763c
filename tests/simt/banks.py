"""Bank conflicts of shared memory, counted on the emulator: every access of every operator, by address.

``python tests/simt/banks.py`` (`make banks`) writes docs/banks.md.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # where this file is run by itself

from operators import OPERATORS  # noqa: E402
from oracles import Sample, normal  # noqa: E402

import zfcuda  # noqa: E402
from simt import build  # noqa: E402
from simt.backend import Emulator  # noqa: E402
from zfcuda import core, ops  # noqa: E402
from zfcuda.ops import _register  # noqa: E402

#: Sources of functions that only load, store and convert.
_LOADS = ("vector.cuh", "port.cuh", "cuda_fp16.hpp", "cuda_bf16.hpp")


@dataclass(frozen=True)
class Access:
    """All the instructions of one place in the source: how often shared memory was served, and at least had to be."""

    kernel: str
    kind: str
    bytes: int
    instructions: int
    passes: int
    least: int
    worst: int
    where: str

    @property
    def ratio(self) -> float:
        return self.passes / self.least

    @property
    def place(self) -> tuple[str, int]:
        """File and line of the source, outside the functions of _LOADS."""
        places = [place.rpartition(":") for place in self.where.split(", from ")]
        name, _, number = next((p for p in places if p[0] not in _LOADS), places[0])
        return name, int(number)

    @property
    def line(self) -> str:
        """The source there; empty where addr2line names a file that is not so long."""
        path, number = ROOT / "csrc/cuda" / self.place[0], self.place[1]
        lines = path.read_text().splitlines() if path.is_file() else []
        return lines[number - 1].strip() if number <= len(lines) else ""

    @property
    def family(self) -> str:
        """The kernel with the first of its template's arguments."""
        return re.sub(r"(<[^,>]*).*", r"\1>", self.kernel)


def _short(kernel: str) -> str:
    name = kernel.replace("(anonymous namespace)::", "").replace("zfcuda::", "").removeprefix("void ")
    return re.sub(r"\((?:int|bool)\)", "", name).partition("(")[0].strip()


@contextmanager
def recorded(library: ctypes.CDLL) -> Iterator[list[Access]]:
    """The accesses that the emulator's kernels make in the body; the list is filled at its end."""
    found: list[Access] = []
    library.zf_simt_record_banks(1)
    try:
        yield found
        for line in library.zf_simt_banks().decode().splitlines():
            kernel, kind, *numbers, where = line.split("\t")
            found.append(Access(_short(kernel), kind, *map(int, numbers), where))
    finally:
        library.zf_simt_record_banks(0)


@dataclass(frozen=True)
class Explained:
    """Conflicts that stay: of which kernels, at which line of the source, how many at most, and why."""

    kernel: str
    line: str
    ratio: float
    why: str

    def holds(self, access: Access) -> bool:
        return bool(re.match(self.kernel, access.family)) and self.line in access.line


_EPILOGUE = "after the main loop, once a block"
_DIVERGENT = "lanes pass over it unequally often, which the count puts together wrongly"
EXPLAINED = [
    Explained(".*<double>", "from + i", 2, "main loop of float64 alone: the packs of a quad are 32 bytes apart"),
    Explained(
        "tap_gemm_kernel|conv2d_relu_max_pool2d_kernel", "to[Tile::template slot<kM>(k, row)]", 2, "NHWC by one channel"
    ),
    Explained(
        "weight_gradient_kernel",
        "store_vector(left + slot(buffer, i)",
        2,
        "NCHW by FMA: lanes run along k, not columns",
    ),
    Explained("weight_gradient_kernel", "store_vector(right + slot(buffer, i)", 2, "likewise"),
    Explained(
        "halo_mma_kernel|conv2d_relu_max_pool2d_loop_kernel",
        "load_matrices<false>(bits, halo + left",
        2,
        "main loop: eight pixels of two images, or eight of which the last lie behind the box of a pool",
    ),
    Explained(
        ".*patch_kernel",
        "(word) & one.mask",
        2.2,
        "main loop: pixels of two lines, pieces that go on in the next row of taps (of halves; of floats where taps are"
        " apart), or (5 channels) runs at a distance that no order of the pixels keeps apart",
    ),
    Explained(".*patch_kernel", "left[pixels[i] + k]", 1.5, "main loop: pixels of two lines"),
    Explained("copy_layout_kernel", "", 2, "sides that do not divide 32, and elements of less than a word"),
    Explained(".*patch_kernel", "cp_async<4>(to + e", 2, _DIVERGENT),
    Explained(".*patch_kernel", "to[e] = value", 2, _DIVERGENT),
    Explained(".*patch_kernel", "[e + 1] = value", 2, _DIVERGENT),
    Explained("conv2d_relu_max_pool2d_kernel", "store_vector(maps + at", 8, _EPILOGUE),
    Explained("conv2d_relu_max_pool2d", "maps[at((y - top)", 8, f"{_EPILOGUE}: windows 2 pixels apart"),
    Explained(
        "pack_weights_kernel", "store_packed(p, packed, (group", 2, "halves, once a call: an odd pitch of words of two"
    ),
    Explained("tap_gemm_kernel", "targets[Tile::row(", 4, f"{_EPILOGUE}: lanes own rows four apart"),
    Explained("tap_gemm_kernel", "if (target.offset >= 0 && target.y + y <", 4, f"{_EPILOGUE}, phases as columns"),
    Explained(".*", "static_cast<unsigned>(pixel.x + tap.x) < breadth", 3, _DIVERGENT),
    Explained(".*", "return source.template load", 3, _DIVERGENT),
    Explained("tap_gemm_kernel", "+ vector_at.", 3, _DIVERGENT),
    Explained("local_response_norm_gradient_kernel", "sum += terms[j * kRow + pixel]", 2, _DIVERGENT),
    Explained(
        "map_maximum_kernel|conv2d_relu_max_pool2d_maximum_kernel",
        "",
        4,
        "value and position of a thread are neighbours: 8 or 16 bytes a lane, read by parts",
    ),
]


LAYOUTS = ("contiguous", "channels_last")
#: Dtypes, and how float32 is multiplied.
MODES = (
    (torch.float32, "ieee"),
    (torch.float32, "tf32"),
    (torch.float32, "3xtf32"),
    (torch.float64, "ieee"),
    (torch.float16, "ieee"),
    (torch.bfloat16, "ieee"),
)


@contextmanager
def in_place_of_the_cpu(emulator: Emulator) -> Iterator[None]:
    """Operators on CPU tensors run on the emulator, as the fixture ``backend`` has it."""
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        _register.GUARDS.append(lambda: True)  # no call is plain
        stack.callback(_register.GUARDS.pop)
        patch.setitem(core.BACKENDS, "cpu", lambda: emulator)
        patch.setattr(core, "_address", emulator.address)
        patch.setattr(core, "_exec", lambda device: (0, 0, 1, core.cuda_precision()))
        yield


def _samples() -> Iterator[tuple[Callable[..., Any], Sample]]:
    """Each operator on its first samples, and the convolutions on such as fill the tiles of a block."""
    for declared in OPERATORS:
        for sample in declared.samples()[:4]:
            yield declared.call, sample
    for size, filters in (
        ((1, 16, 13, 12), (64, 16, 3, 3)),
        ((1, 5, 13, 12), (64, 5, 3, 3)),
        ((1, 8, 17, 16), (8, 8, 3, 3)),
        ((1, 3, 17, 16), (96, 3, 7, 7)),
    ):
        yield ops.conv2d_relu, Sample([normal(*size), normal(*filters), normal(filters[0])], {"padding": 1})
        pool = {"pool_kernel_size": 3, "pool_stride": 2, "padding": 1}
        yield ops.conv2d_relu_max_pool2d, Sample([normal(*size), normal(*filters), normal(filters[0])], pool)


def of_operators(emulator: Emulator) -> list[Access]:
    """The accesses of every operator and its gradients, in each layout and dtype."""
    with in_place_of_the_cpu(emulator), recorded(emulator.controls) as found:
        for call, sample in _samples():
            for layout in LAYOUTS:
                for dtype, mode in MODES:
                    mine = sample.on(torch.device("cpu"), dtype, layout)
                    with zfcuda.set_fp32_precision(mode):
                        result = mine.call(call)
                        first = result[0] if isinstance(result, tuple) else result
                        if first.requires_grad:
                            torch.autograd.grad(first, mine.leaves(), torch.ones_like(first))
        for dtype, _ in MODES:
            ops.renormalize_filters_(normal(40, 3, 5, 5).to(dtype), 0.5)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(emulator, "processors", 1)  # of such a GPU small NCHW products are worth copies
            for dtype, mode in MODES:
                image, weight = normal(2, 3, 35, 34).to(dtype), normal(40, 3, 7, 7).to(dtype)
                with zfcuda.set_fp32_precision(mode):
                    ops.conv2d_relu_max_pool2d(image, weight, stride=2, pool_kernel_size=3, pool_stride=2)
    return found


def explanation(access: Access) -> Explained | None:
    return next((e for e in EXPLAINED if e.holds(access)), None) if access.passes > access.least else None


def page(found: list[Access]) -> str:
    """``docs/banks.md``: the instantiations of a kernel for one dtype together."""
    places: dict[tuple[str, str, str, str], list[Access]] = {}
    for access in found:
        places.setdefault((access.family, access.place[0], access.line, access.kind), []).append(access)
    rows = []
    for (kernel, file, line, kind), accesses in sorted(places.items()):
        ratio = sum(a.passes for a in accesses) / sum(a.least for a in accesses)
        widths = "/".join(str(width) for width in sorted({8 * a.bytes for a in accesses}))
        whys = {e.why for a in accesses if (e := explanation(a))}
        code = f"`{line.replace('|', '¦')}`" if line else "–"
        rows.append(f"| `{kernel}` | {file} | {code} | {kind} {widths} | {ratio:.2f} | {'; '.join(sorted(whys))} |")
    return f"""# Bank conflicts of shared memory

Counted on the [emulator](emulator.md) from the address of every access of every operator and gradient, in both
layouts, float32 and float64, on small shapes and on such as fill a block's tiles; written by `make banks`.
`tests/simt/test_banks.py` counts the same and fails on a place with conflicts that is not explained.

Shared memory serves a warp's accesses of up to 32 bits a lane at once, of 64 bits by halves, of 128 bits (ldmatrix and
cp.async too) by quarters. **passes** are what the 32 banks need for these addresses over what the width alone needs:
1.00 is none too many.

| kernel | file | line | access, bits | passes | why |
| --- | --- | --- | --- | --: | --- |
{chr(10).join(rows)}
"""


if __name__ == "__main__":
    found = of_operators(Emulator(build.backend(), orders=("forward",)))
    (ROOT / "docs/banks.md").write_text(page(found))
