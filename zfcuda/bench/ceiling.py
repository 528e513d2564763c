"""What the machine can do at most: a large copy and a large product, measured in the same run, and data sheets."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F

from zfcuda.bench.case import MODES, Call, Mode, Setting
from zfcuda.bench.timing import Clock, interleave

__all__ = ["DATASHEETS", "datasheet", "measured"]

#: By a part of the GPU's name: bytes a second, and FLOP/s without sparsity by mode (NVIDIA's data sheets).
#: 3xtf32 takes three products for one.
DATASHEETS: dict[str, dict[str, float]] = {
    "H200": {"bytes": 4.8e12, "ieee": 67e12, "tf32": 494e12, "bf16": 989e12, "fp16": 989e12},
    "H100 PCIe": {"bytes": 2.0e12, "ieee": 51e12, "tf32": 378e12, "bf16": 756e12, "fp16": 756e12},
    "H100": {"bytes": 3.35e12, "ieee": 67e12, "tf32": 494e12, "bf16": 989e12, "fp16": 989e12},
    "A100": {"bytes": 1.94e12, "ieee": 19.5e12, "tf32": 156e12, "bf16": 312e12, "fp16": 312e12},
    "A10": {"bytes": 0.6e12, "ieee": 31.2e12, "tf32": 62.5e12, "bf16": 125e12, "fp16": 125e12},
    "L40S": {"bytes": 0.864e12, "ieee": 91.6e12, "tf32": 183e12, "bf16": 362e12, "fp16": 362e12},
    "L4": {"bytes": 0.3e12, "ieee": 30.3e12, "tf32": 60e12, "bf16": 121e12, "fp16": 121e12},
    "T4": {"bytes": 0.32e12, "ieee": 8.1e12, "fp16": 65e12},
    "RTX 4090": {"bytes": 1.01e12, "ieee": 82.6e12, "tf32": 82.6e12, "bf16": 165e12, "fp16": 165e12},
    "RTX 3090": {"bytes": 0.936e12, "ieee": 35.6e12, "tf32": 35.6e12, "bf16": 71e12, "fp16": 71e12},
    "B200": {"bytes": 8.0e12, "ieee": 74e12, "tf32": 1125e12, "bf16": 2250e12, "fp16": 2250e12},
}


def datasheet(name: str, mode: str) -> dict[str, float] | None:
    """``bytes`` and ``flops`` a second of a GPU of this name, None for one that is not known or lacks the mode."""
    known = next((DATASHEETS[part] for part in DATASHEETS if part in name), None)
    if known is None or mode.removeprefix("3x") not in known:
        return None
    flops = known["tf32"] / 3 if mode == "3xtf32" else known[mode]
    return {"bytes": known["bytes"], "flops": flops}


def measured(setting: Setting, clock: Clock, mode: Mode) -> dict[str, float]:
    """``bytes`` a second of a copy and ``flops`` a second of a product of matrices in this mode: the best of ten.

    The product is tried as one of matrices and as a convolution by single pixels, because torch leaves the two to
    different libraries. 3xtf32, in which torch has no product, is taken for a third of tf32.
    """
    gpu = setting.kind == "cuda"
    source = setting.normal(1 << (28 if gpu else 25))
    target = torch.empty_like(source)
    n = 8192 if gpu else 2048
    a, b = (setting.normal(n, n + i, mode=mode)[:, :n].contiguous() for i in range(2))
    c = torch.empty_like(a)
    image = a.T.reshape(1, n, n // 64, 64).contiguous(memory_format=torch.channels_last)
    filters = b.reshape(n, n, 1, 1).contiguous(memory_format=torch.channels_last)
    works: dict[str, Call] = {
        "copy": lambda: target.copy_(source),
        "mm": lambda: torch.mm(a, b, out=c),
        "conv2d": lambda: F.conv2d(image, filters),
    }
    thirds = 3 if mode.name == "3xtf32" else 1
    with MODES["tf32"].active() if thirds == 3 else nullcontext():
        times = interleave(clock, works, clock.regimes[0 if gpu else -1], 0, 10, 10)
    seconds = min(*times["mm"], *times["conv2d"])
    return {"bytes": 2 * source.nbytes / min(times["copy"]), "flops": 2 * n**3 / seconds / thirds}
