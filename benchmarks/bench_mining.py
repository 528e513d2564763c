"""What mining costs beside the forward passes that it needs, as a function of the number of images.

``python benchmarks/bench_mining.py [--rounds 12] [--threads 1]``: two to three minutes on one core. ZFNet's five
convolutions, batches of 32, as in the case of ``zfcuda bench``. Each round times, in turn:

* the forward pass alone, by the same executor, on the same batch, each layer with a pool as one operator; and with
  every layer and pool apart, whose maps are in memory, as a pass that looks at them has to be;
* the maxima of the layers with a pool: what their operators take longer than those without maxima;
* a batch of mining in which no entry, or so many entries, enter the lists, their windows of patches and switches
  included; its own time is what is left without the forward pass within it, and those maxima;
* the rival: the forward pass, ``max`` over every map by torch, ``topk`` of every list joined with the batch's maxima
  (which keeps neither switches nor patches).

The time of a batch of mining is ``fixed + entry * entries``. Over a data set of N images in random order a map's list
has ``top * (1 + ln(N / top))`` entries, so what N images take follows (model, from measured costs): beside the forward
pass of layers that run as one with their pools, and beside that of layers apart, which is what a record of all maps
takes. Fails if it is more than `LIMIT` above the latter at `MANY` images.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from functools import partial

import torch
from conftest import cases

from zfcuda import ops
from zfcuda.bench.mining import TOP, Miner
from zfcuda.deconv.node import laid_out

BATCH = 32
#: Maps with an empty list, into which the nine strongest of a batch enter; the lists of the others are closed.
OPEN = (0, 64, 256)
LIMIT, MANY = 0.03, 10_000


@cases("mining")
def bench_mining(contest, setting, case) -> None:
    contest(setting, case)


class Clock:
    """Seconds spent in a function."""

    def __init__(self, function):
        self.function, self.seconds = function, 0.0

    def __call__(self, *args, **kwargs):
        start = time.perf_counter()
        try:
            return self.function(*args, **kwargs)
        finally:
            self.seconds += time.perf_counter() - start


def mining_batch(miner: Miner, open_maps: int) -> tuple[float, float, int]:
    """Seconds of a batch of mining, those of the forward pass within it, and the entries that entered."""
    collector = miner.collector
    graph, images = collector.net.graph, collector.ranking.images
    chosen = miner.close(open_maps)
    maxima = Clock(type(collector)._maxima.__get__(collector))
    collector._maxima = maxima
    forward = Clock(graph.run)
    object.__setattr__(graph, "run", forward)
    start = time.perf_counter()
    collector.absorb(miner.batch)
    total = time.perf_counter() - start
    object.__delattr__(graph, "run")
    del collector._maxima
    return total, forward.seconds - maxima.seconds, int((images[chosen] >= 0).sum())


def inputs_of_layers(miner: Miner) -> dict[int, torch.Tensor]:
    """Of those that run as one with their pools."""
    graph = miner.collector.net.graph
    maps = {-1: laid_out(miner.images)}
    graph.run(miner.images, lambda i, output, _: maps.update({i: output}))
    return {i: maps[graph.nodes[i].inputs[0]] for i in graph.pooled}


def maxima_alone(miner: Miner, inputs: dict[int, torch.Tensor]) -> float:
    """Seconds that the layers with a pool take for their maxima."""
    seconds, graph = 0.0, miner.collector.net.graph
    for i, x in inputs.items():
        node, pool = graph.nodes[i], graph.nodes[graph.pooled[i]].window
        slide = node.window.stride, node.window.padding, node.window.dilation, node.groups
        names = "kernel_size", "stride", "padding", "dilation", "ceil_mode"
        window = dict(zip(names, (pool.kernel, pool.stride, pool.padding, pool.dilation, pool.ceil), strict=True))
        without = partial(ops.conv2d_relu_max_pool2d, **{f"pool_{name}": value for name, value in window.items()})
        both = Clock(node.forward_pooled), Clock(without)
        with torch.no_grad():
            both[0](x, graph.nodes[graph.pooled[i]])
            both[1](x, *node.parameters(), *slide)
        seconds += both[0].seconds - both[1].seconds
    return seconds


def rival(miner: Miner, lists: dict[int, torch.Tensor]) -> None:
    """The forward pass by our executor, a maximum and a top-9 by torch."""
    nodes = {target.node for target in miner.collector.targets}

    def visit(i, output, _):
        if i in nodes:
            values, _ = output.flatten(2).max(2)
            old = lists.get(i, torch.zeros(values.shape[1], TOP))
            lists[i] = torch.cat([old, values.T], 1).topk(TOP).values

    miner.collector.net.graph.run(miner.batch.images, visit, max(nodes))


def mining_time(count: int, maps: int, forward: float, fixed: float, each: float) -> float:
    """Seconds a batch, on average over ``count`` images, from those of a batch and of an entry."""
    entered = maps * TOP * (1 + math.log(count / TOP))
    return forward + fixed + each * entered * BATCH / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    miner = Miner.of(torch.randn(BATCH, 3, 224, 224))
    lists: dict[int, torch.Tensor] = {}
    maps = len(miner.collector.ranking.values)
    print(miner.collector.describe_memory())
    mining_batch(miner, maps)  # touches all of the memory
    inputs = inputs_of_layers(miner)
    graph, last = miner.collector.net.graph, max(target.last for target in miner.collector.targets)
    forward, apart, maxima, rivals, whole = [], [], [], [], []
    own: dict[int, list[float]] = {n: [] for n in OPEN}
    entries: dict[int, int] = {}
    for round_ in range(options.rounds + 1):
        bare, looked_at, other = Clock(miner.forward), Clock(graph.run), Clock(rival)
        bare()
        looked_at(miner.images, None, last)
        other(miner, lists)
        more = maxima_alone(miner, inputs)
        for n in OPEN:
            total, inside, entries[n] = mining_batch(miner, n)
            if round_:
                own[n].append(total - inside)
                whole += [total] * (n == 0)
        if round_:
            forward.append(bare.seconds)
            apart.append(looked_at.seconds)
            maxima.append(more)
            rivals.append(other.seconds)
    strongest = statistics.median(maxima)
    seconds = statistics.median(forward) - strongest
    batches = {entries[n]: statistics.median(own[n]) + strongest for n in OPEN}
    fixed = batches[0]
    each = statistics.median((cost - fixed) / count for count, cost in batches.items() if count)
    rate = f"{BATCH / seconds:.1f} images/s on {options.threads} thread(s)"
    print(f"forward pass of {BATCH} images: {seconds * 1e3:.0f} ms, {rate}")
    whole_maps = statistics.median(apart)
    print(f"with layers and pools apart: {whole_maps * 1e3:.0f} ms")
    print(f"the same batch mined, all lists closed: {statistics.median(whole) * 1e3:.0f} ms")
    print(f"maxima of the layers with a pool: {strongest * 1e3:.2f} ms of what follows")
    print(f"mining a batch: {fixed * 1e3:.2f} ms and {each * 1e6:.0f} us an entry")
    slower = 100 * (statistics.median(rivals) / seconds - 1)
    print(f"rival, max and top-{TOP} by torch: {slower:.1f} % of the forward pass")
    costs = maps, seconds, fixed, each
    for count in (100, 1_000, MANY, 50_000, 100_000, 1_000_000):
        over = [100 * (mining_time(count, *costs) / pass_ - 1) for pass_ in (seconds, whole_maps)]
        print(f"{count:>9,} images: {over[0]:+6.2f} % beside that pass, {over[1]:+6.2f} % beside layers apart")
    if mining_time(MANY, *costs) > (1 + LIMIT) * whole_maps:
        raise SystemExit(f"more than {100 * LIMIT:g} % at {MANY:,} images")


if __name__ == "__main__":
    main()
