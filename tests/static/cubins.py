"""What the compiler says of every kernel on every architecture: registers, shared memory, stack, spills, occupancy.

``compile_all()`` builds a cubin of each file of csrc/cuda for each architecture, by ninja, kept in build/static;
``python tests/static/cubins.py`` prints the table of docs/kernels.md.
"""

from __future__ import annotations

import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import filelock

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build/static"

sys.path.insert(0, str(ROOT / "csrc"))
import build  # noqa: E402  (csrc/build.py)


@dataclass(frozen=True)
class Limits:
    """What one multiprocessor holds (CUDA programming guide, "Compute Capabilities")."""

    threads: int
    blocks: int
    shared_kib: int
    registers: int = 65536


ARCHS = {
    75: Limits(1024, 16, 64),
    80: Limits(2048, 32, 164),
    86: Limits(1536, 16, 100),
    89: Limits(1536, 24, 100),
    90: Limits(2048, 32, 228),
    100: Limits(2048, 32, 228),
    120: Limits(1536, 24, 100),
}


@dataclass(frozen=True)
class Kernel:
    """One kernel on one architecture. ``threads`` is its launch bound, None where the source states none."""

    file: str
    name: str
    arch: int
    registers: int
    shared: int
    stack: int
    spills: int
    threads: int | None

    @property
    def occupancy(self) -> float | None:
        """Resident threads over those that a multiprocessor holds, at the launch bound, by static shared memory."""
        if self.threads is None:
            return None
        limits, warps = ARCHS[self.arch], -(-self.threads // 32)
        registers = warps * (-(-self.registers * 32 // 256) * 256)  # a warp's come in units of 256
        shared = self.shared + (1024 if self.arch >= 80 else 0)  # the system keeps 1 KiB a block
        blocks = min(
            limits.blocks,
            limits.threads // (32 * warps),
            limits.registers // registers,
            limits.shared_kib * 1024 // shared if shared else limits.blocks,
        )
        return blocks * 32 * warps / limits.threads


def compile_all() -> list[Kernel]:
    """Compile what has changed and read what the compiler said.

    Raises
    ------
    RuntimeError
        If there is no CUDA compiler, or it warned.
    """
    toolkit = build.find_toolkit()
    if toolkit is None:
        raise RuntimeError("there is no nvcc: install a CUDA toolkit, or connect to pip's index")
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    FOLDER.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(FOLDER / "lock"):
        lines = [
            "rule cubin",
            f"  command = {toolkit.nvcc} -std=c++17 -O3 -cubin -arch=sm_$arch -Xptxas -v -Werror all-warnings "
            f"-MD -MF $out.d '-DZF_CUDA_TARGETS=\"\"' $in -o $out > $out.log 2>&1 || (cat $out.log; false)",
            "  depfile = $out.d\n  deps = gcc\n  description = $out",
        ]
        for source in sources:
            for arch in ARCHS:
                lines += [f"build {source.stem}.{arch}.cubin: cubin {source}", f"  arch = {arch}"]
        (FOLDER / "build.ninja").write_text("\n".join(lines) + "\n")
        subprocess.run([sys.executable, "-m", "ninja", "--quiet", "-C", FOLDER], check=True, stdout=sys.stderr)
    return [kernel for source in sources for arch in ARCHS for kernel in _kernels(source, arch)]


_REPORT = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)' for 'sm_\d+\w?'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def _kernels(source: Path, arch: int) -> Iterator[Kernel]:
    cubin = FOLDER / f"{source.stem}.{arch}.cubin"
    bounds = _launch_bounds(cubin.read_bytes())
    for match in _REPORT.finditer(Path(f"{cubin}.log").read_text()):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        yield Kernel(
            file=source.name,
            name=_short(match["symbol"]),
            arch=arch,
            registers=int(match["registers"]),
            shared=int(shared[1]) if shared else 0,
            stack=int(match["stack"]),
            spills=int(match["stores"]) + int(match["loads"]),
            threads=bounds.get(match["symbol"]),
        )


def _short(symbol: str) -> str:
    """The kernel and its template arguments, without namespaces, return type and parameters."""
    out = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout
    name = out.replace("(anonymous namespace)::", "").replace("zfcuda::", "").removeprefix("void ")
    return re.sub(r"\((?:int|bool)\)", "", name).partition("(")[0].strip()


def _launch_bounds(elf: bytes) -> dict[str, int]:
    """Threads a block of each kernel that has a bound: attribute 5 (EIATTR_MAX_THREADS) of its section .nv.info."""
    table, size, count, names = struct.unpack_from("<Q10xHHH", elf, 0x28)
    headers = [struct.unpack_from("<I20xQQ", elf, table + i * size) for i in range(count)]  # name, offset, size
    bounds = {}
    for name, offset, length in headers:
        start = headers[names][1] + name
        section = elf[start : elf.index(b"\0", start)].decode()
        if section.startswith(".nv.info."):
            at = offset
            while at < offset + length:
                form, attribute, value = struct.unpack_from("<BBH", elf, at)
                if attribute == 5:
                    x, y, z = struct.unpack_from("<3I", elf, at + 4)
                    bounds[section.removeprefix(".nv.info.")] = x * y * z
                at += 4 + (value if form == 4 else 0)  # form 4 carries `value` bytes; the others fit in the word
    return bounds


def table(kernels: list[Kernel]) -> str:
    """A table in Markdown: a row a kernel, a column an architecture."""
    head = [f"sm_{arch}" for arch in ARCHS]
    rows = [["kernel", "shared", "threads", *head], ["---"] * 3 + ["--:"] * len(head)]
    for (_, name), group in groupby(sorted(kernels, key=lambda k: (k.file, k.name)), key=lambda k: (k.file, k.name)):
        by_arch = {kernel.arch: kernel for kernel in group}
        some = by_arch[min(by_arch)]
        cells = []
        for arch in ARCHS:
            kernel = by_arch.get(arch)
            busy = "" if kernel is None or kernel.occupancy is None else f" · {kernel.occupancy:.0%}"
            cells.append(f"{kernel.registers}{busy}" if kernel else "missing")
        rows.append([f"`{name}`", str(some.shared), str(some.threads or "–"), *cells])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    found = compile_all()
    version = ".".join(map(str, build.find_toolkit().version()))
    print(f"""# What the compiler says of every kernel

Compiled by nvcc {version}; regenerate with `make kernels`. `tests/static` compiles the same and fails on a spill, on
local memory, on a warning and on a missing architecture: stack and spills are 0 everywhere.

- **shared**: static shared memory of a block in bytes; **threads**: the launch bound (– where the source states none).
- Each architecture: registers a thread · theoretical occupancy at that bound (a model, not a measurement).

{table(found)}""")
