"""``zfcuda bench``: statistics, verdicts, the record, the report, and that errors and missing rivals are shown."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import resource
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from browsers import Browser, browser  # noqa: F401
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

from zfcuda.bench import ceiling, chains, gpu, layers, nets, operators, report, suite, table
from zfcuda.bench.case import MODES, Built, Case, Contender, Outputs, Setting
from zfcuda.bench.compare import LEAST_CHANGE, compare, judge
from zfcuda.bench.errors import differences
from zfcuda.bench.record import CaseRecord, Missing, Record, Result, Times
from zfcuda.bench.shapes import CONVOLUTIONS, Conv, Map
from zfcuda.bench.suite import Effort, Suite, all_cases, select
from zfcuda.bench.timing import CpuClock, CudaClock, interleave, pinned, quartiles
from zfcuda.cli import main, options

ROOT = Path(__file__).resolve().parents[1]
ONCE = Effort(0, 1, 1)
TINY = Conv("conv1", 4, 13, 8, 3, 2, 1)
TINY_GROUPED = Conv("groups", 4, 9, 6, 3, 2, 1, 2)
TINY_POOLED = Map("pool1", 8, 7)


@pytest.fixture
def setting(tmp_path) -> Setting:
    return Setting(torch.device("cpu"), "cpu", 1, quick=True, batch=2, state=tmp_path)


def a_case(build: Callable[[Setting, object], Built], name: str = "tiny") -> Case:
    return Case("operators", name, MODES["ieee"], build, flops=1000, bytes=100)


def samples(draw: np.random.Generator, count: int, scale: float = 1.0) -> list[float]:
    """Times as machines give them: a hundredth of spread, and now and then a disturbance that doubles one."""
    times = draw.lognormal(0, 0.01, count) * np.where(draw.random(count) < 0.05, 2, 1)
    return [float(t) for t in scale * times]


# ---------------------------------------------------------------- statistics and verdicts


@pytest.mark.parametrize("count", [5, 10, 40])
def test_samples_of_one_distribution_are_the_same_nearly_always(count) -> None:
    draw = np.random.default_rng(count)
    verdicts = [v for v, *_ in judge([(samples(draw, count), samples(draw, count)) for _ in range(1000)])]
    assert verdicts.count("same") >= 990


@pytest.mark.parametrize("count", [7, 10, 40])
@pytest.mark.parametrize(("shift", "verdict"), [(1.2, "slower"), (1 / 1.2, "faster")])
def test_a_shift_is_found(count, shift, verdict) -> None:
    draw = np.random.default_rng(count)
    pairs = [(samples(draw, count), samples(draw, count, shift)) for _ in range(200)]
    found = [v for v, *_ in judge(pairs)]
    assert found.count(verdict) >= {7: 120, 10: 150, 40: 198}[count]  # a disturbed one of few hides much
    assert set(found) <= {verdict, "same"}


def test_a_shift_among_many_that_are_the_same_is_found() -> None:
    draw = np.random.default_rng(0)
    pairs = [(samples(draw, 15), samples(draw, 15, 1.3 if i == 7 else 1)) for i in range(100)]
    assert [i for i, (verdict, *_) in enumerate(judge(pairs)) if verdict != "same"] == [7]


def test_a_change_that_is_certain_but_small_is_the_same() -> None:
    old = [1 + i / 1e4 for i in range(20)]
    for factor, verdict in ((1 + LEAST_CHANGE / 2, "same"), (1 + 2 * LEAST_CHANGE, "slower")):
        [(said, change, (low, high), p)] = judge([(old, [factor * t for t in old])])
        assert said == verdict
        assert low < change < high and change == pytest.approx(factor)
        assert p < 1e-6


@given(st.integers(0, 2**32 - 1), st.floats(1e-7, 1e3), st.floats(0.5, 2))
def test_verdicts_do_not_depend_on_the_unit_and_mirror_each_other(seed, unit, shift) -> None:
    draw = np.random.default_rng(seed)
    old, new = samples(draw, 12), samples(draw, 12, shift)
    [(verdict, change, *_)] = judge([(old, new)])
    assert judge([([unit * t for t in old], [unit * t for t in new])])[0][0] == verdict
    [(mirrored, inverse, *_)] = judge([(new, old)])
    assert mirrored == {"slower": "faster", "faster": "slower", "same": "same"}[verdict]
    assert inverse == pytest.approx(1 / change)


@given(st.lists(st.floats(1e-9, 1e3), min_size=1, max_size=50))
def test_quartiles_are_in_order_and_within_the_samples(times) -> None:
    low, middle, high = quartiles(times)
    assert min(times) <= low <= middle <= high <= max(times)
    assert middle == pytest.approx(np.median(times))


def a_record(ours: float = 1.0, theirs: float = 1.0, seed: int = 0, torch_version: str = "2.13") -> Record:
    """Eight cases of one contender of ours and two rivals, these times as slow as they were meant to be."""
    draw = np.random.default_rng(seed)
    rounds = [samples(draw, 24) for _ in range(8)]  # what disturbs the machine disturbs all
    cases = []
    for i, disturbed in enumerate(rounds):
        times = [("zfcuda", True, ours), ("torch eager", False, 2 * theirs), ("torch.compile", False, 1.5 * theirs)]
        results = []
        for name, mine, scale in times:
            own = [scale * a * b for a, b in zip(disturbed, samples(draw, 24), strict=True)]
            results.append(Result(name, name, mine, {"as called": Times(own)}, {"error": 1e-7}))
        cases.append(CaseRecord("layers", f"conv{i}", "ieee", "call", 10**9, 10**6, results=results))
    return Record("2026-01-01T00:00:00+00:00", 1.0, "zfcuda bench", {"threads": 1, "pinned_to": [0]}, MACHINE,
                  {"zfcuda": "0", "torch": torch_version}, ["as called"], {"ieee": {"bytes": 1e10, "flops": 1e11}}, {},
                  cases)  # fmt: skip


MACHINE = {
    "processor": "<b>a processor</b>",
    "processors": 2,
    "caches": {"L1": 49152},
    "system": "Linux",
    "virtual": True,
    "zfcuda_level": "v4",
    "torch_level": "AVX512",
}


def test_a_machine_that_is_slower_today_changes_no_verdict() -> None:
    verdicts = compare(a_record(), a_record(ours=1.5, theirs=1.5, seed=1))
    assert len(verdicts) == 8
    assert {v.verdict for v in verdicts} == {"same"}
    assert {v.against for v in verdicts} == {("torch eager", "torch.compile")}


def test_ours_alone_being_slower_does() -> None:
    verdicts = compare(a_record(), a_record(ours=1.5, seed=1))
    assert {v.verdict for v in verdicts} == {"slower"}
    assert all(1.4 < v.change < 1.6 for v in verdicts)
    assert {v.verdict for v in compare(a_record(ours=1.5), a_record(seed=1))} == {"faster"}


def test_other_versions_of_the_rivals_are_no_measure() -> None:
    verdicts = compare(a_record(), a_record(ours=1.5, theirs=1.5, seed=1, torch_version="2.14"))
    assert {(v.verdict, v.against) for v in verdicts} == {("slower", ())}


# ---------------------------------------------------------------- the record


def test_a_record_survives_its_file(tmp_path) -> None:
    record = a_record()
    record.cases[0].results[0].correct["error"] = math.inf
    record.cases[0].missing.append(Missing("captum", "not installed"))
    record.save(tmp_path / "new" / "bench.json")
    assert Record.load(tmp_path / "new" / "bench.json") == record
    facts = json.loads((tmp_path / "new" / "bench.json").read_text(), parse_constant=pytest.fail)
    [ours, *_] = facts["cases"][1]["results"]
    times = ours["times"]["as called"]
    assert times["median"] == pytest.approx(np.median(times["samples"]))
    assert times["over_best_of_ours"] == 1
    assert times["rates"]["flops"] == pytest.approx(1e9 / times["median"])
    assert times["rates"]["of_ceiling"] == pytest.approx(0.01 / times["median"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not a record"),
        ("[]", "not a record"),
        ('{"schema": "other"}', "zfcuda.bench"),
        ('{"schema": "zfcuda.bench", "version": 99}', "version 99"),
        ('{"schema": "zfcuda.bench", "version": 1, "cases": []}', "not whole"),
    ],
)
def test_other_files_are_refused_with_a_reason(tmp_path, text, said) -> None:
    path = tmp_path / "bench.json"
    path.write_text(text)
    with pytest.raises(RuntimeError, match=said):
        Record.load(path)


def test_every_key_of_the_file_is_described() -> None:
    described = (ROOT / "docs" / "schema.md").read_text()

    def keys(value) -> Iterator[str]:
        if isinstance(value, dict):
            for key, part in value.items():
                yield key
                yield from keys(part)
        elif isinstance(value, list):
            for part in value:
                yield from keys(part)

    record = a_record()
    record.cases[0].missing.append(Missing("captum", "not installed"))
    facts = json.loads(record.to_json())
    free = {*MACHINE["caches"], *record.versions, "as called", "ieee", "threads", "pinned_to"}
    unknown = {key for key in keys(facts) if f"`{key}`" not in described} - free
    assert unknown == set()


# ---------------------------------------------------------------- errors, missing rivals


def with_contenders(*contenders: Contender) -> Case:
    maps = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    return a_case(lambda setting, mode: Built(list(contenders), lambda: operators.pooled_reference(maps[:1])))


def test_a_wrong_contender_is_shown_as_wrong(setting) -> None:
    maps = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    right, indices = operators.torch_pool(maps)
    moved = indices.clone()
    moved[0, 0, 0, 0] = maps[0, 0, :3, :3].argmin() // 3 * 9 + maps[0, 0, :3, :3].argmin() % 3
    wrong = right.clone()
    wrong[0, 1, 2, 2] += 0.5

    def contender(name: str, *result: torch.Tensor) -> Contender:
        return Contender(name, lambda: lambda: result, read=operators.pooled_outputs)

    nan = right.clone()
    nan[0, 0, 0, 0] = torch.nan
    case = with_contenders(
        contender("right", right, indices),
        contender("wrong switch", right, moved),
        contender("wrong value", wrong, indices),
        contender("NaN", nan, indices),
        contender("wrong shape", right[:, :, :1], indices),
    )
    record = Suite(setting, [case], effort=ONCE).run()
    found = {result.name: result.correct for result in record.cases[0].results}
    scale = float(right[0].abs().max())
    assert found["right"] == {"error": 0, "windows": 48, "switches": 0, "switches_beyond_rounding": 0}
    assert found["wrong switch"] == {"error": 0, "windows": 48, "switches": 1, "switches_beyond_rounding": 1}
    assert found["wrong value"]["error"] == pytest.approx(0.5 / scale, rel=1e-6)
    assert found["NaN"]["error"] == found["wrong shape"]["error"] == math.inf
    cells = {r.name: table.row(record, record.cases[0], r) for r in record.cases[0].results}
    assert cells["wrong switch"]["switches"] == "1, 1 wrong"
    assert cells["wrong value"]["error"] == f"{0.5 / scale:.1e}"


def test_switches_that_rounding_explains_are_not_wrong() -> None:
    maps = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    maps[0, 0, 0, 0], maps[0, 0, 2, 2] = 1, 1 - 1e-8
    reference = operators.pooled_reference(maps)
    outputs = Outputs([torch.full((1, 1, 1, 1), 1 - 1e-7)], torch.full((1, 1, 1, 1), 8))
    assert differences(outputs, reference) | {"error": 0} == {
        "error": 0,
        "windows": 1,
        "switches": 1,
        "switches_beyond_rounding": 0,
    }


def test_missing_and_failing_rivals_are_named_everywhere(setting, monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)

    def failing() -> Callable[[], object]:
        raise RuntimeError("no such kernel\nand more")

    chain = nn.Sequential(nn.ReLU())
    x = torch.randn(1, 3, 4, 4)
    case = a_case(
        lambda setting, mode: Built(
            [
                Contender("zfcuda", lambda: x.relu, ours=True),
                Contender("broken", failing),
                Contender("slow", lambda: x.relu, slow_start=True),
                *layers.runtimes(setting, chain, x, mode),
            ]
        )
    )
    record = Suite(setting, [case], effort=ONCE).run()
    [done] = record.cases
    reasons = {m.name: m.reason for m in done.missing}
    assert [r.name for r in done.results] == ["zfcuda", "ONNX Runtime"]
    assert "not installed: pip install 'zfcuda[bench]'" in reasons["OpenVINO"]
    assert reasons["broken"] == "failed: RuntimeError: no such kernel"
    assert reasons["slow"] == "left out by --quick"
    shown = printed(table.of_case(record, done))
    page = report.write(record, tmp_path).read_text()
    for name in reasons:
        assert name in shown and f"<b>{name}</b> did not take part" in page


def printed(parts: list[object]) -> str:
    console = Console(width=250, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for part in parts:
        console.print(part)
    return console.export_text()


def test_a_case_that_cannot_be_built_is_recorded_and_the_next_one_runs(setting) -> None:
    def broken(setting, mode) -> Built:
        raise RuntimeError("out of memory")

    fine = a_case(lambda setting, mode: Built([Contender("zfcuda", lambda: lambda: torch.ones(1), ours=True)]), "fine")
    record = Suite(setting, [a_case(broken), fine], effort=ONCE).run()
    assert record.cases[0].missing == [Missing("the whole case", "failed: RuntimeError: out of memory")]
    assert len(record.cases[1].results) == 1


def test_what_fails_on_the_way_leaves_the_rest(setting, monkeypatch) -> None:
    """No memory for the reference, a profiler that fails, a call that fails while it is timed."""
    calls = iter([torch.ones(1)] * 3)

    def no_memory() -> Outputs:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(suite, "algorithms", lambda *_: 1 / 0)
    fine, dying = (
        Contender("zfcuda", lambda: lambda: torch.ones(1), ours=True),
        Contender("dying", lambda: calls.__next__),
    )
    record = Suite(setting, [a_case(lambda *_: Built([fine], no_memory)), a_case(lambda *_: Built([fine, dying]))],
                   effort=ONCE).run()  # fmt: skip
    first, second = record.cases
    assert first.missing == [Missing("the reference in float64", "failed: RuntimeError: out of memory")]
    assert first.results[0].times and "ZeroDivisionError" in first.results[0].lacks
    assert "StopIteration" in second.missing[0].reason
    assert Record.from_json(record.to_json()) == record


# ---------------------------------------------------------------- cases


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_cases_cover_the_paper(setting, kind) -> None:
    full = list(all_cases(dataclasses.replace(setting, kind=kind, quick=False)))
    keys = [case.key for case in full]
    assert len(keys) == len(set(keys))
    for conv in CONVOLUTIONS:
        for what in ("forward", "data gradient", "weight gradient"):
            assert f"layers/{conv.name} {what}/ieee" in keys
        assert f"projection/{conv.name} trained weights/ieee" in keys
    assert {case.group for case in full} == {
        "operators", "calls", "layers", "grouped", "nets", "training", "mining", "projection"
    }  # fmt: skip
    assert {case.mode.name for case in full} == ({"ieee", "bf16"} if kind == "cpu" else set(MODES))
    quick = {case.key for case in all_cases(dataclasses.replace(setting, kind=kind, quick=True))}
    assert {key.split("/")[0] for key in quick} == {case.group for case in full}
    assert len(quick) < len(keys) / 2


def test_names_choose_cases(setting) -> None:
    chosen = select(all_cases(setting), ["CONV1 forward", "calls/"])
    assert {case.group for case in chosen} == {"layers", "calls"}
    with pytest.raises(ValueError, match="no case has it in its name"):
        select(all_cases(setting), ["no such"])


BUILDS = {
    "max_pool2d": partial(operators.pool, TINY_POOLED),
    "relu_max_pool2d": partial(operators.pool, TINY_POOLED, rectify=True),
    "maxima alone": partial(operators.maxima, TINY_POOLED),
    "maxima alone backward": partial(operators.maxima, TINY_POOLED, backward=True),
    "max_unpool2d": partial(operators.unpool, TINY_POOLED),
    "switch_gather": partial(operators.gather, TINY_POOLED),
    "norm": partial(operators.norm, TINY_POOLED),
    "norm backward": partial(operators.norm, TINY_POOLED, backward=True),
    "deconv2d": partial(operators.deconv, TINY),
    "unpool_relu_deconv2d": partial(operators.unpool_deconv, TINY),
    "renormalize_filters_": partial(operators.renormalise, TINY),
    **{name: partial(operators.small, name) for name in operators.CALLS},
    "forward": partial(layers.forward, TINY),
    "forward with pool": partial(layers.forward, TINY, through="pool"),
    "forward with pool and normalisation": partial(layers.forward, TINY, through="norm"),
    "data gradient": partial(layers.data_gradient, TINY),
    "weight gradient": partial(layers.weight_gradient, TINY),
    "grouped forward": partial(layers.forward, TINY_GROUPED),
    "grouped data gradient": partial(layers.data_gradient, TINY_GROUPED),
    "grouped weight gradient": partial(layers.weight_gradient, TINY_GROUPED),
}


def check_everybody(setting: Setting, build, allowed: set[str]) -> CaseRecord:
    [done] = Suite(setting, [a_case(build)], effort=ONCE).run().cases
    assert {m.name for m in done.missing} <= allowed, done.missing
    assert any(r.ours for r in done.results) and any(not r.ours for r in done.results)
    for result in done.results:
        assert result.correct["error"] < 1e-5, result
        assert result.correct.get("switches_beyond_rounding", 0) == 0
        assert all(t > 0 for times in result.times.values() for t in times.samples)
    return done


@pytest.mark.parametrize("name", BUILDS)
def test_all_contenders_of_a_case_compute_the_same(setting, name) -> None:
    compiled = {"torch.compile", "torch.compile channels_last"}
    check_everybody(setting, BUILDS[name], compiled)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["forward with pool", "norm", "weight gradient"])
def test_the_compiled_ones_too(setting, name) -> None:
    done = check_everybody(dataclasses.replace(setting, quick=False), BUILDS[name], set())
    assert "torch.compile" in {r.name for r in done.results}


def test_a_chain_means_the_same_in_onnx() -> None:
    runtime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    chain = nn.Sequential(
        nn.Conv2d(3, 8, 5, 2, 1), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True), nn.LocalResponseNorm(5, 0.01, 0.75, 2),
        nn.Conv2d(8, 6, 3, padding=2, dilation=2, groups=2), nn.Flatten(), nn.Dropout(), nn.Linear(6 * 36, 7),
    ).eval()  # fmt: skip
    x = torch.randn(2, 3, 26, 26)
    session = runtime.InferenceSession(chains.to_onnx(chain, x), providers=["CPUExecutionProvider"])
    [result] = session.run(None, {"image": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(result), chain(x).detach())


def test_torchs_twin_of_zfnet_computes_the_same() -> None:
    net, x = nets.zfnet(), torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(nets.run(nets.torch_twin(net), x), nets.run(net, x), rtol=1e-4, atol=1e-3)


# ---------------------------------------------------------------- clocks


class Script:
    """A clock whose calls take what they say, and which remembers their order."""

    regimes = ("one",)

    def __init__(self) -> None:
        self.order: list[str] = []

    def within(self, regime):
        return nullcontext()

    def repeats(self, seconds):
        return 1

    def sample(self, call, repeats, regime):
        name, seconds = call()
        self.order.append(name)
        return lambda: seconds

    def synchronize(self):
        pass


def test_contenders_take_turns_and_the_budget_sets_the_rounds() -> None:
    clock = Script()
    calls = {"a": lambda: ("a", 0.1), "b": lambda: ("b", 0.4)}
    times = interleave(clock, calls, "one", budget=5, fewest=3, most=40)
    assert times == {"a": [0.1] * 10, "b": [0.4] * 10}
    assert clock.order[-20:] == ["a", "b"] * 10
    assert len(interleave(clock, calls, "one", budget=0, fewest=3, most=40)["a"]) == 3
    assert len(interleave(clock, calls, "one", budget=1e9, fewest=3, most=40)["a"]) == 40


def test_buffers_are_reused_only_in_their_regime() -> None:
    clock = CpuClock()
    if "buffers reused" not in clock.regimes:
        pytest.skip("this C library has no mallopt")

    def faults(regime: str) -> int:
        """Of four calls, once holes of the right size are there."""
        counted = []
        with clock.within(regime):
            for _ in range(6):
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
                for _ in range(4):
                    torch.ones(1 << 24)  # 64 MB
                counted.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        return min(counted)

    pages = 4 * (1 << 26) // resource.getpagesize()
    reused, called = faults("buffers reused"), faults("as called")
    assert reused < pages / 100  # huge pages may make fewer of the others, too
    assert called > 10 * reused or called == 0


def test_pinned_threads_are_given_back(setting) -> None:
    import os

    before = os.sched_getaffinity(0), torch.get_num_threads()
    with pinned(1) as processors:
        assert os.sched_getaffinity(0) == set(processors) and len(processors) == 1
        assert torch.get_num_threads() == 1
    assert (os.sched_getaffinity(0), torch.get_num_threads()) == before


class StandIn:
    """What `CudaClock` asks of ``torch.cuda``, on a processor; remembers it."""

    def __init__(self, capturable: bool = True) -> None:
        self.said: list[str] = []
        self.capturable = capturable

    def get_device_properties(self, device):
        return SimpleNamespace(L2_cache_size=1 << 12)

    def synchronize(self):
        self.said.append("synchronize")

    def current_stream(self):
        return SimpleNamespace(wait_stream=lambda other: None, cuda_stream=7)

    Stream = current_stream

    def stream(self, stream):
        return nullcontext()

    def Event(self, enable_timing):
        assert enable_timing
        return SimpleNamespace(
            record=lambda: self.said.append("record"), synchronize=lambda: None, elapsed_time=lambda end: 2.0
        )

    def CUDAGraph(self):
        return SimpleNamespace(replay=lambda: self.said.append("replay"))

    @contextmanager
    def graph(self, graph):
        self.said.append("capture")
        if not self.capturable:
            raise RuntimeError("operation not permitted when stream is capturing")
        yield


def test_a_sample_of_a_gpu_is_a_call_between_two_events(monkeypatch) -> None:
    cuda = StandIn()
    clock = CudaClock(torch.device("cpu"), cuda)
    calls = clock.calls(Contender("x", lambda: lambda: cuda.said.append("call")))
    assert set(calls) == set(clock.regimes)
    monkeypatch.setattr(clock, "_flushed", SimpleNamespace(fill_=lambda value: cuda.said.append("flush")))
    for regime, order in {
        "warm": ["call", "record", "call", "record"],
        "cold": ["flush", "record", "call", "record"],
        "graph warm": ["replay", "record", "replay", "record"],
        "graph cold": ["flush", "record", "replay", "record"],
    }.items():
        cuda.said.clear()
        assert clock.sample(calls[regime], 1, regime)() == pytest.approx(2e-3)
        assert cuda.said == order


def test_the_flush_is_larger_than_the_l2() -> None:
    assert CudaClock(torch.device("cpu"), StandIn())._flushed.nbytes > 1 << 12


def test_what_cannot_be_captured_is_timed_without_a_graph_and_says_so() -> None:
    contender = Contender("x", lambda: lambda: None, lacks="switches")
    calls = CudaClock(torch.device("cpu"), StandIn(capturable=False)).calls(contender)
    assert set(calls) == {"warm", "cold"}
    assert "switches; cannot be captured into a CUDA graph: operation not permitted" in contender.lacks


def test_cupys_timer_is_the_second_one(monkeypatch) -> None:
    clock, called = CudaClock(torch.device("cpu"), StandIn()), []
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert clock.second(lambda: None) is None
    cupy, cupyx, profiler = ModuleType("cupy"), ModuleType("cupyx"), ModuleType("cupyx.profiler")
    streams = []
    cupy.cuda = SimpleNamespace(
        Device=lambda number: nullcontext(), ExternalStream=lambda s: (streams.append(s), nullcontext())[1]
    )

    def benchmark(call, n_repeat, n_warmup):
        called.extend(call() for _ in range(n_repeat + n_warmup))
        return SimpleNamespace(gpu_times=np.full((1, n_repeat), 0.25))

    profiler.benchmark = benchmark
    for module in (cupy, cupyx, profiler):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    assert clock.second(lambda: 1) == [0.25] * 10
    assert called == [1] * 11
    assert streams == [7]  # torch's own


def test_the_suite_of_a_gpu_on_a_stand_in(setting, monkeypatch, tmp_path) -> None:
    """The whole path of a GPU: modes, cuDNN's rivals, events, graphs, the record, the report."""
    fused = lambda x, w, b, stride, padding, dilation, groups: nn.functional.conv2d(  # noqa: E731
        x, w, b, stride, padding, dilation, groups
    ).relu_()
    monkeypatch.setattr(torch, "cudnn_convolution_relu", fused)
    setting = dataclasses.replace(setting, kind="cuda")
    cases = [
        Case("layers", "tiny", MODES[mode], partial(layers.forward, TINY, through="norm"), flops=1000, bytes=100)
        for mode in ("ieee", "tf32", "3xtf32", "bf16")
    ]
    monkeypatch.setattr("zfcuda.bench.ceiling.measured", lambda *_: {"bytes": 1e12, "flops": 1e13})
    record = Suite(setting, cases, clock=CudaClock(setting.device, StandIn()), effort=ONCE).run()
    by_mode = {case.mode: {r.name: r for r in case.results} for case in record.cases}
    assert {"zfcuda", "cuDNN eager channels_last", "cuDNN convolution_relu contiguous"} <= by_mode["ieee"].keys()
    assert set(by_mode["ieee"]["zfcuda"].times) == set(CudaClock.regimes)
    assert {m.reason for m in record.cases[2].missing} >= {"torch has no 3xtf32"}
    assert not any(r.name.startswith("cuDNN") for r in record.cases[2].results)
    assert record.cases[0].clocks["before"]
    assert Record.from_json(record.to_json()) == record
    assert report.write(record, tmp_path).is_file()
    assert (tmp_path / "roofline-ieee.png").is_file()


def test_data_sheets_by_name() -> None:
    assert ceiling.datasheet("NVIDIA H100 80GB HBM3", "bf16")["flops"] == 989e12
    assert ceiling.datasheet("NVIDIA H100 PCIe", "ieee")["bytes"] == 2e12
    assert ceiling.datasheet("NVIDIA A100-SXM4-40GB", "3xtf32")["flops"] == pytest.approx(52e12)
    assert ceiling.datasheet("Tesla T4", "tf32") is None and ceiling.datasheet("Tesla T4", "fp16")["flops"] == 65e12
    assert ceiling.datasheet("Another GPU", "ieee") is None


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("bench") / "a folder #1"
    out = CliRunner().invoke(main, ["bench", "--quick", "-k", "calls/", "--threads", "1", "--output", str(folder)])
    return SimpleNamespace(folder=folder, out=out)


def test_the_command_leaves_a_record_a_table_and_a_page(tiny_run) -> None:
    assert tiny_run.out.exit_code == 0, tiny_run.out.output
    record = Record.load(tiny_run.folder / "bench.json")
    assert {case.name for case in record.cases} == set(operators.CALLS)
    assert record.settings["threads"] == 1 and len(record.settings["pinned_to"]) == 1
    assert record.versions["torch"] == torch.__version__ or torch.__version__.startswith(record.versions["torch"])
    assert all(r.correct["error"] < 1e-6 for case in record.cases for r in case.results)
    for text in ("calls/conv2d_relu/ieee", "torch eager", "as called", "buffers reused", "The report:"):
        assert text in tiny_run.out.output
    assert (tiny_run.folder / "ratios-ieee.png").stat().st_size > 1000


def doctored(tiny_run, tmp_path: Path, factor: float) -> Path:
    """The record of a run in which ours took so many times as long, in more rounds."""
    record = Record.load(tiny_run.folder / "bench.json")
    for case in record.cases:
        for result in case.results:
            for times in result.times.values():
                times.samples = [t * (factor if result.ours else 1) for t in times.samples * 4]
    path = tmp_path / "old.json"
    record.save(path)
    return path


@pytest.mark.parametrize(("factor", "code", "verdict"), [(1e-3, options.SLOWER, "slower"), (1e3, 0, "faster")])
def test_a_comparison_ends_in_its_exit_code(tiny_run, tmp_path, factor, code, verdict) -> None:
    old = doctored(tiny_run, tmp_path, factor)
    arguments = ["bench", "--quick", "-k", "calls/conv2d_relu", "--threads", "1", "--compare", str(old)]
    out = CliRunner().invoke(main, [*arguments, "--output", str(tmp_path / "new")])
    assert out.exit_code == code, out.output
    assert re.search(rf"calls/conv2d_relu/ieee +zfcuda +as called +{verdict}", out.output)
    assert f"<td>{verdict}</td>" in (tmp_path / "new" / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "tpu"], "Expected one of cpu, cuda|must be cpu or cuda"),
        (["--device", "mps"], "must be cpu or cuda"),
        (["--threads", "10000"], "this process may use"),
        (["-k", "no such case"], "no case has it in its name"),
        (["--compare", str(ROOT / "README.md")], "not a record"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, arguments, said) -> None:
    out = CliRunner().invoke(main, ["bench", "--quick", "--output", str(tmp_path), *arguments])
    assert out.exit_code in (1, 2)
    assert re.search(said, out.output), out.output


def test_the_page_opens_from_the_disk_and_asks_for_nothing(tiny_run, tmp_path, browser: Browser) -> None:  # noqa: F811
    record = Record.load(tiny_run.folder / "bench.json")
    slower = compare(a_record(), a_record(ours=1.5, seed=1))
    record.cases += a_record().cases
    page = report.write(record, tmp_path / "with <b>verdicts", slower)
    with browser.reading(page) as reader:
        assert reader.page.locator("h3").count() == len(record.cases)
        assert reader.page.locator(".verdicts tr").count() == len(slower) + 1
        pictures = reader.page.locator("img")
        assert pictures.count() == 2
        assert pictures.evaluate_all("all => all.every(i => i.complete && i.naturalWidth > 300)")
    assert reader.said == []
    assert [url for url in reader.asked if not url.startswith("data:")] == [page.as_uri()]


# ---------------------------------------------------------------- the report of a GPU's owner

SANITIZER = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do shift; case "$1" in memcheck|racecheck|9) shift;; esac; done
exec "$@"
"""


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Path:
    """A clone with a test that fails, and on the PATH what a machine with a GPU has; returns the clone."""
    bin_, source = tmp_path / "bin", tmp_path / "clone"
    bin_.mkdir()
    (source / "tests").mkdir(parents=True)
    for name, text in (("nvidia-smi", "#!/bin/sh\necho A stand-in, 9.0, 580.65\n"), ("compute-sanitizer", SANITIZER)):
        (bin_ / name).write_text(text)
        (bin_ / name).chmod(0o755)
    (source / "csrc").mkdir()
    (source / "csrc" / "build.py").write_text("def fetch_nvcc(): pass\ndef find_toolkit(): return 'a toolkit'\n")
    (source / "setup.py").write_text("import os; print('built', os.environ['ZFCUDA_CUDA'])\n")
    tests = "def test_it(): pass\ndef test_wrong(): assert 0, 'found it'\n"
    (source / "tests" / "test_conv2d_relu.py").write_text(tests)
    (source / "tests" / "test_none.py").write_text("")
    monkeypatch.setenv("PATH", f"{bin_}:{Path(sys.executable).parent}:/usr/bin:/bin")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return source


def test_every_step_runs_whatever_became_of_the_others(machine, tmp_path, monkeypatch) -> None:
    steps = gpu.steps

    def shorter(*arguments) -> list[gpu.Step]:
        todo = [s for s in steps(*arguments) if not s.name.startswith("bench/") or s.name == "bench/calls"]
        return [
            *todo,
            gpu.Step("absent", ["no-such-command"]),
            gpu.Step("endless", ["tail", "-f", "/dev/null"], limit=1),
        ]

    monkeypatch.setattr(gpu, "steps", shorter)
    folder = tmp_path / "report"
    arguments = ["--output", str(folder), "--source", str(machine), "--device", "cpu", "--quick", "--sanitize"]
    out = CliRunner().invoke(main, ["gpu-report", *arguments])
    done = {step["name"]: step for step in json.loads((folder / "summary.json").read_text())}
    assert {name: step["code"] for name, step in done.items()} == {
        "nvcc": 0, "build": 0, "nvidia-smi": 0, "info": 0, "packages": 0, "tests/test_conv2d_relu": 1,
        "tests/test_none": 5, "memcheck/test_conv2d_relu": 1, "racecheck/test_conv2d_relu": 1, "bench/calls": 0,
        "nvidia-smi-after": 0, "absent": None, "endless": None,
    }, out.output  # fmt: skip
    assert (done["nvcc"]["said"], done["build"]["said"]) == ("a toolkit", "built auto")
    assert {name for name, step in done.items() if not step["good"]} == {
        "tests/test_conv2d_relu", "memcheck/test_conv2d_relu", "racecheck/test_conv2d_relu", "absent", "endless"
    }  # fmt: skip
    for log in ("tests", "memcheck"):
        assert "found it" in (folder / log / "test_conv2d_relu.log").read_text()
    assert 'failures="1"' in (folder / "tests" / "test_conv2d_relu.xml").read_text()
    assert done["endless"]["said"] == "stopped after 1 s"
    assert json.loads((folder / "info.log").read_text())["torch"] == torch.__version__
    assert "FAILED absent" in (folder / "README.txt").read_text()
    assert "bench/calls/report.html" in (folder / "README.txt").read_text()
    assert out.exit_code == 1 and "attach" in out.output
    (folder / "bench" / "calls" / "trained.pt").write_text("large")
    with zipfile.ZipFile(gpu.archive(folder)) as file:
        names = set(file.namelist())
    bench = {"report/bench/calls/bench.json", "report/bench/calls/report.html", "report/bench/calls.log"}
    assert {"report/README.txt", "report/tests/test_conv2d_relu.xml", *bench} <= names
    assert not any(name.endswith(".pt") for name in names)


def test_on_a_gpu_the_steps_are_its_own(tmp_path) -> None:
    todo = {step.name: step for step in gpu.steps(tmp_path, ROOT, "cuda", quick=False, sanitize=True)}
    assert dict(todo["build"].env) == {"ZFCUDA_CUDA": "on"}
    files = {path.stem for path in (ROOT / "tests").glob("test_*.py")}
    assert {name.split("/")[1] for name in todo if name.startswith("tests/")} == files
    assert all(f"{tool}/{file}" in todo for tool in gpu.SANITIZERS for file in gpu.SANITIZED)
    assert "-n 0 -m gpu tests/test_conv2d_relu.py" in " ".join(todo["tests/test_conv2d_relu"].command)
    benches = {name.split("/")[1]: step.command for name, step in todo.items() if name.startswith("bench/")}
    assert set(benches) == {case.group for case in all_cases(Setting(torch.device("cpu"), "cpu", 1))}
    assert all("cuda" in command and "--quick" not in command for command in benches.values())
    assert not any(step.name.startswith("memcheck") for step in gpu.steps(tmp_path, ROOT, "cuda", False, False))


def test_a_folder_that_is_no_clone_is_refused(tmp_path) -> None:
    out = CliRunner().invoke(main, ["gpu-report", "--source", str(tmp_path), "--output", str(tmp_path / "out")])
    assert out.exit_code == 2
    assert "no clone" in out.output


def test_the_ceilings_are_of_the_best_of_the_products(setting, monkeypatch) -> None:
    """By a clock on which a copy takes 1 s, ``mm`` 4 s and the convolution 2 s."""
    seconds = {"copy": 1.0, "mm": 4.0, "conv2d": 2.0}
    monkeypatch.setattr(ceiling, "interleave", lambda clock, works, *_: {name: [seconds[name]] * 2 for name in works})
    for mode, part in (("ieee", 1), ("3xtf32", 3)):
        found = ceiling.measured(setting, CpuClock(), MODES[mode])
        assert found == {"bytes": 2 * 4 * 2**25, "flops": pytest.approx(2 * 2048**3 / 2 / part)}


def test_the_ceilings_are_the_better_of_start_and_end(setting, monkeypatch) -> None:
    """A machine that is busy when a run begins."""
    found = iter([{"bytes": 2.0, "flops": 3.0}, {"bytes": 1.0, "flops": 9.0}])
    monkeypatch.setattr(ceiling, "measured", lambda *_: next(found))
    case = a_case(partial(operators.small, "max_pool2d"))
    record = Suite(setting, [case, case], effort=ONCE).run()
    assert record.ceilings == {"ieee": {"bytes": 2.0, "flops": 9.0}}
