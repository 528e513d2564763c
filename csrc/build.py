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
import re
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

#: Architectures of a source build on a machine without a GPU; 80 covers 86 and 89. 100 is there because neither 90's
#: binaries nor 120's PTX run on it.
DEFAULT_ARCHS = (75, 80, 90, 100, 120)

#: The compiler from pip, of one CUDA version: 13.0, which every driver from 580 on runs.
NVCC_PACKAGES = (
    "nvidia-cuda-nvcc==13.0.*",
    "nvidia-nvvm==13.0.*",
    "nvidia-cuda-crt==13.0.*",
    "nvidia-cuda-runtime==13.0.*",
    "nvidia-cuda-cccl==13.0.*",
)

#: Where the tests have NVCC_PACKAGES put: beside torch they might replace its CUDA runtime.
NVCC_FOLDER = CSRC.parent / "build/cuda"


@dataclass(frozen=True)
class Toolkit:
    """An nvcc with the folders of its headers and libraries."""

    nvcc: Path
    include: Path
    libraries: Path

    def version(self) -> tuple[int, int]:
        out = subprocess.run([self.nvcc, "--version"], capture_output=True, text=True, check=True)
        major, minor = out.stdout.split("release ")[1].split(",")[0].split(".")
        return int(major), int(minor)

    def archs(self) -> set[int]:
        """The architectures it compiles for."""
        out = subprocess.run([self.nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True)
        return {int(line.removeprefix("sm_")) for line in out.stdout.split()}


def _nvcc_candidates() -> Iterable[Path]:
    if home := os.environ.get("CUDA_HOME"):
        yield Path(home, "bin/nvcc")
    if on_path := shutil.which("nvcc"):
        yield Path(on_path)
    spec = importlib.util.find_spec("nvidia")
    for folder in [NVCC_FOLDER / "nvidia", *(spec.submodule_search_locations or () if spec else ())]:
        yield from sorted(Path(folder).glob("cu*/bin/nvcc"))


def find_toolkit() -> Toolkit | None:
    """The toolkit, 12.4 or later, of ``CUDA_HOME``, of the PATH, or of the ``nvidia-*`` pip packages."""
    for nvcc in filter(Path.exists, _nvcc_candidates()):
        out = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
        top = next(line.split("TOP=")[1] for line in out.stderr.splitlines() if "TOP=" in line)
        root = Path(top.strip()).resolve()
        libraries = root / ("lib64" if (root / "lib64").exists() else "lib")  # pip's lie in lib
        toolkit = Toolkit(nvcc, root / "include", libraries)
        if toolkit.version() >= (12, 4):
            return toolkit
    return None


def choose_toolkit() -> Toolkit | None:
    """The CUDA toolkit to build with, or None for a CPU-only build, by ZFCUDA_CUDA=auto|on|off."""
    choice = os.environ.get("ZFCUDA_CUDA", "auto")
    if choice not in ("auto", "on", "off"):
        sys.exit(f"zfcuda: ZFCUDA_CUDA is {choice!r}; it must be auto, on or off")
    toolkit = find_toolkit() if choice != "off" else None
    if choice == "on" and toolkit is None:
        sys.exit(
            "zfcuda: ZFCUDA_CUDA=on, but there is no nvcc, 12.4 or later, in CUDA_HOME, on the PATH or from pip; "
            f"install a CUDA toolkit, or: pip install {' '.join(NVCC_PACKAGES)}"
        )
    return toolkit


def missing_nvcc_packages() -> tuple[str, ...]:
    """What pip must install to compile the CUDA kernels: nothing where that is there or not wanted."""
    possible = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
    wanted = os.environ.get("ZFCUDA_CUDA") != "off"
    return NVCC_PACKAGES if possible and wanted and find_toolkit() is None else ()


def gpu_archs() -> set[int]:
    """The architectures of the GPUs of this machine, from ``nvidia-smi``."""
    if shutil.which("nvidia-smi") is None:
        return set()
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    out = subprocess.run(query, capture_output=True, text=True)
    lines = out.stdout.split() if out.returncode == 0 else []
    return {int(line.replace(".", "")) for line in lines if line.replace(".", "").isdigit()}


def choose_archs(toolkit: Toolkit) -> list[int]:
    """``ZFCUDA_CUDA_ARCHS``, else the architectures of the GPUs present, else the default ones."""
    if chosen := os.environ.get("ZFCUDA_CUDA_ARCHS"):
        return [int(arch) for arch in re.split(r"[\s,;]+", chosen.strip())]
    supported = toolkit.archs()
    return sorted(gpu_archs() & supported or supported & set(DEFAULT_ARCHS))


@dataclass(frozen=True)
class Module:
    """A Python extension module: sources, each with the compiler rule and the flags that make it."""

    name: str
    objects: Sequence[tuple[Path, str, Sequence[str]]]
    link_flags: Sequence[str] = ()


#: Link flag of the installed modules; the emulator's keep their symbols, to name lines of source.
STRIP = "-Wl,-s"


def extension(name: str, objects: Iterable[tuple[Path, str, Sequence[str]]], link_flags: Sequence[str] = ()) -> Module:
    """The module ``name`` of a backend's sources and the bindings.

    These are the same object for all, under a name of their own that the linker adds the module's to: half of their
    compiler's time is pybind11's headers.
    """
    import pybind11

    # The folders of these headers change with every isolated build; the operators do not see them.
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    bindings = CSRC / "bindings.cpp", "cxx", includes
    return Module(name, [bindings, *objects], [*link_flags, f"-Wl,--defsym=PyInit_{name}=PyInit__core"])


def cpu_modules() -> list[Module]:
    sources = sorted((CSRC / "cpu").glob("*.cpp"))
    return [
        extension(f"_cpu_{level}", [(s, "cxx", ["-fopenmp", *flags]) for s in sources], ["-fopenmp", STRIP])
        for level, flags in CPU_LEVELS.items()
    ]


def cuda_module(toolkit: Toolkit, archs: Iterable[int]) -> Module:
    archs = sorted(archs)
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    flags.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    names = " ".join([f"sm_{a}" for a in archs] + [f"compute_{archs[-1]}"])
    flags.append(f"'-DZF_CUDA_TARGETS=\"{names}\"'")
    sources = sorted((CSRC / "cuda").glob("*.cu"))
    libraries = [f"-L{toolkit.libraries}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    return extension("_cuda", [(s, "nvcc", flags) for s in sources], [*libraries, STRIP])


def ninja(modules: Iterable[Module], out: Path, work: Path, toolkit: Toolkit | None = None) -> None:
    """Build the modules into ``out`` in parallel, keeping objects in ``work``."""
    cxx = os.environ.get("CXX", "g++")
    if shutil.which(cxx.split()[0]) is None:
        sys.exit(f"zfcuda: there is no C++ compiler {cxx!r}; install one (Debian: apt install g++) or set CXX")
    lines = [
        f"cxx = {cxx}",
        "rule cxx",
        "  command = $cxx -std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wextra -ffp-contract=fast "
        "-fno-math-errno -fno-trapping-math "
        f"-MMD -MF $out.d -I{CSRC} $flags -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc\n  description = $out",
        "rule link",
        "  command = $cxx -shared $in $flags -o $out\n  description = $out",
    ]
    if toolkit:
        lines += [
            "rule nvcc",
            f"  command = {toolkit.nvcc} -ccbin $cxx -std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden,-Wall "
            f"-MD -MF $out.d -I{CSRC} -I{toolkit.include} $flags -c $in -o $out",
            "  depfile = $out.d\n  deps = gcc\n  description = $out",
        ]
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    compiled: dict[tuple[Path, str, str], str] = {}
    for module in modules:
        objects = [(source, rule, " ".join(flags)) for source, rule, flags in module.objects]
        for source, rule, flags in objects:
            if (source, rule, flags) not in compiled:
                name = compiled[source, rule, flags] = f"{module.name}/{source.name}.o"
                lines += [f"build {name}: {rule} {source}", f"  flags = {flags}"]
        lines += [
            f"build {out.resolve() / (module.name + suffix)}: link {' '.join(compiled[o] for o in objects)}",
            f"  flags = {' '.join(module.link_flags)}",
        ]
    work.mkdir(parents=True, exist_ok=True)
    (work / "build.ninja").write_text("\n".join(lines) + "\n")
    subprocess.run([sys.executable, "-m", "ninja", "-C", work], check=True)


def fetch_nvcc() -> None:
    """Put nvcc where the tests find it, unless there is one; where pip fails, its message says why."""
    if packages := missing_nvcc_packages():
        print("zfcuda: fetching nvcc, with which the tests compile every kernel", flush=True)
        subprocess.run([sys.executable, "-m", "pip", "install", "--no-deps", "--target", NVCC_FOLDER, *packages])
