"""What a run of the suite leaves: the JSON file, described in ``docs/schema.md``."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from zfcuda.bench.timing import quartiles

__all__ = ["NOISY", "SCHEMA", "VERSION", "CaseRecord", "Missing", "Record", "Result", "Times"]

SCHEMA, VERSION = "zfcuda.bench", 1
#: A machine on which times spread so much was busy with something else.
NOISY = 0.1


@dataclass
class Times:
    """Seconds of one unit of a case under one regime, in the order of the rounds."""

    samples: list[float]

    @property
    def median(self) -> float:
        return quartiles(self.samples)[1]

    @property
    def spread(self) -> tuple[float, float]:
        """Lower and upper quartile."""
        low, _, high = quartiles(self.samples)
        return low, high


@dataclass
class Result:
    """A contender of a case. ``correct`` is what `zfcuda.bench.errors.differences` says, empty without a reference."""

    name: str
    family: str
    ours: bool
    times: dict[str, Times]
    correct: dict[str, float] = field(default_factory=dict)
    algorithm: list[str] = field(default_factory=list)
    second_timer: list[float] | None = None
    lacks: str = ""


@dataclass
class Missing:
    """A contender that did not take part, and why."""

    name: str
    reason: str


@dataclass
class CaseRecord:
    """A case with its results. ``flops``, ``bytes`` are those of one ``unit``; 0: nobody has counted."""

    group: str
    name: str
    mode: str
    unit: str
    flops: int
    bytes: int
    notes: list[str] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)
    clocks: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.group}/{self.name}/{self.mode}"

    def best_of_ours(self, regime: str) -> Result | None:
        ours = [r for r in self.results if r.ours and regime in r.times]
        return min(ours, key=lambda r: r.times[regime].median, default=None)

    def ratio(self, result: Result, regime: str) -> float | None:
        """Its time over that of the best of ours under this regime: above 1, zfcuda is faster."""
        best = self.best_of_ours(regime)
        if best is None or regime not in result.times:
            return None
        return result.times[regime].median / best.times[regime].median


@dataclass
class Record:
    """A run."""

    started: str
    seconds: float
    command: str
    settings: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str | None]
    regimes: list[str]
    ceilings: dict[str, dict[str, float]]  # measured, by mode: bytes and flops a second
    datasheet: dict[str, dict[str, float]]  # the same of the GPU's data sheet, where it is known
    cases: list[CaseRecord] = field(default_factory=list)

    @property
    def noise(self) -> float:
        """The middle one of all times' spreads: half the distance of the quartiles over the median."""
        spreads = [
            (times.spread[1] - times.spread[0]) / 2 / times.median
            for case in self.cases
            for result in case.results
            for times in result.times.values()
        ]
        return quartiles(spreads)[1] if spreads else 0.0

    def rates(self, case: CaseRecord, result: Result, regime: str) -> dict[str, float]:
        """FLOP/s of useful work, bytes a second of least traffic, shares of the ceilings; those that are counted."""
        seconds = result.times[regime].median
        ceiling = self.ceilings[case.mode]
        floor = max(case.flops / ceiling["flops"], case.bytes / ceiling["bytes"])
        rates = {"flops": case.flops / seconds, "bytes": case.bytes / seconds, "of_ceiling": floor / seconds}
        sheet = self.datasheet.get(case.mode)
        if sheet:
            rates["of_datasheet"] = max(case.flops / sheet["flops"], case.bytes / sheet["bytes"]) / seconds
        return {name: rate for name, rate in rates.items() if rate}

    def to_json(self) -> str:
        """The record with what follows from it beside each time, for readers that do not compute."""
        facts: dict[str, Any] = {"schema": SCHEMA, "version": VERSION} | asdict(self)
        for case, shown in zip(self.cases, facts["cases"], strict=True):
            for result, part in zip(case.results, shown["results"], strict=True):
                for regime, times in result.times.items():
                    low, median, high = quartiles(times.samples)
                    derived = {
                        "median": median,
                        "quartiles": [low, high],
                        "over_best_of_ours": case.ratio(result, regime),
                    }
                    part["times"][regime] |= derived | {"rates": self.rates(case, result, regime)}
        return json.dumps(_finite(facts), indent=1, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> Record:
        """The record of a file.

        Raises
        ------
        RuntimeError
            If it is no record, or of another version.
        """
        try:
            facts = json.loads(text)
        except json.JSONDecodeError as error:
            raise RuntimeError(f"not a record of `zfcuda bench`: {error}") from error
        if not isinstance(facts, dict) or facts.pop("schema", None) != SCHEMA:
            raise RuntimeError("not a record of `zfcuda bench`: its JSON file has the schema zfcuda.bench")
        if (version := facts.pop("version", None)) != VERSION:
            raise RuntimeError(f"the record has version {version} of its schema; this zfcuda reads {VERSION}")
        try:
            facts["cases"] = [_case(case) for case in facts["cases"]]
            return Record(**facts)
        except (KeyError, TypeError) as error:
            raise RuntimeError(f"the record is not whole: {error}") from error

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".part-{path.name}")
        part.write_text(self.to_json(), encoding="utf-8")
        os.replace(part, path)

    @staticmethod
    def load(path: Path) -> Record:
        try:
            return Record.from_json(path.read_text(encoding="utf-8"))
        except RuntimeError as error:
            raise RuntimeError(f"{path}: {error}") from error


def _case(facts: dict[str, Any]) -> CaseRecord:
    results = []
    for result in facts.pop("results"):
        times = {regime: Times(part["samples"]) for regime, part in result.pop("times").items()}
        correct = {name: _number(value) for name, value in result.pop("correct").items()}
        results.append(Result(times=times, correct=correct, **result))
    missing = [Missing(**part) for part in facts.pop("missing")]
    return CaseRecord(results=results, missing=missing, **facts)


def _finite(value: Any) -> Any:
    """JSON knows no infinity: it becomes a string."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return "Infinity" if isinstance(value, float) and math.isinf(value) else value


def _number(value: Any) -> Any:
    return math.inf if value == "Infinity" else value
