"""Static evidence: every kernel compiles for every architecture, without spills, local memory or stray PTX."""

from __future__ import annotations

import os
import re

import pytest
from cubins import ARCHS, ROOT, Kernel, build, compile_all, table


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    if build.find_toolkit() is None and not os.environ.get("CI"):
        pytest.skip("there is no nvcc: install a CUDA toolkit, or connect to pip's index")
    found = compile_all()
    print("\n" + table(found))
    return found


def test_no_architecture_is_missing(kernels: list[Kernel]) -> None:
    names = {(k.file, k.name) for k in kernels}
    assert {(k.file, k.name, k.arch) for k in kernels} == {(*name, arch) for name in names for arch in ARCHS}


def test_every_launched_kernel_is_reported(kernels: list[Kernel]) -> None:
    sources = [path for path in (ROOT / "csrc/cuda").iterdir() if path.suffix in (".cu", ".cuh")]
    defined = {name for path in sources for name in re.findall(r"__global__[^;{]*?(\w+_kernel)\(", path.read_text())}
    assert defined == {kernel.name.partition("<")[0] for kernel in kernels}


def test_no_spills_and_no_local_memory(kernels: list[Kernel]) -> None:
    bad = [f"{k.file}: {k.name} on sm_{k.arch}: stack {k.stack}, spills {k.spills}" for k in kernels]
    bad = [line for line in bad if not line.endswith("stack 0, spills 0")]
    assert not bad, "\n".join(bad)


def test_every_kernel_can_be_resident(kernels: list[Kernel]) -> None:
    assert not [f"{k.name} on sm_{k.arch}" for k in kernels if k.occupancy == 0]


def test_inline_ptx_stays_in_the_port_header() -> None:
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh")]
    with_asm = {path.name for path in sources if re.search(r"\b(__)?asm(__)?\s*(volatile\s*)?\(", path.read_text())}
    assert with_asm <= {"port.cuh"}


# The report's parser must be able to fail: these are a kernel that keeps an array in local memory and one that spills.
SPILLING = """
__global__ void __launch_bounds__(1024) spilling_kernel(float* p) {
    float a[128];
    #pragma unroll
    for (int i = 0; i < 128; ++i) a[i] = p[i * 1024 + threadIdx.x];
    __syncthreads();
    #pragma unroll
    for (int i = 0; i < 128; ++i) p[i * 1024 + threadIdx.x] = a[i] * a[127 - i];
}
__global__ void indexing_kernel(float* p, const int* at) {
    float a[64];
    for (int i = 0; i < 64; ++i) a[i] = p[i];
    for (int i = 0; i < 64; ++i) a[at[i]] += 1;
    for (int i = 0; i < 64; ++i) p[i] = a[i];
}
"""


def test_the_report_sees_spills_local_memory_and_launch_bounds(
    tmp_path, monkeypatch: pytest.MonkeyPatch, kernels: list[Kernel]
) -> None:
    import cubins as module

    (tmp_path / "csrc/cuda").mkdir(parents=True)
    (tmp_path / "csrc/cuda/bad.cu").write_text(SPILLING)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "FOLDER", tmp_path / "build")
    monkeypatch.setattr(module, "ARCHS", {80: ARCHS[80]})
    by_name = {kernel.name: kernel for kernel in compile_all()}
    assert by_name["spilling_kernel"].spills > 0
    assert by_name["spilling_kernel"].threads == 1024
    assert by_name["indexing_kernel"].stack >= 256
    assert by_name["indexing_kernel"].threads is None
