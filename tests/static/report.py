"""Writes up what cubins.py found, as docs/kernels.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import groupby

from cubins import ARCHS, Kernel, compile_all
from promises import product
from sass import Code, Issued
from tools import build

#: The architectures of the wider tables: one of each generation of tensor cores and memory.
SHOWN = (80, 90, 120)


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def by_kernel(kernels: list[Kernel]) -> list[dict[int, Kernel]]:
    """The kernels of each source and name, by architecture."""

    def key(kernel: Kernel) -> tuple[str, str]:
        return kernel.file, kernel.name

    return [{k.arch: k for k in group} for _, group in groupby(sorted(kernels, key=key), key=key)]


def resources(kernels: list[Kernel]) -> str:
    """Registers and occupancy: a row a kernel, a column an architecture."""
    rows = []
    for archs in by_kernel(kernels):
        some = archs[min(archs)]
        cells = []
        for arch in ARCHS:
            kernel = archs.get(arch)
            busy = "" if kernel is None or kernel.occupancy is None else f" · {kernel.occupancy:.0%}"
            cells.append(f"{kernel.registers}{busy}" if kernel else "missing")
        rows.append([f"`{some.name}`", str(some.shared), str(some.threads or "–"), *cells])
    return markdown(["kernel", "shared", "threads", *(f"sm_{arch}" for arch in ARCHS)], rows)


def widths(found: Counter[int]) -> str:
    """``48×128 7×64``: how many accesses of how many bits a lane."""
    return " ".join(f"{count}×{bits}" for bits, count in sorted(found.items(), reverse=True)) or "–"


def once_round(loop: Issued) -> list[str]:
    """The cells of a main loop: what it issues, once round."""
    copies = widths(loop.widths("LDGSTS"))
    loads = widths(loop.widths("LDG", "LD"))
    shared = " ".join(
        filter(None, [widths(loop.widths("LDS")), f"{loop.bases['LDSM']} LDSM" * bool(loop.bases["LDSM"])])
    )
    return [
        f"{loop.products} {loop.product} of {len(loop.instructions)}",
        shared.removeprefix("– "),
        f"{loads} · async {copies}" if copies != "–" else loads,
        widths(loop.widths("STS")),
        str(loop.conversions or "–"),
        str(loop.barriers or "–"),
    ]


LOOP_HEAD = ["", "shared loads", "global loads", "shared stores", "conversions", "barriers"]


def share(code: Code | None, bare: bool = False) -> str:
    """``61% to 75% · 9.8``: of a main loop and of its shortest round, perhaps a bare one; for each shared load."""
    if code is None or (loop := code.main_loop) is None:
        return "–"
    most = code.bare_round if bare else code.shortest_round
    return f"{loop.share:.0%}{f' to {most.share:.0%}' if most else ''} · {loop.per_shared_load:.1f}"


def products(kernels: list[Kernel], more: list[list[str]]) -> str:
    """The main loops: shares by architecture, and what one round issues on the first of SHOWN."""
    rows = []
    for archs in by_kernel(kernels):
        loops = {arch: archs[arch].code.main_loop for arch in SHOWN if arch in archs}
        if first := next(filter(None, loops.values()), None):
            name = archs[min(archs)].name
            promise = product(name)
            bare = promise is not None and promise.bare > 0
            shares = [share(archs[a].code if a in archs else None, bare) for a in SHOWN]
            rows.append([f"`{name}`", *shares, *once_round(first)])
    return markdown(["main loop", *(f"sm_{a}" for a in SHOWN), *LOOP_HEAD], rows + more)


def movements(kernels: list[Kernel]) -> str:
    """The kernels without a product: their global loads and stores."""

    def both(kernel: Kernel | None) -> str:
        if kernel is None:
            return "–"
        whole = kernel.code.whole
        return f"{widths(whole.widths('LDG', 'LD'))} → {widths(whole.widths('STG', 'ST'))}"

    rows = [
        [f"`{archs[min(archs)].name}`", *(both(archs.get(arch)) for arch in SHOWN)]
        for archs in by_kernel(kernels)
        if not any(kernel.code.main_loop for kernel in archs.values())
    ]
    return markdown(["kernel", *(f"sm_{arch}" for arch in SHOWN)], rows)


def page(kernels: list[Kernel], compiler: str, rivals: list[list[str]]) -> str:
    """``docs/kernels.md``."""
    return f"""# What the compiler makes of every kernel

Compiled by nvcc {compiler}; written by `make kernels`. `tests/static` compiles the same, reads the machine code, and
fails on a spill, on local memory, on a warning, on a missing architecture (stack and spills are 0 everywhere), and on a
main loop that keeps less than `tests/static/promises.py` says. None of this is a measurement: no kernel ran for it.

## Main loops of the products

- Each architecture: share of the multiply-adds in what the loop issues · multiply-adds for each shared load. The first
  share is of all instructions of the loop, each counted once, those too that most rounds pass over (what entering
  another tap costs, the edges of an image, the gathering of an unpooled source): a lower bound. The second is of the
  shortest way round that multiplies all, reads global memory and fills shared memory: an upper bound, reached by rounds
  that enter no other tap and, where a halo comes by and by, bring nothing of it. Of images of few channels
  (`patch_kernel`), whose weights stay in shared memory, it is of the rounds that bring nothing and wait for nobody.
- The other columns: once round the loop on sm_{SHOWN[0]}; accesses as *count×bits a lane*.
- CUTLASS: the same of its kernels for sm_80, from the headers of pip's package compiled by the same nvcc, for scale.

{products(kernels, rivals)}

## Global accesses of the kernels that move data

*Loads → stores* in the code of the whole kernel (bytes of switches and positions among them), as *count×bits a lane*.

{movements(kernels)}

## Registers, shared memory, occupancy

- **shared**: static shared memory of a block in bytes; **threads**: the launch bound (– where the source states none).
- Each architecture: registers a thread · theoretical occupancy at that bound (a model, not a measurement).

{resources(kernels)}
"""


def main(rivals: Callable[[], list[list[str]]] = list) -> None:
    kernels = compile_all()
    toolkit = build.find_toolkit()
    assert toolkit
    print(page(kernels, ".".join(map(str, toolkit.version())), rivals()), end="")
