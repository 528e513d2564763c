"""What ``zfcuda info`` tells: versions, the compiled core, the machine, and what is missing with its remedy."""

from __future__ import annotations

import dataclasses
import importlib
import json
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch
from rich.console import Console
from rich.table import Table

import zfcuda
from zfcuda import core

REINSTALL = "pip install --force-reinstall --no-deps ."


@dataclass(frozen=True)
class Gpu:
    """A GPU: its name, its architecture (90 for sm_90) and, where the core sees it, its memory."""

    name: str
    arch: int
    bytes: int = 0


@dataclass(frozen=True)
class Cuda:
    """The CUDA module: the toolkit it was built with, its targets, and the driver (0, 0 for none) and GPUs it sees."""

    toolkit: tuple[int, int]
    targets: list[str]
    driver: tuple[int, int]
    gpus: list[Gpu]


@dataclass(frozen=True)
class Cpu:
    """The CPU modules: levels built, the best level of this machine, the one in use, and the OpenMP runtimes."""

    built: list[str]
    machine: str
    in_use: str
    threads: int
    openmp: list[str]


@dataclass(frozen=True)
class Facts:
    """All that ``zfcuda info`` knows. ``cuda`` is None where zfcuda was built for the CPU only."""

    zfcuda: str
    torch: str
    torch_cuda: str | None
    python: str
    system: str
    cpu: Cpu
    cuda: Cuda | None
    present: list[Gpu] = field(default_factory=list)
    display_driver: str | None = None

    @property
    def missing(self) -> list[tuple[str, str]]:
        """Each thing that is missing or worth knowing, with its remedy."""
        return [*_missing_cuda(self), *_missing_torch(self), *_missing_openmp(self)]


def _built(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"zfcuda.core.{name}")
    except ModuleNotFoundError:
        return None


def _cpu() -> Cpu:
    in_use = core.cpu()
    levels = [module.target() for level in ("baseline", "v3", "v4") if (module := _built(f"_cpu_{level}"))]
    mapped = set(re.findall(r"\S*/lib(?:gomp|i?omp)[^/\s]*\.so\S*", Path("/proc/self/maps").read_text()))
    return Cpu(levels, in_use.machine(), in_use.target(), torch.get_num_threads(), sorted(mapped))


def _cuda_version(number: str) -> tuple[int, int]:
    return int(number) // 1000, int(number) % 1000 // 10


def _cuda() -> Cuda | None:
    module = _built("_cuda")
    if module is None:
        return None
    lines = [line.split(" ", 1) for line in module.machine().splitlines()]
    versions = {key: _cuda_version(value) for key, value in lines if key != "device"}
    devices = [value.split("|") for key, value in lines if key == "device"]
    gpus = [Gpu(name, int(arch.removeprefix("sm_")), int(size)) for name, arch, size in devices]
    return Cuda(versions["runtime"], module.target().split(), versions["driver"], gpus)


def _nvidia_smi() -> tuple[list[Gpu], str | None]:
    """The GPUs that are there, whether the core can use them or not, and the version of their driver."""
    if shutil.which("nvidia-smi") is None:
        return [], None
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    out = subprocess.run(query, capture_output=True, text=True)
    rows = [line.split(", ") for line in out.stdout.splitlines()] if out.returncode == 0 else []
    return [Gpu(row[0], int(row[1].replace(".", ""))) for row in rows], rows[0][2] if rows else None


def collect() -> Facts:
    """Gather the facts of this process and machine."""
    present, driver = _nvidia_smi()
    return Facts(
        zfcuda=zfcuda.__version__,
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        cpu=_cpu(),
        cuda=_cuda(),
        present=present,
        display_driver=driver,
    )


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _missing_cuda(facts: Facts) -> list[tuple[str, str]]:
    cuda = facts.cuda
    if cuda is None:
        return [("zfcuda was built for the CPU only", f"reinstall from its source: ZFCUDA_CUDA=on {REINSTALL}")]
    if cuda.driver == (0, 0) and not facts.present:
        return [("no NVIDIA GPU", f"the CPU serves every operator; for a GPU install {_driver_for(cuda)}")]
    if cuda.driver[0] < cuda.toolkit[0]:
        return [
            (
                f"the driver serves CUDA {_dotted(cuda.driver)}, the kernels were built with {_dotted(cuda.toolkit)}",
                f"update to {_driver_for(cuda)}, or build with the driver's own toolkit, 12.4 or later: "
                f"CUDA_HOME=/usr/local/cuda-{_dotted(cuda.driver)} {REINSTALL}",
            )
        ]
    if not cuda.gpus:
        return [("CUDA sees no GPU", "check CUDA_VISIBLE_DEVICES and the output of nvidia-smi")]
    return [problem for gpu in cuda.gpus if (problem := _missing_arch(gpu, cuda.targets))]


def _driver_for(cuda: Cuda) -> str:
    """The oldest display driver of the toolkit's major version, in words."""
    return {12: "a driver of at least 525", 13: "a driver of at least 580"}.get(
        cuda.toolkit[0], f"a driver that serves CUDA {cuda.toolkit[0]}"
    )


def _missing_arch(gpu: Gpu, targets: list[str]) -> tuple[str, str] | None:
    """What happens on a GPU that no target names: the binary of a smaller minor version, PTX, or nothing."""
    numbers = [(kind, int(arch)) for kind, _, arch in (target.partition("_") for target in targets)]
    if any(kind == "sm" and arch // 10 == gpu.arch // 10 and arch <= gpu.arch for kind, arch in numbers):
        return None
    remedy = f"ZFCUDA_CUDA_ARCHS={gpu.arch} {REINSTALL}"
    if any(kind == "compute" and arch <= gpu.arch for kind, arch in numbers):
        return (f"{gpu.name} (sm_{gpu.arch}): the driver compiles the kernels from PTX, once, at first use", remedy)
    return (f"{gpu.name} (sm_{gpu.arch}): no kernel was compiled for it", remedy)


def _missing_torch(facts: Facts) -> list[tuple[str, str]]:
    if facts.torch_cuda is None and (facts.present or (facts.cuda and facts.cuda.gpus)):
        return [
            (f"torch {facts.torch} has no CUDA, so no tensor reaches the GPU", "pip install --force-reinstall torch")
        ]
    return []


def _missing_openmp(facts: Facts) -> list[tuple[str, str]]:
    if len(facts.cpu.openmp) < 2:
        return []
    return [
        (
            "two OpenMP runtimes, each with its own threads: " + ", ".join(facts.cpu.openmp),
            "results are right; for speed use a torch that brings libgomp.so.1 under this name (2.13 does)",
        )
    ]


def to_json(facts: Facts) -> str:
    """The facts as one JSON object."""
    missing = [{"what": what, "remedy": remedy} for what, remedy in facts.missing]
    return json.dumps(dataclasses.asdict(facts) | {"missing": missing}, indent=2)


def _rows(facts: Facts) -> list[tuple[str, str]]:
    cpu, cuda = facts.cpu, facts.cuda
    rows = [
        ("zfcuda", facts.zfcuda),
        ("torch", f"{facts.torch} (CUDA {facts.torch_cuda or 'none'})"),
        ("Python", f"{facts.python} on {facts.system}"),
        ("CPU kernels", ", ".join(cpu.built)),
        ("CPU in use", f"{cpu.in_use} (this machine: {cpu.machine}), {cpu.threads} threads"),
        ("OpenMP", "\n".join(cpu.openmp) or "none"),
        ("CUDA kernels", f"{' '.join(cuda.targets)}, toolkit {_dotted(cuda.toolkit)}" if cuda else "not built"),
    ]
    serves = f", CUDA {_dotted(cuda.driver)}" if cuda and cuda.driver != (0, 0) else ""
    rows.append(("driver", (facts.display_driver or "none") + serves))
    usable = cuda.gpus if cuda else []
    sizes = [f"{g.name}, sm_{g.arch}" + (f", {g.bytes / 2**30:.0f} GiB" if g.bytes else "") for g in usable]
    rows.append(("GPUs", "\n".join(sizes or [f"{g.name}, sm_{g.arch}, not usable" for g in facts.present]) or "none"))
    return rows


def show(facts: Facts) -> None:
    """Print the facts as tables."""
    console = Console()
    table = Table(show_header=False, box=None)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in _rows(facts):
        table.add_row(f"[bold]{row[0]}", row[1])
    console.print(table)
    for what, remedy in facts.missing:
        console.print(f"[yellow]![/] {what}\n  [dim]{remedy}[/]", soft_wrap=True, highlight=False)
