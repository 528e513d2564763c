"""How the core is built: choice of compiler and architectures, its errors, and what the modules depend on."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from zfcuda import core

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """csrc/build.py on a machine without CUDA: nothing in CUDA_HOME, on the PATH, from pip; no GPU."""
    spec = importlib.util.spec_from_file_location("zfcuda_build", ROOT / "csrc/build.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    for name in ("CUDA_HOME", "ZFCUDA_CUDA", "ZFCUDA_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(module, "NVCC_FOLDER", tmp_path / "nothing")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    return module


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def fake_nvcc(root: Path, version: str) -> Path:
    return script(
        root / "bin/nvcc",
        f"""case "$1" in
        --dryrun) echo '#$ TOP={root}/bin/..' >&2;;
        --version) echo 'Cuda compilation tools, release {version}, V{version}.1';;
        --list-gpu-code) echo sm_75; echo sm_80; echo sm_90;;
        esac""",
    )


def test_toolkit_of_cuda_home_comes_before_the_path(build, tmp_path, monkeypatch) -> None:
    fake_nvcc(tmp_path, "12.8")
    home = fake_nvcc(tmp_path / "home", "12.4")
    assert build.find_toolkit().version() == (12, 8)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert build.find_toolkit().nvcc == home


def test_a_toolkit_older_than_12_4_is_passed_over(build, tmp_path, monkeypatch) -> None:
    fake_nvcc(tmp_path, "12.3")
    assert build.find_toolkit() is None
    monkeypatch.setattr(build, "NVCC_FOLDER", tmp_path / "pip")
    fake_nvcc(tmp_path / "pip/nvidia/cu13", "13.0")
    assert build.find_toolkit().version() == (13, 0)


def test_pip_brings_nvcc_only_where_it_is_missing_and_wanted(build, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    assert build.missing_nvcc_packages() == build.NVCC_PACKAGES
    monkeypatch.setenv("ZFCUDA_CUDA", "off")
    assert build.missing_nvcc_packages() == ()
    monkeypatch.setenv("ZFCUDA_CUDA", "auto")
    monkeypatch.setattr(build.platform, "machine", lambda: "ppc64le")
    assert build.missing_nvcc_packages() == ()
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    fake_nvcc(tmp_path, "13.0")
    assert build.missing_nvcc_packages() == ()


def test_choices_without_a_compiler(build, monkeypatch) -> None:
    assert build.choose_toolkit() is None
    monkeypatch.setenv("ZFCUDA_CUDA", "on")
    with pytest.raises(SystemExit, match=r"ZFCUDA_CUDA=on.*no nvcc.*pip install nvidia-cuda-nvcc"):
        build.choose_toolkit()
    monkeypatch.setenv("ZFCUDA_CUDA", "yes")
    with pytest.raises(SystemExit, match="'yes'; it must be auto, on or off"):
        build.choose_toolkit()


@pytest.mark.parametrize(
    "gpus, chosen, archs",
    [
        (None, None, [75, 80, 90]),  # the default ones that this nvcc knows
        ("9.0\\n9.0", None, [90]),
        ("7.0", None, [75, 80, 90]),  # a GPU that this nvcc does not know
        ("9.0", "80, 86;120", [80, 86, 120]),
    ],
)
def test_architectures(build, tmp_path, monkeypatch, gpus, chosen, archs) -> None:
    fake_nvcc(tmp_path, "13.0")
    if gpus:
        script(tmp_path / "bin/nvidia-smi", f"printf '{gpus}\\n'")
    if chosen:
        monkeypatch.setenv("ZFCUDA_CUDA_ARCHS", chosen)
    assert build.choose_archs(build.find_toolkit()) == archs


def test_a_missing_cxx_compiler_is_named(build, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SystemExit, match=r"no C\+\+ compiler 'no-such-compiler'; install one"):
        build.ninja([], tmp_path, tmp_path)


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf (binutils)")
def test_the_core_depends_on_neither_torch_nor_the_cuda_runtime() -> None:
    modules = [path for folder in core.__path__ for path in Path(folder).glob("_*.so")]
    needed = subprocess.run(["readelf", "-d", *modules], capture_output=True, text=True, check=True).stdout
    libraries = {line.split("[")[1].rstrip("]") for line in needed.splitlines() if "(NEEDED)" in line}
    assert "libgomp.so.1" in libraries
    assert not [name for name in libraries if name.startswith(("libtorch", "libc10", "libcuda", "libnv", "libpython"))]


def test_the_modules_can_be_used_without_torch_in_the_process() -> None:
    modules = [path for folder in core.__path__ for path in Path(folder).glob("_*.so")]
    code = (
        "import importlib.util, sys; from pathlib import Path\n"
        "for path in sys.argv[1:]:\n"
        "    spec = importlib.util.spec_from_file_location(Path(path).name.split('.')[0], path)\n"
        "    module = importlib.util.module_from_spec(spec)\n"
        "    spec.loader.exec_module(module)\n"
        "    print(module.target())\n"
        "assert 'torch' not in sys.modules"
    )
    out = subprocess.run([sys.executable, "-c", code, *modules], capture_output=True, text=True, env=os.environ)
    assert len(out.stdout.splitlines()) == len(modules) >= 1, out.stderr
