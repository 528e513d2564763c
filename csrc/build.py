"""How the sources of this folder become modules.

One description, used by ``setup.py`` (the installed core), by ``tests/simt`` (the emulator) and by
``tests/static`` (compilation for every architecture). A backend is one pybind11 module made of
``bindings.cpp`` and the sources of one folder. The CPU folder is compiled once for each
instruction-set level; ``zfcuda.core`` picks one at import.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).resolve().parent

#: Level of the instruction set -> flags. Exact arithmetic: no flag may reorder a sum.
CPU_LEVELS = {"baseline": []}
if platform.machine() == "x86_64":
    CPU_LEVELS |= {"v3": ["-march=x86-64-v3"], "v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"]}

#: Default architectures of a source build on a machine without a GPU; 80 covers 86 and 89.
DEFAULT_ARCHS = (75, 80, 90, 120)


@dataclass(frozen=True)
class Toolkit:
    """An nvcc with the folders of its headers and libraries."""

    nvcc: Path
    include: Path
    libraries: Path

    def version(self) -> str:
        out = subprocess.run([self.nvcc, "--version"], capture_output=True, text=True, check=True)
        return out.stdout.split("release ")[1].split(",")[0]


def find_toolkit() -> Toolkit | None:
    """The toolkit of ``CUDA_HOME``, of the PATH, or of the ``nvidia-*`` pip packages, in this order."""
    home = os.environ.get("CUDA_HOME")
    nvcc = Path(home, "bin/nvcc") if home else Path(shutil.which("nvcc") or "/nonexistent")
    if nvcc.exists():
        out = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
        top = next(line.split("TOP=")[1] for line in out.stderr.splitlines() if "TOP=" in line)
        root = Path(top.strip()).resolve()
        return Toolkit(nvcc, root / "include", root / "lib64")
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations if spec else ():
        for root in sorted(Path(folder).glob("cu*")):
            if (root / "bin/nvcc").exists():
                return Toolkit(root / "bin/nvcc", root / "include", root / "lib")
    return None


@dataclass(frozen=True)
class Module:
    """A Python extension module: sources, each with the compiler rule and the flags that make it."""

    name: str
    objects: Sequence[tuple[Path, str, Sequence[str]]]
    link_flags: Sequence[str] = ()


def _bindings(name: str) -> tuple[Path, str, Sequence[str]]:
    return CSRC / "bindings.cpp", "cxx", [f"-DZF_MODULE={name}"]


def cpu_modules() -> list[Module]:
    sources = sorted((CSRC / "cpu").glob("*.cpp"))
    return [
        Module(
            f"_cpu_{level}",
            [_bindings(f"_cpu_{level}"), *((s, "cxx", ["-fopenmp", *flags]) for s in sources)],
            ["-fopenmp"],
        )
        for level, flags in CPU_LEVELS.items()
    ]


def cuda_module(toolkit: Toolkit, archs: Iterable[int]) -> Module:
    archs = sorted(archs)
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    flags.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    names = " ".join([f"sm_{a}" for a in archs] + [f"compute_{archs[-1]}"])
    flags.append(f"'-DZF_CUDA_TARGETS=\"{names}\"'")
    sources = sorted((CSRC / "cuda").glob("*.cu"))
    return Module(
        "_cuda",
        [_bindings("_cuda"), *((s, "nvcc", flags) for s in sources)],
        [f"-L{toolkit.libraries}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"],
    )


def ninja(modules: Iterable[Module], out: Path, work: Path, toolkit: Toolkit | None = None) -> None:
    """Build the modules into ``out`` in parallel, keeping objects in ``work``."""
    import pybind11

    includes = f"-I{CSRC} -I{pybind11.get_include()} -I{sysconfig.get_paths()['include']}"
    common = "-std=c++17 -O3 -fPIC -fvisibility=hidden"
    lines = [
        f"cxx = {os.environ.get('CXX', 'g++')}",
        "rule cxx",
        f"  command = $cxx {common} -Wall -Wextra -ffp-contract=fast -fno-math-errno -fno-trapping-math -MMD -MF $out.d {includes} $flags -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc\n  description = $in $flags",
        "rule link",
        "  command = $cxx -shared -Wl,-s $in $flags -o $out\n  description = $out",
    ]
    if toolkit:
        nvcc_includes = f"-I{CSRC} -I{toolkit.include}"
        lines += [
            "rule nvcc",
            f"  command = {toolkit.nvcc} -ccbin $cxx -std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden "
            f"-MD -MF $out.d {nvcc_includes} $flags -c $in -o $out",
            "  depfile = $out.d\n  deps = gcc\n  description = $in",
        ]
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    for module in modules:
        names = []
        for source, rule, flags in module.objects:
            names.append(f"{module.name}/{source.name}.o")
            lines += [f"build {names[-1]}: {rule} {source}", f"  flags = {' '.join(flags)}"]
        lines += [
            f"build {out.resolve() / (module.name + suffix)}: link {' '.join(names)}",
            f"  flags = {' '.join(module.link_flags)}",
        ]
    work.mkdir(parents=True, exist_ok=True)
    (work / "build.ninja").write_text("\n".join(lines) + "\n")
    subprocess.run([sys.executable, "-m", "ninja", "-C", work], check=True)
