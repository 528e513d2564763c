"""CUTLASS's convolutions beside ours: pip's headers, the same nvcc, the same reading of the machine code.

No part of the build, the library or the tests: ``make kernels`` writes the figures into docs/kernels.md, for scale.
"""

from __future__ import annotations

import subprocess

import sass
from report import SHOWN, main, once_round, share
from tools import FOLDER, ROOT, build, fetch, nvdisasm

CUTLASS = "nvidia-cutlass==4.2.0.0"

#: A part of each kernel's symbol in cutlass.cu -> what it is.
KERNELS = {
    "GemmShapeILi128ELi128ELi8E": "CUTLASS fprop, SIMT float32 128 × 128 × 8",
    "GemmShapeILi128ELi128ELi32E": "CUTLASS fprop, bfloat16 128 × 128 × 32",
    "GemmShapeILi128ELi128ELi16E": "CUTLASS fprop, tf32 128 × 128 × 16",
}


def rows() -> list[list[str]]:
    """Of the table of main loops."""
    toolkit, cubin = build.find_toolkit(), FOLDER / "cutlass.cubin"
    assert toolkit
    headers = fetch(CUTLASS) / "cutlass_library/source"
    command = [toolkit.nvcc, "-cubin", "-arch=sm_80", "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-w"]
    command += [
        f"-I{headers}/include",
        f"-I{headers}/tools/util/include",
        ROOT / "tests/static/cutlass.cu",
        "-o",
        cubin,
    ]
    subprocess.run(command, check=True)
    codes = sass.parse(subprocess.run([nvdisasm(), "-c", cubin], capture_output=True, text=True, check=True).stdout)
    found = []
    for part, name in KERNELS.items():
        (code,) = (c for symbol, c in codes.items() if f"ImplicitGemmMultistageINS_4gemm9{part}" in symbol)
        loop = code.main_loop
        assert loop
        found.append([name, share(code), *["–"] * (len(SHOWN) - 1), *once_round(loop)])
    return found


if __name__ == "__main__":
    main(rows)
