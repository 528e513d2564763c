"""Every kernel for every architecture: what the compiler says of it, and its code.

``compile_all()`` builds a cubin of each file of csrc/cuda for each architecture and disassembles it, by ninja, kept in
build/static; report.py writes it up as docs/kernels.md.
"""

from __future__ import annotations

import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import filelock
import sass
from tools import ROOT, build, nvdisasm

FOLDER = ROOT / "build/static"


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
    code: sass.Code

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
        If there is no CUDA compiler or no disassembler.
    CalledProcessError
        If the compiler fails, or warns.
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
            f"rule sass\n  command = {nvdisasm()} -c $in > $out\n  description = $out",
        ]
        for source in sources:
            for arch in ARCHS:
                name = f"{source.stem}.{arch}"
                lines += [f"build {name}.cubin: cubin {source}", f"  arch = {arch}"]
                lines += [f"build {name}.sass: sass {name}.cubin"]
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
    codes = sass.parse(cubin.with_suffix(".sass").read_text())
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
            code=codes[match["symbol"]],
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
