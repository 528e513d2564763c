"""The main job: the nine strongest activations of every map of ZFNet's five layers, projected to pixels.

The last benchmark adds the layers up and demands the ratios that the library promises, on one thread, with trained
weights; layer 1's projections are copies of filters, so it reports the job without it, too.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from conftest import cases, checked

from zfcuda.bench.case import Case, Setting
from zfcuda.bench.projection import LAYERS, job
from zfcuda.bench.record import CaseRecord
from zfcuda.bench.suite import Effort, Suite

PROMISED = {"dense torch": 100, "captum": 180, "crops in torch": 18}
FIVE_ROUNDS = Effort(0, 5, 5)
REGIME = "as called"
DONE: dict[str, CaseRecord] = {}
COUNTS: dict[str, int] = {}


def best(layer: str) -> dict[str, float]:
    """Seconds of a projection by the best way of each family."""
    seconds: dict[str, float] = {}
    for result in DONE[layer].results:
        median = result.times[REGIME].median
        seconds[result.family] = min(median, seconds.get(result.family, median))
    return seconds


@cases("projection")
def bench_layer(benchmark, setting: Setting, case: Case) -> None:
    setting = replace(setting, threads=1)
    if setting.kind != "cpu":
        pytest.skip("the promise is for one thread of a processor")
    layer = case.name.split()[0]
    DONE[layer] = checked(Suite(setting, [case], effort=FIVE_ROUNDS).run())
    COUNTS[layer] = job(setting.state, setting.quick, setting.device).count(layer)
    seconds = best(layer)
    benchmark.extra_info["ms a projection"] = {family: round(1e3 * s, 4) for family, s in seconds.items()}
    benchmark.pedantic(lambda: None, rounds=1)
    assert set(seconds) == {"zfcuda", *PROMISED}, DONE[layer].missing


@pytest.mark.parametrize("layers", [LAYERS, LAYERS[1:]], ids=["all", "without layer 1"])
def bench_whole_job(benchmark, layers: tuple[str, ...]) -> None:
    if set(layers) - DONE.keys():
        pytest.skip("needs the layers' benchmarks in the same run")
    seconds = {name: sum(COUNTS[layer] * best(layer)[name] for layer in layers) for name in ("zfcuda", *PROMISED)}
    ratios = {name: seconds[name] / seconds["zfcuda"] for name in PROMISED}
    benchmark.extra_info.update({f"{name} / zfcuda": round(ratio, 1) for name, ratio in ratios.items()})
    benchmark.extra_info["seconds"] = {name: round(s, 2) for name, s in seconds.items()}
    benchmark.extra_info["projections"] = sum(COUNTS[layer] for layer in layers)
    benchmark.pedantic(lambda: None, rounds=1)
    for name, least in PROMISED.items():
        assert ratios[name] >= least, f"{name} takes {ratios[name]:.1f} times our time; {least} is promised"
