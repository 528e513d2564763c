"""cp.async, ldmatrix and mma against the PTX ISA's tables and exact integer products, on the emulator and on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from simt import build
from simt.harness import Emulated, OnGpu, Out, compile_for_gpu

KINDS = {"tf32": (0, torch.float32, 8), "bf16": (1, torch.bfloat16, 16), "fp16": (2, torch.float16, 16)}


@pytest.fixture(scope="module", params=["simt", "simt_fast", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernels(request):
    if request.param != "cuda":
        return Emulated("product", fast=request.param == "simt_fast")
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU: torch.cuda.is_available() is False")
    if build.build.find_toolkit() is None:
        pytest.skip("needs nvcc to compile the kernels for the GPU")
    return OnGpu("product")


def integers(size: tuple[int, ...], bound: int, seed: int) -> Tensor:
    return torch.randint(-bound, bound + 1, size, generator=torch.Generator().manual_seed(seed)).float()


def bits(tensor: Tensor) -> Tensor:
    """The 32-bit registers of float32 or pairs of 16-bit elements in the last dimension."""
    return tensor.contiguous().view(torch.int32)


# The fragments of the PTX ISA, "Matrix Fragments for mma.m16n8k8" (tf32) and "… mma.m16n8k16" (16 bits), as it
# writes them: element i of a lane is at (row, column).


def fragment_a(kind: str, lane: int, i: int) -> tuple[int, int]:
    group, thread = lane >> 2, lane % 4
    if kind == "tf32":
        return group if i in (0, 2) else group + 8, thread if i in (0, 1) else thread + 4
    row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
    return row, thread * 2 + (i & 1) + (8 if i >= 4 else 0)


def fragment_b(kind: str, lane: int, i: int) -> tuple[int, int]:
    group, thread = lane >> 2, lane % 4
    if kind == "tf32":
        return thread if i == 0 else thread + 4, group
    return thread * 2 + (i & 1) + (8 if i >= 2 else 0), group


def fragment_c(lane: int, i: int) -> tuple[int, int]:
    group, thread = lane >> 2, lane % 4
    return group if i < 2 else group + 8, thread * 2 + (i & 1)


def multiply(kernels, kind: str, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a b + c of one warp, through the fragments."""
    number, dtype, depth = KINDS[kind]
    rows = [[a[fragment_a(kind, lane, i)] for i in range(depth // 2)] for lane in range(32)]
    columns = [[b[fragment_b(kind, lane, i)] for i in range(depth // 4)] for lane in range(32)]
    sums = torch.tensor([[c[fragment_c(lane, i)] for i in range(4)] for lane in range(32)])
    place = [bits(torch.tensor(part).to(dtype)).to(kernels.device) for part in (rows, columns)]
    sums = sums.to(kernels.device)
    result = torch.empty_like(sums)
    kernels("multiply", number, *place, sums, Out(result))
    result = result.cpu()
    matrix = torch.empty(16, 8)
    for lane in range(32):
        for i in range(4):
            matrix[fragment_c(lane, i)] = result[lane, i]
    return matrix


@pytest.mark.parametrize("kind", KINDS)
def test_mma_fragments_one_element_at_a_time(kernels, kind):
    depth = KINDS[kind][2]
    b = torch.arange(1.0, depth * 8 + 1).view(depth, 8)  # distinct, and exact in bf16
    for row in range(16):
        for k in range(depth):
            a, c = torch.zeros(16, depth), torch.zeros(16, 8)
            a[row, k] = 1
            assert torch.equal(multiply(kernels, kind, a, b, c), a @ b)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_mma_of_small_integers(kernels, kind, seed):
    depth = KINDS[kind][2]
    a, b, c = integers((16, depth), 8, seed), integers((depth, 8), 8, seed + 10), integers((16, 8), 100, seed + 20)
    assert torch.equal(multiply(kernels, kind, a, b, c), a @ b + c)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(kernels, transposed, count):
    elements = torch.arange(32 * 8, dtype=torch.int16).view(4, 8, 8)  # matrix, row, column: each value once
    out = torch.empty(32, count, dtype=torch.int32, device=kernels.device)
    kernels("ldmatrix", int(transposed), count, bits(elements).to(kernels.device), Out(out))
    pairs = out.cpu().view(torch.int16).view(32, count, 2)
    for lane in range(32):
        for i in range(count):
            for half in range(2):  # the PTX ISA: row lane / 4, columns 2 (lane % 4) and the next
                row, column = lane // 4, lane % 4 * 2 + half
                expected = elements[i, column, row] if transposed else elements[i, row, column]
                assert pairs[lane, i, half] == expected


@pytest.mark.parametrize("size", [4, 8, 16])
def test_cp_async_fills_with_zeros(kernels, size):
    source = torch.arange(1, 32 * size + 1, dtype=torch.int64).remainder(255).add(1).to(torch.uint8)
    for valid in range(size + 1):
        out = torch.empty(32 * size, dtype=torch.uint8, device=kernels.device)
        kernels("copy", size, valid, source.to(kernels.device), Out(out))
        expected = source.view(32, size).clone()
        expected[:, valid:] = 0
        assert torch.equal(out.cpu().view(32, size), expected)


def test_to_tf32_rounds_to_nearest_ties_away(kernels):
    values = torch.randn(256, generator=torch.Generator().manual_seed(0))
    values[:6] = torch.tensor([0.0, -0.0, 1 + 2**-11, -1 - 2**-11, 1 + 2**-11 - 2**-23, float("inf")])
    out = torch.empty(256, dtype=torch.int32, device=kernels.device)
    kernels("round_to_tf32", values.to(kernels.device), Out(out))
    mantissa, exponent = torch.frexp(values.double())
    scaled = mantissa * 2**11
    rounded = torch.ldexp(torch.sign(scaled) * torch.floor(scaled.abs() + 0.5) / 2**11, exponent)
    rounded[5] = float("inf")
    assert torch.equal(out.cpu().view(torch.float32), rounded.float())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 31, 32, 40])
@pytest.mark.parametrize("depth", [1, 7, 8, 16, 17, 33, 48])
def test_product(kernels, kind, rows, depth):
    number, dtype, _ = KINDS[kind]
    a, b = integers((rows, depth), 8, rows), integers((depth, 8), 8, depth)
    columns = -(-depth // 8) * 8  # a pitch of whole 16-byte pieces; what pads a row is never copied
    padded = torch.full((rows, columns), float("nan"), dtype=dtype)
    padded[:, :depth] = a
    factor = b.to(dtype)
    if kind == "tf32":
        factor = torch.full((8, columns), float("nan"))
        factor[:, :depth] = b.T
    c = torch.empty(rows, 8, device=kernels.device)
    pitch = columns * padded.element_size()
    kernels("product", 0, number, rows, depth, pitch, padded.to(kernels.device), factor.to(kernels.device), Out(c))
    assert torch.equal(c.cpu(), a @ b)


@pytest.mark.parametrize("name", ["product", "bugs"])
@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90", "sm_120"])
def test_nvcc_compiles_the_same_source(tmp_path, name, arch):
    if build.build.find_toolkit() is None:
        pytest.skip("needs nvcc")
    compile_for_gpu(name, tmp_path / "kernels.so", arch)
