"""What the benchmarks share: devices, and zfcuda and torch timed alternately in one run.

Run with ``make bench`` or ``pytest -n 0 benchmarks`` (pytest-benchmark); ``ZFCUDA_BENCH_BATCH`` sets the batch (8).
The recorded times are zfcuda's, called as users call it: outputs are allocated, as torch's are; ``extra_info`` holds
the rivals.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

BATCH = int(os.environ.get("ZFCUDA_BENCH_BATCH", "8"))
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
ROUNDS = 10

Call = Callable[[], object]


@pytest.fixture(params=["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(params=FORMATS)
def layout(request: pytest.FixtureRequest) -> torch.memory_format:
    return FORMATS[request.param]


def seconds(call: Call, device: torch.device) -> float:
    """How long one call takes, by the device's clock."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    start_time = time.perf_counter()
    call()
    return time.perf_counter() - start_time


def peak(device: torch.device) -> tuple[float, float]:
    """Bytes a second of a copy and FLOPs a second of a large matrix product, measured here and now."""
    source = torch.empty(1 << 25, device=device)
    target = torch.empty_like(source)
    a, b, c = (torch.rand(2048, 2048, device=device) for _ in range(3))

    def best(call: Call) -> float:
        return min(seconds(call, device) for _ in range(5))

    copy = best(lambda: target.copy_(source))
    product = best(lambda: torch.mm(a, b, out=c))
    return 2 * source.nbytes / copy, 2 * 2048**3 / product


@pytest.fixture
def compare(benchmark, device: torch.device):
    """``compare(ours, rivals, bytes, flops)``: zfcuda against named rivals, one call of each in turn.

    Records the ratio of each rival's median time to ours (above one: we are faster) and how much of our
    time the floor takes, the larger of ``bytes`` at the speed of a copy and ``flops`` at that of a product.
    """

    def run(ours: Call, rivals: dict[str, Call], bytes: int, flops: int = 0) -> None:
        calls = {"zfcuda": ours, **rivals}
        times: dict[str, list[float]] = {name: [] for name in calls}
        for round_ in range(ROUNDS + 1):
            for name, call in calls.items():
                elapsed = seconds(call, device)
                if round_:  # the first warms up
                    times[name].append(elapsed)
        median = {name: statistics.median(t) for name, t in times.items()}
        copy, product = peak(device)
        for name in rivals:
            benchmark.extra_info[f"{name} / zfcuda"] = round(median[name] / median["zfcuda"], 2)
        floor = max(bytes / copy, flops / product)
        benchmark.extra_info["% of floor"] = round(100 * floor / median["zfcuda"], 1)
        benchmark.pedantic(lambda: seconds(ours, device), rounds=ROUNDS)

    return run


def rivals(call: Callable[[Tensor], object], tensor: Tensor) -> dict[str, Call]:
    """torch's ``call`` on both memory formats of ``tensor``."""
    copies = {name: tensor.contiguous(memory_format=memory_format) for name, memory_format in FORMATS.items()}
    return {f"torch {name}": partial(call, copy) for name, copy in copies.items()}
