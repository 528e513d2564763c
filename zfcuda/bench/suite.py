"""Runs the cases: prepares the contenders, times them in turn, checks what they computed, keeps the record."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import torch

from zfcuda.bench import ceiling, layers, machine, mining, nets, operators, projection
from zfcuda.bench.case import MODES, Built, Call, Case, Mode, Outputs, Setting, Unavailable
from zfcuda.bench.errors import differences
from zfcuda.bench.record import CaseRecord, Missing, Record, Result, Times
from zfcuda.bench.timing import Clock, CpuClock, CudaClock, interleave, pinned

__all__ = ["GROUPS", "Suite", "all_cases", "clock_of", "select"]

GROUPS = {
    "operators": operators.cases,
    "layers": layers.cases,
    "grouped": layers.grouped,
    "nets": nets.cases,
    "mining": mining.cases,
    "projection": projection.cases,
}


def modes_of(setting: Setting, group: str) -> list[Mode]:
    """The CPU's core computes in float32 as it is, and in halves, of which bfloat16 in operators and layers tells."""
    if group == "grouped":
        names: Sequence[str] = ("ieee",)
    elif setting.kind == "cuda":
        names = tuple(MODES)
    else:
        names = ("ieee", "bf16") if group in ("operators", "layers") and not setting.quick else ("ieee",)
    return [MODES[name] for name in names]


def all_cases(setting: Setting) -> Iterator[Case]:
    """Every case for this device, those of `--quick` alone if it is on."""
    for name, group in GROUPS.items():
        for case in group(setting, modes_of(setting, name)):
            if case.quick or not setting.quick:
                yield case


def select(cases: Iterator[Case], wanted: Sequence[str]) -> list[Case]:
    """Those whose key contains one of ``wanted``, whatever the case of the letters; all without any.

    Raises
    ------
    ValueError
        If none does.
    """
    chosen, keys = [], []
    for case in cases:
        keys.append(case.key)
        if not wanted or any(part.lower() in case.key.lower() for part in wanted):
            chosen.append(case)
    if not chosen:
        raise ValueError(f"filter is {', '.join(wanted)!r}; no case has it in its name, such as {keys[0]!r}")
    return chosen


def clock_of(setting: Setting) -> Clock:
    if setting.kind == "cuda":
        return CudaClock(setting.device)
    return CpuClock()


@dataclass(frozen=True)
class Effort:
    """Seconds for the rounds of a case under one regime, and how many rounds at least and at most."""

    budget: float
    fewest: int
    most: int


# Of fewer than seven rounds a comparison could tell nothing.
QUICK, FULL = Effort(0.6, 7, 15), Effort(6.0, 10, 40)


@dataclass
class Suite:
    """A run of these cases.

    Parameters
    ----------
    setting, cases, command
        Where and how much; what; the command line that asked for it, for the record.
    clock
        By default the device's.
    begun, done
        Told of each case and of its results, with the record so far.
    """

    setting: Setting
    cases: Sequence[Case]
    command: str = ""
    clock: Clock | None = None
    begun: Callable[[Case], None] = lambda case: None
    done: Callable[[CaseRecord, Record], None] = lambda case, record: None
    effort: Effort | None = None

    def run(self) -> Record:
        """All of it, on pinned threads."""
        start = time.perf_counter()
        with pinned(self.setting.threads) as processors:
            self._clock = self.clock or clock_of(self.setting)
            self._effort = self.effort or (QUICK if self.setting.quick else FULL)
            record = self._blank(processors)
            for case in self.cases:
                self.begun(case)
                record.cases.append(self._case(case, record))
                record.seconds = time.perf_counter() - start
                self.done(record.cases[-1], record)
            for mode in record.ceilings:
                self._reach(MODES[mode], record)
        return record

    def _reach(self, mode: Mode, record: Record) -> None:
        """Measure the ceilings of a mode: at its first case, and in the end once more, as machines have bad minutes."""
        before = record.ceilings.get(mode.name, {})
        with mode.active():
            now = ceiling.measured(self.setting, self._clock, mode)
        record.ceilings[mode.name] = {name: max(before.get(name, 0.0), now[name]) for name in now}

    def _blank(self, processors: list[int]) -> Record:
        setting = self.setting
        facts = machine.describe(setting.device)
        gpu = facts.get("gpu", {}).get("name", "")
        sheets = {mode: ceiling.datasheet(gpu, mode) for mode in MODES} if gpu else {}
        return Record(
            started=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            seconds=0.0,
            command=self.command,
            settings={
                "device": str(setting.device),
                "threads": setting.threads,
                "pinned_to": processors,
                "quick": setting.quick,
                "batch": setting.batch,
            },
            machine=facts,
            versions=machine.versions(),
            regimes=list(self._clock.regimes),
            ceilings={},
            datasheet={mode: sheet for mode, sheet in sheets.items() if sheet},
        )

    def _case(self, case: Case, record: Record) -> CaseRecord:
        """A case; whatever goes wrong becomes a part of its record."""
        done = CaseRecord(case.group, case.name, case.mode.name, case.unit, case.flops, case.bytes, list(case.notes))
        torch._dynamo.reset()
        with warnings.catch_warnings(), case.mode.active():
            warnings.simplefilter("ignore", UserWarning)  # of rivals
            done.clocks["before"] = machine.clocks(self.setting.kind)
            try:
                if case.mode.name not in record.ceilings:
                    self._reach(case.mode, record)
                built = case.build(self.setting, case.mode)
            except Exception as error:
                done.missing.append(Missing("the whole case", _reason(error)))
                return done
            try:
                self._contest(built, done)
            except Exception as error:
                done.missing.append(Missing("what is missing here", _reason(error)))
            done.results = [result for result in done.results if result.times]
            done.clocks["after"] = machine.clocks(self.setting.kind)
        return done

    def _contest(self, built: Built, done: CaseRecord) -> None:
        ready: dict[str, dict[str, Call]] = {}
        results: dict[str, Result] = {}
        reference = self._reference(built, done)
        for contender in built.contenders:
            try:
                if contender.slow_start and self.setting.quick:
                    raise Unavailable("left out by --quick")
                calls = self._clock.calls(contender)
                correct: dict[str, Any] = {}
                for call in dict.fromkeys(calls.values()):
                    result = call()
                    if reference is not None and contender.read:
                        correct = _worse(correct, differences(contender.read(result), reference))
                self._clock.synchronize()
            except Exception as error:
                done.missing.append(Missing(contender.name, _reason(error)))
                continue
            ready[contender.name] = calls
            family = contender.family or contender.name
            results[contender.name] = Result(contender.name, family, contender.ours, {}, correct, lacks=contender.lacks)
        done.results = list(results.values())
        self._time(ready, {c.name: c.pieces for c in built.contenders}, results)
        for contender in built.contenders:
            if contender.name in results:
                call = next(iter(ready[contender.name].values()))
                self._look_inside(call, contender.pieces, results[contender.name])

    def _reference(self, built: Built, done: CaseRecord) -> Outputs | None:
        try:
            return built.reference() if built.reference else None
        except Exception as error:  # no memory for float64, say; times are worth having all the same
            done.missing.append(Missing("the reference in float64", _reason(error)))
            return None

    def _look_inside(self, call: Call, pieces: int, result: Result) -> None:
        """What ran, and the second timer; what goes wrong there is told, and the times stay."""
        try:
            result.algorithm = algorithms(call, self.setting.kind, self._clock.synchronize)
            seconds = self._clock.second(call)
            result.second_timer = None if seconds is None else [s / pieces for s in seconds]
        except Exception as error:
            result.lacks = "; ".join(filter(None, (result.lacks, f"no look inside, {_reason(error)}")))

    def _time(self, ready: dict[str, dict[str, Call]], pieces: dict[str, int], results: dict[str, Result]) -> None:
        effort = self._effort
        for regime in self._clock.regimes:
            calls = {name: ways[regime] for name, ways in ready.items() if regime in ways}
            samples = interleave(self._clock, calls, regime, effort.budget, effort.fewest, effort.most)
            for name, seconds in samples.items():
                results[name].times[regime] = Times([s / pieces[name] for s in seconds])


def _worse(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Of what a contender computed with its ways to call it, the worse."""
    return {name: max(first.get(name, 0), value) for name, value in second.items()}


def _reason(error: Exception) -> str:
    """For people; the first line says it."""
    if isinstance(error, Unavailable):
        return str(error)
    lines = str(error).strip().splitlines() or [""]
    return f"failed: {type(error).__name__}: {lines[0]}"


#: What took less of a call's time is no part of its algorithm.
LEAST_SHARE = 0.02


def algorithms(call: Call, kind: str, synchronize: Call) -> list[str]:
    """What ran in a call, the longest first: kernels of a GPU, operators on a processor; empty for other runtimes."""
    spent: dict[str, float] = {}
    with _silent():
        for name, microseconds in _gpu_events(call, synchronize) if kind == "cuda" else _cpu_events(call):
            spent[name] = spent.get(name, 0) + microseconds
    least = LEAST_SHARE * sum(spent.values())
    return sorted((name for name in spent if spent[name] > least), key=lambda name: -spent[name])


def _cpu_events(call: Call) -> list[tuple[str, float]]:
    with torch.autograd.profiler.profile(use_kineto=False) as profile:
        call()
    return [(event.name, event.self_cpu_time_total) for event in profile.function_events or ()]


def _gpu_events(call: Call, synchronize: Call) -> list[tuple[str, float]]:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        synchronize()
    events = profile.events() or ()
    return [(e.name, e.device_time_total) for e in events if e.device_type == torch.autograd.DeviceType.CUDA]


@contextmanager
def _silent() -> Iterator[None]:
    """torch's profiler writes to stderr that it starts and stops, past Python."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
