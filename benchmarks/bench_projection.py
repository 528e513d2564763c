"""The main job: the nine strongest activations of every map of ZFNet's five layers, projected to pixels.

Ours against captum, dense torch and crops in torch, on one thread, with trained weights (trained.py); the times of
the rivals, of a few activations each, are scaled to the layer. The last benchmark adds the layers up and demands the
ratios that the library promises; layer 1's projections are copies of filters, so it reports the job without it, too.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import projection_rivals as rivals
import pytest
import torch
from trained import photographs_224, trained_zfnet

from zfcuda import DeconvNet
from zfcuda.deconv import Mined, mine

IMAGES = 400
ROUNDS = 5
#: Batches that the rivals are tried with; the best one counts.
BATCHES = {"dense torch": (1, 8), "crops in torch": (8, 32), "captum": (1, 8)}
PROMISED = {"dense torch": 100, "captum": 180, "crops in torch": 18}


@pytest.fixture(scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def job(one_thread: None) -> tuple[DeconvNet, torch.Tensor, Mined]:
    net = trained_zfnet()
    images = photographs_224(IMAGES)
    return DeconvNet(net), images, mine(net, torch.utils.data.TensorDataset(images), LAYERS, progress=False)


LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5")
MILLISECONDS: dict[str, dict[str, float]] = {layer: {} for layer in LAYERS}
COUNTS: dict[str, int] = {}


def once(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def sample(net: DeconvNet, images: torch.Tensor, mined: Mined, layer: str, batch: int) -> rivals.Activations:
    """Strongest activations of maps spread over the layer."""
    found = mined[layer]
    alive = (found.images[:, 0] >= 0).nonzero()[:, 0]
    units = alive[torch.arange(batch) * len(alive) // batch]
    chosen = images[found.images[units, 0]]
    return rivals.Activations(
        net.model,  # type: ignore[arg-type]
        int(layer[-1]),
        chosen,
        net(chosen),
        units,
        found.positions[units, 0],
        found.values[units, 0],
        {name: kept[units, 0] for name, kept in found.switches.items()},
    )


def variants(net: DeconvNet, images: torch.Tensor, mined: Mined, layer: str) -> dict[str, list[tuple[int, Callable]]]:
    """Every way of every rival: its batch and its call."""
    out: dict[str, list[tuple[int, Callable]]] = {name: [] for name in BATCHES}
    for name, batches in BATCHES.items():
        for batch in batches:
            activations = sample(net, images, mined, layer, batch)
            if name == "captum":
                out[name].append((batch, rivals.captum(activations)))
            else:
                make = rivals.dense if name == "dense torch" else rivals.crops
                out[name] += [(batch, torch.no_grad()(make(activations, last))) for last in (False, True)]
    return out


@pytest.mark.parametrize("layer", LAYERS)
def bench_layer(benchmark, job, layer: str) -> None:
    net, images, mined = job

    def ours() -> None:
        for _ in net.iterate_mined(mined, layer):
            pass

    COUNTS[layer] = int(mined[layer].count.sum())
    calls = variants(net, images, mined, layer)
    times: dict[str, list[list[float]]] = {name: [[] for _ in ways] for name, ways in calls.items()}
    own = []
    for round_ in range(ROUNDS + 1):
        own.append(once(ours) / COUNTS[layer])
        for name, ways in calls.items():
            for i, (batch, call) in enumerate(ways):
                times[name][i].append(once(call) / batch)
        if not round_:  # it warms up
            own.clear()
            for ways in times.values():
                for way in ways:
                    way.clear()
    milliseconds = MILLISECONDS[layer]
    milliseconds["zfcuda"] = 1e3 * statistics.median(own)
    for name, ways in times.items():
        milliseconds[name] = 1e3 * min(statistics.median(way) for way in ways)
        benchmark.extra_info[f"{name} / zfcuda"] = round(milliseconds[name] / milliseconds["zfcuda"], 1)
    benchmark.extra_info["ms a projection"] = {name: round(ms, 4) for name, ms in milliseconds.items()}
    benchmark.pedantic(ours, rounds=1)


@pytest.mark.parametrize("layers", [LAYERS, LAYERS[1:]], ids=["all", "without layer 1"])
def bench_whole_job(benchmark, layers: tuple[str, ...]) -> None:
    if set(layers) - COUNTS.keys():
        pytest.skip("needs the layers' benchmarks in the same run")
    seconds = {
        name: sum(COUNTS[layer] * MILLISECONDS[layer][name] for layer in layers) / 1e3 for name in ("zfcuda", *BATCHES)
    }
    ratios = {name: seconds[name] / seconds["zfcuda"] for name in BATCHES}
    benchmark.extra_info.update({f"{name} / zfcuda": round(ratio, 1) for name, ratio in ratios.items()})
    benchmark.extra_info["seconds"] = {name: round(s, 2) for name, s in seconds.items()}
    benchmark.extra_info["projections"] = sum(COUNTS[layer] for layer in layers)
    benchmark.pedantic(lambda: None, rounds=1)
    for name, least in PROMISED.items():
        assert ratios[name] >= least, f"{name} takes {ratios[name]:.1f} times our time; {least} is promised"
