"""Two records, and what can be said of the difference: faster, slower or the same, for each case."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from scipy.stats import false_discovery_control, mannwhitneyu

from zfcuda.bench.record import CaseRecord, Record, Result

__all__ = ["LEAST_CHANGE", "SIGNIFICANCE", "Verdict", "compare", "judge"]

#: Share of the verdicts "faster" and "slower" that chance alone may give (Benjamini-Hochberg over all of a comparison).
SIGNIFICANCE = 0.01
#: Smaller changes are "same", however certain: the machine's state differs more from one run to the next.
LEAST_CHANGE = 0.05


@dataclass(frozen=True)
class Verdict:
    """What became of one of our contenders under one regime.

    ``change`` is the new time over the old one, in units of the rivals' time in the same rounds where ``against`` names
    rivals that both records have in the same version, else in seconds; ``interval`` what it may be, from the spread of
    either record; ``p`` the probability of such a difference by chance.
    """

    case: str
    contender: str
    regime: str
    verdict: str  # "faster", "slower" or "same"
    change: float
    interval: tuple[float, float]
    p: float
    against: tuple[str, ...]
    errors: tuple[float | None, float | None]


def compare(old: Record, new: Record) -> list[Verdict]:
    """The verdicts on everything of ours that both records have.

    Times are taken relative to the rivals that took turns with ours, so that a machine that is slower today, or that
    was disturbed for a while, does not count against us.
    """
    cases = {case.key: case for case in old.cases}
    pairs = [
        (case, cases[case.key], result, before, regime)
        for case in new.cases
        if case.key in cases
        for result in case.results
        if result.ours and (before := _named(cases[case.key], result.name)) is not None
        for regime in result.times
        if regime in before.times
    ]
    same_rivals = _unchanged(old, new)
    drafts = []
    for case, old_case, result, before, regime in pairs:
        rivals = [name for name in _rivals(case, regime) if name in _rivals(old_case, regime)] if same_rivals else []
        samples = _relative(old_case, before, rivals, regime), _relative(case, result, rivals, regime)
        drafts.append((case, result, before, regime, tuple(rivals), samples))
    chances = judge([samples for *_, samples in drafts])
    return [
        Verdict(case.key, result.name, regime, verdict, change, interval, p, rivals, _errors(before, result))
        for (case, result, before, regime, rivals, _), (verdict, change, interval, p) in zip(
            drafts, chances, strict=True
        )
    ]


def judge(
    pairs: list[tuple[list[float], list[float]]],
) -> list[tuple[str, float, tuple[float, float], float]]:
    """Verdict, change, its interval and p for each pair of old and new samples.

    "faster" or "slower" where a Mann-Whitney test, corrected for the number of pairs, finds the samples to differ, and
    the medians do by more than `LEAST_CHANGE`.
    """
    if not pairs:
        return []
    chances = [float(mannwhitneyu(old, new, method="auto").pvalue) for old, new in pairs]
    adjusted = false_discovery_control(chances)
    out = []
    for (old, new), p in zip(pairs, adjusted, strict=True):
        change = statistics.median(new) / statistics.median(old)
        verdict = "same"
        if p < SIGNIFICANCE and abs(math.log(change)) > math.log1p(LEAST_CHANGE):
            verdict = "slower" if change > 1 else "faster"
        out.append((verdict, change, _interval(old, new, change), float(p)))
    return out


def _interval(old: list[float], new: list[float], change: float) -> tuple[float, float]:
    """Twice the standard error of the ratio of the medians, from the quartiles."""
    error = 2 * math.hypot(_error_of_median(old), _error_of_median(new))
    return change * math.exp(-error), change * math.exp(error)


def _error_of_median(samples: list[float]) -> float:
    """Relative; as of a normal distribution with the same quartiles."""
    if len(samples) < 2:
        return math.inf
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return 1.253 * (high - low) / 1.349 / middle / math.sqrt(len(samples))


def _relative(case: CaseRecord, result: Result, rivals: list[str], regime: str) -> list[float]:
    """Our times, round by round, over the median of the rivals' in the same round."""
    ours = result.times[regime].samples
    if not rivals:
        return ours
    theirs = [r.times[regime].samples for r in case.results if r.name in rivals]
    return [time / statistics.median(round_) for time, round_ in zip(ours, zip(*theirs, strict=True), strict=True)]


def _rivals(case: CaseRecord, regime: str) -> list[str]:
    return [result.name for result in case.results if not result.ours and regime in result.times]


def _named(case: CaseRecord, name: str) -> Result | None:
    return next((result for result in case.results if result.name == name), None)


def _unchanged(old: Record, new: Record) -> bool:
    """Whether the rivals are the same programs in both records."""
    mine = {"zfcuda", "python"}
    return {k: v for k, v in old.versions.items() if k not in mine} == {
        k: v for k, v in new.versions.items() if k not in mine
    }


def _errors(old: Result, new: Result) -> tuple[float | None, float | None]:
    return old.correct.get("error"), new.correct.get("error")
