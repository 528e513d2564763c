"""Static evidence: every kernel compiles for every architecture, without spills, local memory or stray PTX."""

from __future__ import annotations

import os
import re

import promises
import pytest
import sass
from cubins import ARCHS, ROOT, Kernel, build, compile_all
from report import page

#: Bytes of the types that kernels move, as the compiler writes them.
BYTES = {"unsigned char": 1, "unsigned short": 2, "__half": 2, "__nv_bfloat16": 2, "unsigned int": 4, "float": 4}


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    if build.find_toolkit() is None and not os.environ.get("CI"):
        pytest.skip("there is no nvcc: install a CUDA toolkit, or connect to pip's index")
    found = compile_all()
    print("\n" + page(found, "", []))
    return found


@pytest.fixture(scope="module")
def loops(kernels: list[Kernel]) -> list[tuple[Kernel, sass.Issued]]:
    """The products and their main loops."""
    return [(kernel, loop) for kernel in kernels if (loop := kernel.code.main_loop)]


def test_no_architecture_is_missing(kernels: list[Kernel]) -> None:
    names = {(k.file, k.name) for k in kernels}
    assert {(k.file, k.name, k.arch) for k in kernels} == {(*name, arch) for name in names for arch in ARCHS}


def test_every_launched_kernel_is_reported(kernels: list[Kernel]) -> None:
    sources = [path for path in (ROOT / "csrc/cuda").iterdir() if path.suffix in (".cu", ".cuh")]
    defined = {name for path in sources for name in re.findall(r"__global__[^;{]*?(\w+_kernel)\(", path.read_text())}
    assert defined == {kernel.name.partition("<")[0] for kernel in kernels}


def test_no_spills_and_no_local_memory(kernels: list[Kernel]) -> None:
    bad = [
        f"{k.file}: {k.name} on sm_{k.arch}: stack {k.stack}, spills {k.spills}, {k.code.whole.local} local accesses"
        for k in kernels
        if k.stack or k.spills or k.code.whole.local
    ]
    assert not bad, "\n".join(bad)


def test_every_kernel_can_be_resident(kernels: list[Kernel]) -> None:
    assert not [f"{k.name} on sm_{k.arch}" for k in kernels if k.occupancy == 0]


def broken(kernel: Kernel, loop: sass.Issued) -> list[str]:
    """The promises that a main loop breaks."""
    promise = promises.product(kernel.name)
    if promise is None:
        return [f"state its share in promises.py: {loop.share:.1%}, {loop.per_shared_load:.2f} for each shared load"]
    problems = []
    if loop.share < promise.share:
        problems.append(f"{loop.products} {loop.product} of {len(loop.instructions)} are less than {promise.share:.0%}")
    if loop.per_shared_load < promise.per_shared_load:
        problems.append(f"{loop.per_shared_load:.2f} for each shared load, less than {promise.per_shared_load}")
    if promise.round and ((best := kernel.code.shortest_round) is None or best.share < promise.round):
        problems.append(f"its shortest round is {best and f'{best.share:.1%}'}, less than {promise.round:.0%}")
    if promise.bare and ((bare := kernel.code.bare_round) is None or bare.share < promise.bare or bare.waits):
        problems.append(f"its bare round is {bare and f'{bare.share:.1%}, {bare.waits} waits'}, not {promise.bare:.0%}")
    if not promise.copies_narrow and set(loop.widths("LDGSTS")) - {128}:
        problems.append(f"asynchronous copies of {dict(loop.widths('LDGSTS'))} bits, not 128")
    tf32 = any(i.base == "HMMA" and "TF32" in i.opcode for i in loop.instructions)
    if tf32 and loop.conversions and not promise.converts:
        problems.append(f"{loop.conversions} conversions")
    return problems


def test_main_loops_keep_their_promises(loops: list[tuple[Kernel, sass.Issued]]) -> None:
    bad = [f"{k.name} on sm_{k.arch}: {problem}" for k, loop in loops for problem in broken(k, loop)]
    assert not bad, "\n".join(bad)


def test_every_promise_is_somebodys(loops: list[tuple[Kernel, sass.Issued]]) -> None:
    kept = {promises.product(kernel.name) for kernel, _ in loops}
    assert [p.kernel for p in promises.PRODUCTS if p not in kept] == []


def too_narrow(kernel: Kernel) -> str | None:
    """A kernel for vectors, ``…_kernel<float, 4>``, loads and stores them whole."""
    found = re.search(r"<([\w ]+), (\d+)>$", kernel.name)
    if not found or found[1] not in BYTES or kernel.name in promises.NARROW:
        return None
    bits = 8 * BYTES[found[1]] * int(found[2])
    loads, stores = (max(kernel.code.whole.widths(*names), default=0) for names in (("LDG", "LD"), ("STG", "ST")))
    whole = loads >= bits <= stores
    return None if whole else f"{kernel.name} on sm_{kernel.arch}: loads {loads}, stores {stores}, not {bits} bits"


def test_vectors_move_whole(kernels: list[Kernel]) -> None:
    assert not [problem for kernel in kernels if (problem := too_narrow(kernel))]


def test_static_shared_memory_fits_everywhere(kernels: list[Kernel]) -> None:
    """48 KiB. The dynamic part of a launch is checked by the emulator, as sm_86 (99 KiB)."""
    assert not [f"{k.name} on sm_{k.arch}: {k.shared}" for k in kernels if k.shared > 48 * 1024]


def test_inline_ptx_stays_in_the_port_header() -> None:
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh")]
    with_asm = {path.name for path in sources if re.search(r"\b(__)?asm(__)?\s*(volatile\s*)?\(", path.read_text())}
    assert with_asm <= {"port.cuh"}


# The report must be able to fail: kernels that spill, that keep an array in local memory, that promise a product and
# spend their slots on something else, that copy asynchronously by 4 bytes, that round to tf32 in the loop.
BAD = """
#include <cstdint>
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
template <typename T, int kVector>
__global__ void moving_kernel(const T* from, T* to) {
    #pragma unroll
    for (int i = 0; i < kVector; ++i) to[threadIdx.x * kVector + i] = from[threadIdx.x * kVector + i];
}
template __global__ void moving_kernel<float, 4>(const float*, float*);
__global__ void product_kernel(const float* a, const float* b, float* c, int chunks) {
    __shared__ float left[16 * 64], right[16 * 4];
    float sum[4][4] = {};
    for (int chunk = 0; chunk < chunks; ++chunk) {
        left[threadIdx.x] = a[chunk * 1024 + threadIdx.x];
        if (threadIdx.x < 64) right[threadIdx.x] = b[chunk * 64 + threadIdx.x];
        __syncthreads();
        #pragma unroll
        for (int k = 0; k < 16; ++k)
            #pragma unroll
            for (int i = 0; i < 4; ++i)
                #pragma unroll
                for (int j = 0; j < 4; ++j) sum[i][j] += left[k * 64 + 4 * (threadIdx.x % 16) + i] * right[k * 4 + j];
        __syncthreads();
    }
    for (int i = 0; i < 16; ++i) c[threadIdx.x * 16 + i] = sum[i / 4][i % 4];
}
__global__ void rounding_kernel(const float* from, float* to, int steps) {
    __shared__ float shared[32];
    float d[4] = {};
    for (int step = 0; step < steps; ++step) {
        const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(shared + threadIdx.x));
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(at), "l"(from + 32 * step + threadIdx.x));
        asm volatile("cp.async.wait_all;" ::: "memory");
        __syncthreads();
        std::uint32_t x;
        asm volatile("cvt.rna.tf32.f32 %0, %1;" : "=r"(x) : "f"(shared[threadIdx.x ^ 1]));
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %4, %4, %4}, {%4, %4}, "
                     "{%0, %1, %2, %3};" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(x));
        __syncthreads();
    }
    for (int i = 0; i < 4; ++i) to[threadIdx.x * 4 + i] = d[i];
}
"""


@pytest.fixture
def bad(tmp_path, monkeypatch: pytest.MonkeyPatch, kernels: list[Kernel]) -> dict[str, Kernel]:
    import cubins as module

    (tmp_path / "csrc/cuda").mkdir(parents=True)
    (tmp_path / "csrc/cuda/bad.cu").write_text(BAD)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "FOLDER", tmp_path / "build")
    monkeypatch.setattr(module, "ARCHS", {80: ARCHS[80]})
    return {kernel.name: kernel for kernel in compile_all()}


def test_the_report_sees_what_is_bad(bad: dict[str, Kernel], monkeypatch: pytest.MonkeyPatch) -> None:
    assert bad["spilling_kernel"].spills > 0
    assert bad["spilling_kernel"].threads == 1024
    assert bad["spilling_kernel"].code.whole.local > 0
    assert bad["indexing_kernel"].stack >= 256
    assert bad["indexing_kernel"].code.whole.local > 0
    assert bad["indexing_kernel"].threads is None
    assert (
        too_narrow(bad["moving_kernel<float, 4>"])
        == "moving_kernel<float, 4> on sm_80: loads 32, stores 32, not 128 bits"
    )

    def problems(name: str, **promise: object) -> str:
        loop = bad[name].code.main_loop
        assert loop
        monkeypatch.setattr(
            promises, "PRODUCTS", [promises.Product(name, **{"share": 0, "per_shared_load": 0} | promise)]
        )
        return "; ".join(broken(bad[name], loop))

    loop = bad["product_kernel"].code.main_loop
    assert loop and (loop.product, loop.products) == ("FFMA", 256)
    assert loop.barriers == 2
    assert loop.widths("LDS") == {128: 32}
    assert loop.widths("LDG") == {32: 2}
    assert problems("product_kernel") == ""
    assert "less than 99%" in problems("product_kernel", share=0.99)
    most = bad["product_kernel"].code.shortest_round
    assert most and most.products == loop.products and loop.share <= most.share < 0.99
    assert f"its shortest round is {most.share:.1%}, less than 99%" in problems("product_kernel", round=0.99)
    assert problems("product_kernel", per_shared_load=9) == "8.00 for each shared load, less than 9"
    monkeypatch.setattr(promises, "PRODUCTS", [])
    assert broken(bad["product_kernel"], loop)[0].startswith("state its share")
    assert re.fullmatch(r"asynchronous copies of \{32: \d\} bits, not 128; \d conversions", problems("rounding_kernel"))
    assert problems("rounding_kernel", converts="a reason", copies_narrow="a reason") == ""


LISTING = """
.text.two_loops_kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDS.128 R4, [R2] ;
.L_x_2:
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0030*/               @P0 CALL.REL.NOINC `(.L_x_4) ;
        /*0040*/              @!P1 BRA `(.L_x_2) ;
        /*0050*/                   BRA.U UP0, `(.L_x_1) ;
.L_x_3:
        /*0060*/                   BRA `(.L_x_3);
.L_x_4:
        /*0070*/                   LDG.E.64.CONSTANT R6, desc[UR4][R2.64] ;
        /*0080*/                   BRA `(.L_x_2) ;
"""


def test_the_innermost_loop_is_found_with_what_lies_out_of_line() -> None:
    code = sass.parse(LISTING)["two_loops_kernel"]
    assert {frozenset({2, 3, 4, 7, 8}), frozenset({1, 2, 3, 4, 5, 7, 8}), frozenset({6})} == set(code.loops)
    assert code.main_loop
    assert [i.opcode for i in code.main_loop.instructions][-2:] == ["LDG.E.64.CONSTANT", "BRA"]
    assert code.main_loop.widths("LDG") == {64: 1}
    assert code.main_loop.product == "HMMA"
