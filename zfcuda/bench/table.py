"""A case in the terminal, and the verdicts of a comparison."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from zfcuda.bench.compare import LEAST_CHANGE, SIGNIFICANCE, Verdict
from zfcuda.bench.record import NOISY, CaseRecord, Record, Result

__all__ = ["of_case", "of_noise", "of_verdicts", "row", "seconds_text"]


def seconds_text(seconds: float) -> str:
    """Three digits with a unit."""
    for scale, unit in ((1, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}" if seconds < 1000 * scale else f"{seconds / scale:.0f} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def fastest(result: Result) -> str:
    """The regime of its smallest median."""
    return min(result.times, key=lambda regime: result.times[regime].median)


def row(record: Record, case: CaseRecord, result: Result) -> dict[str, str]:
    """The cells of a contender, by the titles of their columns; rates are those of its fastest regime."""
    cells: dict[str, str] = {}
    for regime in record.regimes:
        times = result.times.get(regime)
        if times is None:
            cells[regime] = cells[f"{regime} ×"] = "–"
            continue
        low, high = times.spread
        half = 50 * (high - low) / times.median
        ratio = case.ratio(result, regime)
        cells[regime] = f"{seconds_text(times.median)} ±{half:.0f}%"
        cells[f"{regime} ×"] = "–" if ratio is None else f"{ratio:.2f}" if ratio < 100 else f"{ratio:.0f}"
    rates = record.rates(case, result, fastest(result))
    cells["TFLOP/s"] = f"{rates['flops'] / 1e12:.3g}" if "flops" in rates else ""
    cells["GB/s"] = f"{rates['bytes'] / 1e9:.3g}" if "bytes" in rates else ""
    cells["% ceiling"] = f"{100 * rates['of_ceiling']:.0f}" if "of_ceiling" in rates else ""
    if record.datasheet:
        cells["% data sheet"] = f"{100 * rates['of_datasheet']:.0f}" if "of_datasheet" in rates else ""
    cells["error"] = f"{result.correct['error']:.1e}" if "error" in result.correct else ""
    cells["switches"] = switches_text(result)
    return cells


def switches_text(result: Result) -> str:
    """Windows whose maximum lies elsewhere than in float64; those of them that rounding cannot explain."""
    if "switches" not in result.correct:
        return ""
    wrong = result.correct["switches_beyond_rounding"]
    return f"{result.correct['switches']:.0f}" + (f", {wrong:.0f} wrong" if wrong else "")


def of_case(record: Record, case: CaseRecord) -> list[Any]:
    """The table of a case, and who did not take part."""
    shown: list[Any] = []
    if case.results:
        rows = [row(record, case, result) for result in case.results]
        table = Table(title=f"[bold]{escape(case.key)}[/], one {escape(case.unit)}", box=None, title_justify="left")
        for column in ("", *rows[0]):
            table.add_column(column, justify="right" if column else "left", no_wrap=True)
        for result, cells in zip(case.results, rows, strict=True):
            table.add_row(f"[bold]{escape(result.name)}[/]" if result.ours else escape(result.name), *cells.values())
        shown.append(table)
    else:
        shown.append(f"[bold]{escape(case.key)}[/]")
    lacks = _grouped((r.lacks, r.name) for r in case.results if r.lacks)
    missing = _grouped((m.reason, m.name) for m in case.missing)
    shown += [f"  [dim]{escape(names)}: {escape(what)}[/]" for what, names in lacks]
    shown += [f"  [yellow]! {escape(names)}:[/] [dim]{escape(reason)}[/]" for reason, names in missing]
    return shown


def _grouped(pairs: Iterable[tuple[str, str]]) -> Iterable[tuple[str, str]]:
    """Reasons, each with all whom it concerns."""
    names: dict[str, list[str]] = {}
    for reason, name in pairs:
        names.setdefault(reason, []).append(name)
    return ((reason, ", ".join(who)) for reason, who in names.items())


def of_noise(record: Record) -> list[str]:
    """A warning where the machine was busy."""
    if record.noise < NOISY:
        return []
    return [f"[yellow]! The machine was busy:[/] half of all times spread by more than ±{100 * record.noise:.0f} %"]


def of_verdicts(verdicts: Sequence[Verdict]) -> list[Any]:
    """The changes that count, and how many do not."""
    changed = [v for v in verdicts if v.verdict != "same"]
    table = Table(box=None)
    for number, column in enumerate(("case", "contender", "regime", "verdict", "new / old", "between", "error")):
        table.add_column(column, justify="left" if number < 4 else "right", no_wrap=number == 0)
    for v in sorted(changed, key=lambda v: -v.change):
        colour = "red" if v.verdict == "slower" else "green"
        errors = " → ".join("–" if e is None else f"{e:.1e}" for e in v.errors)
        between = f"{v.interval[0]:.2f}–{v.interval[1]:.2f}"
        table.add_row(
            escape(v.case),
            escape(v.contender),
            v.regime,
            f"[{colour}]{v.verdict}[/]",
            f"{v.change:.2f}",
            between,
            errors,
        )
    counts = ", ".join(f"{sum(v.verdict == kind for v in verdicts)} {kind}" for kind in ("faster", "slower", "same"))
    rule = f"changes of more than {100 * LEAST_CHANGE:.0f} % at a false discovery rate of {SIGNIFICANCE:g}"
    basis = "the rivals of the same rounds" if any(v.against for v in verdicts) else "the clock: the rivals differ"
    return [*([table] if changed else []), f"{counts} ({rule}; against {basis})"]
