"""NVRTC compiles the kernels, their headers and the example of docs/cupy.md, on every architecture."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import nvrtc
import pytest
import torch
from nvrtc import ROOT, Nvrtc

import simt.build
from simt.harness import Emulated, Out
from zfcuda import reference

ARCHS = nvrtc.VERSIONS["13.0"].archs
EXAMPLE = re.search(r"```python\n(.*?)```", (ROOT / "docs/cupy.md").read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def compilers() -> dict[str, Nvrtc]:
    return {}


@pytest.fixture
def compiler(compilers: dict[str, Nvrtc], request: pytest.FixtureRequest) -> Nvrtc:
    version = getattr(request, "param", "13.0")
    if version not in compilers:
        compilers[version] = Nvrtc(version)
    return compilers[version]


@pytest.mark.parametrize("arch", ARCHS)
def test_the_headers_compile(compiler: Nvrtc, arch: int) -> None:
    headers = sorted(path.name for path in (ROOT / "csrc/cuda").glob("*.cuh"))
    code = "".join(f'#include "{name}"\n' for name in headers)
    compiler.compile(code, "headers", f"compute_{arch}")


@pytest.mark.parametrize("source", nvrtc.sources(), ids=lambda path: path.stem)
def test_the_sources_compile_with_every_kernel(compiler: Nvrtc, source: Any) -> None:
    ptx = compiler.compile(source.read_text(), source.name, "compute_80")
    kernels = re.findall(r"__global__[^;{]*?(\w+_kernel)\(", source.read_text())
    assert [name for name in kernels if not re.search(rf"\.entry \w*{name}", ptx)] == []


@pytest.mark.slow
@pytest.mark.parametrize("source", nvrtc.sources(), ids=lambda path: path.stem)
@pytest.mark.parametrize(
    ("compiler", "arch"),
    [(name, arch) for name, version in nvrtc.VERSIONS.items() for arch in version.archs],
    indirect=["compiler"],
)
def test_the_sources_compile_by_every_version_for_every_architecture(compiler: Nvrtc, arch: int, source: Any) -> None:
    compiler.compile(source.read_text(), source.name, f"sm_{arch}")


def test_an_error_is_told(compiler: Nvrtc) -> None:
    with pytest.raises(nvrtc.CompileError, match='identifier "nothing" is undefined'):
        compiler.compile('#include "vector.cuh"\n__global__ void kernel() { nothing; }', "bad.cu", "compute_80")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What docs/cupy.md does, with numpy and a recorder in the places of CuPy and the GPU."""
    seen: dict[str, Any] = {}

    def module(code: str, options: tuple[str, ...]) -> SimpleNamespace:
        seen.update(code=code, options=options)
        return SimpleNamespace(get_function=lambda name: lambda *launch: seen.update(name=name, launch=launch))

    generator = np.random.default_rng(0)
    random = SimpleNamespace(standard_normal=generator.standard_normal, randint=generator.integers)
    cupy = SimpleNamespace(RawModule=module, random=random, empty=np.empty, float32=np.float32, uint8=np.uint8)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    assert EXAMPLE
    exec(EXAMPLE[1], seen)
    return seen


@pytest.mark.parametrize("arch", ARCHS)
def test_the_example_compiles(
    compiler: Nvrtc, example: dict[str, Any], arch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    ptx = compiler.compile(example["code"], "example", f"compute_{arch}", example["options"])
    assert f".visible .entry {example['name']}(" in ptx


def test_the_example_runs(example: dict[str, Any], tmp_path: Any) -> None:
    (grid,), (block,), (pooled, switches, maps) = example["launch"]
    call = f"""
#include "../../tests/simt/kernels/call.h"
ZF_EXPORT const char* run(int grid, int block, const float* pooled, const std::uint8_t* switches, float* maps) {{
    const auto go = [&] {{ launch({example["name"]}, dim3(grid), dim3(block), 0, Exec{{}}, pooled, switches, maps); }};
    return message_of(go);
}}
"""
    (tmp_path / "example.cu").write_text(example["code"] + call)
    emulated = object.__new__(Emulated)
    emulated.library = simt.build.controls(simt.build.library("cupy_example", [tmp_path / "example.cu"]))
    emulated.arch = 86
    signal, windows = torch.from_numpy(pooled), torch.from_numpy(switches)
    result = torch.empty(maps.shape)
    emulated("run", grid, block, signal, windows, Out(result))
    expected = reference.max_unpool2d(signal, windows, 3, 2, output_size=maps.shape[-2:]).relu()
    assert torch.equal(result, expected)
