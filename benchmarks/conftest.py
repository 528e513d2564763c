"""The cases of ``zfcuda bench`` under pytest-benchmark: ``pytest -n 0 benchmarks -k "layers and conv1"``.

The recorded times are those of the best of ours, called as users call it; ``extra_info`` holds the rivals, all of which
took turns with ours before. ``ZFCUDA_BENCH_BATCH`` sets the batch (8), ``ZFCUDA_BENCH_THREADS`` the threads (1).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from zfcuda.bench.case import Case, Setting
from zfcuda.bench.record import CaseRecord, Record
from zfcuda.bench.suite import Suite, all_cases, clock_of
from zfcuda.bench.timing import pinned

STATE = Path(__file__).parents[1] / "build"
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def setting_of(device: str) -> Setting:
    batch, threads = (
        int(os.environ.get(f"ZFCUDA_BENCH_{name}", number)) for name, number in (("BATCH", 8), ("THREADS", 1))
    )
    where = torch.device("cuda", 0) if device == "cuda" else torch.device(device)
    return Setting(where, device, threads, batch=batch, state=STATE)


def cases(*groups: str) -> pytest.MarkDecorator:
    """Parametrises a benchmark by the cases of these groups, on every device that is there."""
    found = [
        pytest.param(setting, case, id=f"{setting.kind}-{case.key}")
        for setting in map(setting_of, DEVICES)
        for case in all_cases(setting)
        if case.group in groups
    ]
    return pytest.mark.parametrize(("setting", "case"), found)


def checked(record: Record) -> CaseRecord:
    """The only case of a record, in which all of ours took part."""
    [done] = record.cases
    absent = [m for m in done.missing if m.name == "the whole case" or m.name.startswith("zfcuda")]
    assert not absent, absent
    return done


@pytest.fixture
def contest(benchmark) -> Callable[[Setting, Case], None]:
    """``contest(setting, case)``: every contender in turn, then the best of ours for pytest-benchmark."""

    def run(setting: Setting, case: Case) -> None:
        record = Suite(setting, [case]).run()
        done = checked(record)
        regime = record.regimes[0]
        best = done.best_of_ours(regime)
        assert best is not None
        info = benchmark.extra_info
        info.update({f"{r.name} / ours": round(done.ratio(r, regime) or 0, 2) for r in done.results if r is not best})
        info |= {"of ceiling": record.rates(done, best, regime).get("of_ceiling"), **best.correct}
        info |= {"missing": [f"{m.name}: {m.reason}" for m in done.missing]}
        clock = clock_of(setting)
        with pinned(setting.threads), case.mode.active():
            [contender] = [c for c in case.build(setting, case.mode).contenders if c.name == best.name]
            call = clock.calls(contender)[regime]
            benchmark.pedantic(
                lambda: (call(), clock.synchronize()), rounds=len(best.times[regime].samples), warmup_rounds=1
            )

    return run
