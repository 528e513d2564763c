"""Clocks: how a call is timed on a processor and on a GPU, and under which regimes.

A *regime* is a condition under which all contenders of a case are timed, in turn, a call of each in every round.

On a processor the trap is fresh memory: an allocation above 32 MB is mapped anew by every call, and clearing its
pages costs about half a millisecond a MB, which hides everything else. So there are two regimes: "as called", with
the C library's allocator as users have it, and "buffers reused", in which it keeps every page that it has once had,
for all contenders alike, and those that can write into a caller's buffers do.

On a GPU: with a warm L2 (the same call ran just before) and a cold one (a buffer larger than the L2 was written), each
with calls launched one by one and replayed from a CUDA graph.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch

from zfcuda.bench.case import Call, Contender, Unavailable

__all__ = ["Clock", "CpuClock", "CudaClock", "interleave", "pinned"]

SHORTEST = 5e-4  # seconds of a sample on a processor, so that the clock's own cost vanishes
MOST_REPEATS = 1000


class Clock(Protocol):
    """What the suite asks of a device."""

    @property
    def regimes(self) -> tuple[str, ...]:
        """Their names, the one that users have first."""

    def calls(self, contender: Contender) -> dict[str, Call]:
        """What to call in each regime, prepared; regimes that the contender cannot serve are left out."""

    def within(self, regime: str) -> AbstractContextManager[None]:
        """The condition."""

    def repeats(self, seconds: float) -> int:
        """Calls of a sample, for a call that takes so long."""

    def sample(self, call: Call, repeats: int, regime: str) -> Callable[[], float]:
        """Time so many calls; returns what tells the seconds of one, once the device is done."""

    def synchronize(self) -> None:
        """Wait for the device."""

    def second(self, call: Call) -> list[float] | None:
        """Seconds by another timer, where there is one."""


# ---------------------------------------------------------------- processors

KEPT = 128 << 20  # bytes that a call may allocate before it meets a page for the first time
MMAP_MAX, MMAP_THRESHOLD, TRIM_THRESHOLD = -4, -3, -1  # malloc.h


class CpuClock:
    """Wall-clock time."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None)
        self._libc.malloc.restype = ctypes.c_void_p
        self._libc.malloc.argtypes = [ctypes.c_size_t]
        self._libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
        self._libc.free.argtypes = [ctypes.c_void_p]
        keeps = hasattr(self._libc, "mallopt")  # glibc
        self.regimes: tuple[str, ...] = ("as called", "buffers reused") if keeps else ("as called",)

    def calls(self, contender: Contender) -> dict[str, Call]:
        call = contender.prepare()
        reused = contender.reused() if contender.reused and len(self.regimes) > 1 else call
        return dict(zip(self.regimes, (call, reused), strict=False))

    @contextmanager
    def within(self, regime: str) -> Iterator[None]:
        if regime == "as called":
            yield
            return
        self._malloc({MMAP_MAX: 0, TRIM_THRESHOLD: -1})  # -1: as much as there is
        block = self._libc.malloc(KEPT)
        self._libc.memset(block, 1, KEPT)  # so that its pages are there
        self._libc.free(block)
        try:
            yield
        finally:
            # What the allocator comes to by itself in a process that has once freed a large tensor.
            self._malloc({MMAP_MAX: 65536, MMAP_THRESHOLD: 32 << 20, TRIM_THRESHOLD: 64 << 20})
            self._libc.malloc_trim(0)

    def _malloc(self, settings: Mapping[int, int]) -> None:
        for name, value in settings.items():
            if not self._libc.mallopt(name, value):
                raise RuntimeError(f"mallopt({name}, {value}) was refused by the C library")

    def repeats(self, seconds: float) -> int:
        return min(max(round(SHORTEST / max(seconds, 1e-9)), 1), MOST_REPEATS)

    def sample(self, call: Call, repeats: int, regime: str) -> Callable[[], float]:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        seconds = (time.perf_counter() - start) / repeats
        return lambda: seconds

    def synchronize(self) -> None:
        pass

    def second(self, call: Call) -> list[float] | None:
        return None


@contextmanager
def pinned(threads: int) -> Iterator[list[int]]:
    """torch with so many threads, and all threads of the process on so many processors; yields their numbers."""
    torch_threads, processors = torch.get_num_threads(), os.sched_getaffinity(0)
    chosen = sorted(processors)[:threads]
    _set_affinity(chosen)
    torch.set_num_threads(threads)
    try:
        yield chosen
    finally:
        torch.set_num_threads(torch_threads)
        _set_affinity(sorted(processors))


def _set_affinity(processors: list[int]) -> None:
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), processors)


# ---------------------------------------------------------------- GPUs


class CudaClock:
    """CUDA events around single calls, which are enqueued without waiting for one another.

    Parameters
    ----------
    device
        The GPU.
    cuda
        ``torch.cuda``; the tests have a stand-in.
    """

    regimes = ("warm", "cold", "graph warm", "graph cold")

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self.device, self.cuda = device, cuda
        l2 = cuda.get_device_properties(device).L2_cache_size
        self._flushed = torch.empty(2 * l2, dtype=torch.uint8, device=device)

    def calls(self, contender: Contender) -> dict[str, Call]:
        call = contender.prepare()
        if contender.reused:
            call = contender.reused()
        calls = {"warm": call, "cold": call}
        if contender.graph:
            try:
                replay = self._capture(call)
                calls |= {"graph warm": replay, "graph cold": replay}
            except Unavailable as error:
                contender.lacks = "; ".join(filter(None, (contender.lacks, str(error))))
        return calls

    def _capture(self, call: Call) -> Call:
        """A CUDA graph of the call, which has run before, as autotuners and lazy initialisation must."""
        side = self.cuda.Stream()
        side.wait_stream(self.cuda.current_stream())
        with self.cuda.stream(side):
            for _ in range(3):
                call()
        self.cuda.current_stream().wait_stream(side)
        graph = self.cuda.CUDAGraph()
        try:
            with self.cuda.graph(graph):
                kept = call()
        except Exception as error:
            self.cuda.synchronize()
            raise Unavailable(f"cannot be captured into a CUDA graph: {error}") from error

        def replay() -> Any:
            graph.replay()
            return kept

        return replay

    def within(self, regime: str) -> AbstractContextManager[None]:
        return nullcontext()

    def repeats(self, seconds: float) -> int:
        return 1

    def sample(self, call: Call, repeats: int, regime: str) -> Callable[[], float]:
        """One call, behind a write of more than the L2 or behind itself, so that its launch is hidden, if it can be."""
        if regime.endswith("cold"):
            self._flushed.fill_(1)
        else:
            call()
        start, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            call()
        end.record()

        def seconds() -> float:
            end.synchronize()
            return start.elapsed_time(end) / 1e3 / repeats

        return seconds

    def synchronize(self) -> None:
        self.cuda.synchronize()

    def second(self, call: Call) -> list[float] | None:
        """By ``cupyx.profiler.benchmark``, on the stream that torch uses; None without CuPy."""
        try:
            cupy = importlib.import_module("cupy")
            benchmark = importlib.import_module("cupyx.profiler").benchmark
        except ImportError:
            return None
        with cupy.cuda.Device(self.device.index or 0), cupy.cuda.ExternalStream(self.cuda.current_stream().cuda_stream):
            result = benchmark(call, n_repeat=10, n_warmup=1)
        return [float(seconds) for seconds in result.gpu_times[0]]


# ---------------------------------------------------------------- rounds


def estimate(clock: Clock, call: Call, regime: str, enough: float) -> float:
    """Seconds of a call: of the first, which warms up, if it took more than enough, else of another one."""
    first = clock.sample(call, 1, regime)()
    return first if first > enough else clock.sample(call, 1, regime)()


def interleave(
    clock: Clock, calls: Mapping[str, Call], regime: str, budget: float, fewest: int, most: int
) -> dict[str, list[float]]:
    """Seconds of a call of each, in rounds: as many as the budget in seconds allows, between these bounds."""
    if not calls:
        return {}
    with clock.within(regime):
        about = {name: estimate(clock, call, regime, budget / fewest) for name, call in calls.items()}
        repeats = {name: clock.repeats(seconds) for name, seconds in about.items()}
        round_ = sum(repeats[name] * seconds for name, seconds in about.items())
        rounds = min(max(int(budget / max(round_, 1e-9)), fewest), most)
        pending: dict[str, list[Callable[[], float]]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                pending[name].append(clock.sample(call, repeats[name], regime))
        clock.synchronize()
        return {name: [seconds() for seconds in samples] for name, samples in pending.items()}


def quartiles(samples: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, middle, high
