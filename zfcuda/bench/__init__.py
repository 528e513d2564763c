"""``zfcuda bench``: the operators, layers, networks, mining and projection beside every rival that is installed.

Cases are described in `operators`, `layers`, `nets`, `mining` and `projection`, each with its contenders; `suite` times
them in turn and checks what they computed; the `record` becomes a `table`, a `report` and, beside an earlier one, the
verdicts of `compare`. ``benchmarks/`` runs the same cases under pytest-benchmark.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zfcuda.bench import report, table
from zfcuda.bench.case import Case, Setting
from zfcuda.bench.compare import Verdict, compare
from zfcuda.bench.record import CaseRecord, Record
from zfcuda.bench.suite import Suite, all_cases, select

__all__ = ["RECORD", "Outcome", "run"]

RECORD = "bench.json"
BATCHES = {True: 1, False: 8}  # quick, full


@dataclass(frozen=True)
class Outcome:
    """What a run left, and what it says beside the earlier record."""

    record: Record
    page: Path
    verdicts: list[Verdict]

    @property
    def slower(self) -> bool:
        return any(verdict.verdict == "slower" for verdict in self.verdicts)


def run(
    output: Path,
    *,
    device: str | None = None,
    threads: int | None = None,
    quick: bool = False,
    wanted: Sequence[str] = (),
    earlier: Path | None = None,
    command: str = "",
    show: Any = lambda *parts: None,
) -> Outcome:
    """Run the suite and write ``bench.json``, ``report.html`` and the figures to ``output``.

    Parameters
    ----------
    output
        A folder. The record is written after every case, so what was measured survives whatever comes next.
    device
        "cpu", "cuda", "cuda:1", …; by default a GPU if there is one.
    threads
        Of a processor; by default one for each processor that this process may use.
    quick
        One image, the first layers, no compilers: under three minutes on two cores.
    wanted
        Parts of names of cases; all cases without any.
    earlier
        A record to compare with.
    command
        For the record.
    show
        Given what is to be printed as it comes.

    Raises
    ------
    ValueError
        If no case has one of the names, or there are fewer processors than threads.
    RuntimeError
        If there is no such device, or ``earlier`` is no record.
    """
    old = None if earlier is None else Record.load(earlier)
    setting = _setting(output, device, threads, quick)
    cases = select(all_cases(setting), wanted)

    def begun(case: Case) -> None:
        show(f"[dim]{case.key} …[/]")

    def done(case: CaseRecord, record: Record) -> None:
        record.save(output / RECORD)
        show(*table.of_case(record, case), "")

    record = Suite(setting, cases, command, begun=begun, done=done).run()
    record.save(output / RECORD)
    verdicts = [] if old is None else compare(old, record)
    page = report.write(record, output, verdicts)
    show(*table.of_noise(record))
    if old is not None:
        show(*table.of_verdicts(verdicts))
    return Outcome(record, page, verdicts)


def _setting(output: Path, device: str | None, threads: int | None, quick: bool) -> Setting:
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError(f"device is {device!r}, but torch sees no GPU: see `zfcuda info`")
        chosen = torch.device("cuda", chosen.index or 0)
        torch.cuda.set_device(chosen)
    elif chosen.type != "cpu":
        raise ValueError(f"device is {device!r}; it must be cpu or cuda")
    available = len(os.sched_getaffinity(0))
    if threads is not None and threads > available:
        raise ValueError(f"threads is {threads}; this process may use {available} processors")
    return Setting(chosen, chosen.type, threads or available, quick, BATCHES[quick], output)
