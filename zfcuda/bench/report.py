"""The report of a record: one HTML page with its figures inside, and the same figures as PNG files beside it."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from zfcuda.bench.compare import Verdict
from zfcuda.bench.record import NOISY, CaseRecord, Record
from zfcuda.bench.table import fastest, row, seconds_text

__all__ = ["PAGE", "write"]

PAGE = "report.html"
OURS, THEIRS, ROOF = "#9a3b17", "#5a6b7b", "#1d1c1a"
#: A marker for each family of rivals, in the order in which they appear.
MARKERS = "osD^vP*X<>"


def write(record: Record, folder: Path, verdicts: Sequence[Verdict] = ()) -> Path:
    """Write the page and the figures; returns the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for mode in dict.fromkeys(case.mode for case in record.cases):
        for name, title, figure in (
            (f"roofline-{mode}.png", f"Roofline, {mode}", roofline(record, mode)),
            (f"ratios-{mode}.png", f"Rivals' times over ours, {mode}", ratios(record, mode)),
        ):
            if figure is not None:
                data = _png(figure)
                (folder / name).write_bytes(data)
                pictures.append({"title": title, "data": base64.b64encode(data).decode()})
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("zfcuda.bench"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("report.html.j2").render(
        record=record,
        cases=[_shown(record, case) for case in record.cases],
        pictures=pictures,
        verdicts=verdicts,
        facts=_facts(record),
        noise=record.noise,
        noisy=record.noise >= NOISY,
        ceilings=_ceilings(record),
    )
    path = folder / PAGE
    path.write_text(html, encoding="utf-8")
    return path


def _shown(record: Record, case: CaseRecord) -> dict[str, Any]:
    """A case as rows of cells; the bar is the median of the contender's fastest regime, over the slowest's."""
    medians = {r.name: r.times[fastest(r)].median for r in case.results}
    longest = max(medians.values(), default=1)
    rows = [
        {
            "name": result.name,
            "ours": result.ours,
            "cells": row(record, case, result),
            "bar": 100 * medians[result.name] / longest,
            "algorithm": ", ".join(result.algorithm),
            "second": seconds_text(sorted(result.second_timer)[len(result.second_timer) // 2])
            if result.second_timer
            else "",
            "lacks": result.lacks,
            "wrong": result.correct.get("switches_beyond_rounding", 0) > 0 or result.correct.get("error", 0) > 0.1,
        }
        for result in case.results
    ]
    return {"case": case, "rows": rows, "second": any(r["second"] for r in rows)}


def _facts(record: Record) -> list[tuple[str, str]]:
    machine, gpu = record.machine, record.machine.get("gpu")
    virtual = ", virtual" if machine["virtual"] else ""
    facts = [
        ("started", f"{record.started}, {record.seconds:.0f} s"),
        ("command", record.command),
        ("processor", f"{machine['processor']}, {machine['processors']} processors{virtual}"),
        ("caches", ", ".join(f"{level} {size >> 10} KB" for level, size in machine["caches"].items())),
        ("threads", f"{record.settings['threads']}, on processors {record.settings['pinned_to']}"),
        ("instruction sets", f"zfcuda {machine['zfcuda_level']}, torch {machine['torch_level']}"),
        ("system", machine["system"]),
        ("versions", ", ".join(f"{name} {version or 'missing'}" for name, version in record.versions.items())),
    ]
    if gpu:
        size = f"{gpu['memory_bytes'] / 2**30:.0f} GiB, L2 {gpu['l2_bytes'] >> 20} MB"
        facts.insert(2, ("GPU", f"{gpu['name']}, {gpu['arch']}, {gpu['multiprocessors']} multiprocessors, {size}"))
    return facts


def _ceilings(record: Record) -> list[tuple[str, str]]:
    sources = (("measured", record.ceilings), ("data sheet", record.datasheet))
    return [
        (f"{mode}, {source}", f"copy {c['bytes'] / 1e9:.4g} GB/s, product {c['flops'] / 1e9:.4g} GFLOP/s")
        for source, ceilings in sources
        for mode, c in ceilings.items()
    ]


# ---------------------------------------------------------------- figures


def roofline(record: Record, mode: str) -> Figure | None:
    """FLOP/s of useful work over FLOP per least byte, under the measured ceilings, for the cases that count both."""
    counted = [case for case in record.cases if case.mode == mode and case.flops and case.bytes and case.results]
    if not counted:
        return None
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    intensities = [case.flops / case.bytes for case in counted]
    roofs = [("measured", record.ceilings[mode], "-")]
    roofs += [("data sheet", record.datasheet[mode], "--")] if mode in record.datasheet else []
    ridges = [ceiling["flops"] / ceiling["bytes"] for _, ceiling, _ in roofs]
    left, right = min(intensities + ridges) / 2, max(intensities + ridges) * 2
    for label, ceiling, style in roofs:
        xs = [left, ceiling["flops"] / ceiling["bytes"], right]
        ys = [min(ceiling["flops"], ceiling["bytes"] * x) / 1e12 for x in xs]
        axes.plot(xs, ys, style, color=ROOF, label=f"{label}: copy and product")
    markers = _markers(counted)
    for case in counted:
        for result in case.results:
            x, y = case.flops / case.bytes, case.flops / result.times[fastest(result)].median / 1e12
            colour, size, order = (OURS, 7, 3) if result.ours else (THEIRS, 5, 2)
            axes.plot(x, y, markers[result.family], alpha=0.8, color=colour, markersize=size, zorder=order)
    for x, y, label in _labels(counted):
        axes.annotate(label, (x, y), (2, 5), textcoords="offset points", fontsize=6, rotation=60)
    for family, marker in markers.items():
        axes.plot([], [], marker, color=OURS if family == "zfcuda" else THEIRS, label=family)
    axes.set(xscale="log", yscale="log", xlabel="useful FLOP per least byte", ylabel="TFLOP/s of useful work")
    figure.suptitle(f"{_name(record)}, {mode}")
    axes.margins(y=0.2)
    axes.grid(which="both", alpha=0.2)
    axes.legend(fontsize=8)
    return figure


def _labels(cases: Sequence[CaseRecord]) -> Iterator[tuple[float, float, str]]:
    """Of cases of about the same intensity, a fifth of a decade, the name of the highest, and how many others."""
    columns: dict[int, list[tuple[float, CaseRecord]]] = {}
    for case in cases:
        best = max(case.flops / r.times[fastest(r)].median / 1e12 for r in case.results)
        columns.setdefault(round(5 * math.log10(case.flops / case.bytes)), []).append((best, case))
    for column in columns.values():
        best, case = max(column, key=lambda pair: pair[0])
        name = case.name if case.group == "layers" else f"{case.group}: {case.name}"
        yield case.flops / case.bytes, best, name + (f", {len(column) - 1} more" if len(column) > 1 else "")


def ratios(record: Record, mode: str) -> Figure | None:
    """For each case the best of each family of rivals over the best of ours, under the regime where ours is fastest."""
    counted = [case for case in record.cases if case.mode == mode and any(r.ours for r in case.results)]
    counted = [case for case in counted if any(not r.ours for r in case.results)]
    if not counted:
        return None
    figure = Figure(figsize=(9, 1.2 + 0.28 * len(counted)), layout="constrained")
    axes = figure.add_subplot()
    markers = _markers(counted)
    for y, case in enumerate(reversed(counted)):
        regime = fastest(min((r for r in case.results if r.ours), key=lambda r: r.times[fastest(r)].median))
        best: dict[str, float] = {}
        for result in case.results:
            ratio = case.ratio(result, regime)
            if ratio is not None and not result.ours:
                best[result.family] = min(ratio, best.get(result.family, ratio))
        for family, ratio in best.items():
            axes.plot(ratio, y, markers[family], color=THEIRS, markersize=6, alpha=0.85)
    axes.axvline(1, color=OURS)
    axes.set_yticks(range(len(counted)), [f"{c.group}: {c.name}" for c in reversed(counted)], fontsize=7)
    axes.set(
        xscale="log", xlabel="rival's time over ours (right of the line zfcuda is faster)", ylim=(-1, len(counted))
    )
    for family, marker in markers.items():
        if family != "zfcuda":
            axes.plot([], [], marker, color=THEIRS, label=family)
    axes.grid(axis="x", which="both", alpha=0.2)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _markers(cases: Sequence[CaseRecord]) -> dict[str, str]:
    families = dict.fromkeys(result.family for case in cases for result in case.results)
    return {family: MARKERS[i % len(MARKERS)] for i, family in enumerate(families)}


def _name(record: Record) -> str:
    gpu = record.machine.get("gpu")
    return gpu["name"] if gpu else f"{record.machine['processor']}, {record.settings['threads']} thread(s)"


def _png(figure: Figure) -> bytes:
    with io.BytesIO() as file:
        FigureCanvasAgg(figure).print_figure(file, format="png", dpi=130)
        return file.getvalue()
