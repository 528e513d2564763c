"""What mining costs beside the forward passes that it needs, as a function of the number of images.

``python benchmarks/bench_mining.py [--rounds 12] [--threads 1]``: two to three minutes on one core. ZFNet's five
convolutions, batches of 32, as in the case of ``zfcuda bench``. Each round times, in turn:

* the forward pass alone, by the same executor, on the same batch;
* a batch of mining in which no entry, or so many entries, enter the lists, their windows of patches and switches
  included; its own time is what is left without the forward pass within it;
* the rival: the forward pass, ``max`` over every map by torch, ``topk`` of every list joined with the batch's maxima
  (which keeps neither switches nor patches).

The time of a batch of mining is ``fixed + entry * entries``. Over a data set of N images in random order a map's list
has ``top * (1 + ln(N / top))`` entries, so the overhead of N images follows (model, from measured costs).
Fails if it is more than `LIMIT` at `MANY` images.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time

import torch
from conftest import cases

from zfcuda.bench.mining import TOP, Miner

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


def rival(miner: Miner, lists: dict[int, torch.Tensor]) -> None:
    """The forward pass by our executor, a maximum and a top-9 by torch."""
    nodes = {target.node for target in miner.collector.targets}

    def visit(i, output, _):
        if i in nodes:
            values, _ = output.flatten(2).max(2)
            old = lists.get(i, torch.zeros(values.shape[1], TOP))
            lists[i] = torch.cat([old, values.T], 1).topk(TOP).values

    miner.collector.net.graph.run(miner.batch.images, visit, max(nodes))


def overhead(count: int, maps: int, forward: float, fixed: float, each: float) -> float:
    """What mining adds to the forward passes of ``count`` images: seconds of a batch of either, and of an entry."""
    entered = maps * TOP * (1 + math.log(count / TOP))
    return (fixed * count / BATCH + each * entered) / (forward * count / BATCH)


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
    forward, rivals = [], []
    own: dict[int, list[float]] = {n: [] for n in OPEN}
    entries: dict[int, int] = {}
    for round_ in range(options.rounds + 1):
        bare, other = Clock(miner.forward), Clock(rival)
        bare()
        other(miner, lists)
        for n in OPEN:
            total, inside, entries[n] = mining_batch(miner, n)
            if round_:
                own[n].append(total - inside)
        if round_:
            forward.append(bare.seconds)
            rivals.append(other.seconds)
    seconds = statistics.median(forward)
    batches = {entries[n]: statistics.median(own[n]) for n in OPEN}
    fixed = batches[0]
    each = statistics.median((cost - fixed) / count for count, cost in batches.items() if count)
    rate = f"{BATCH / seconds:.1f} images/s on {options.threads} thread(s)"
    print(f"forward pass of {BATCH} images: {seconds * 1e3:.0f} ms, {rate}")
    print(f"mining a batch: {fixed * 1e3:.2f} ms and {each * 1e6:.0f} us an entry")
    slower = 100 * (statistics.median(rivals) / seconds - 1)
    print(f"rival, max and top-{TOP} by torch: {slower:.1f} % of the forward pass")
    costs = maps, seconds, fixed, each
    for count in (100, 1_000, MANY, 50_000, 100_000, 1_000_000):
        print(f"{count:>9,} images: {100 * overhead(count, *costs):5.2f} % over the forward pass")
    if overhead(MANY, *costs) > LIMIT:
        raise SystemExit(f"more than {100 * LIMIT:g} % at {MANY:,} images")


if __name__ == "__main__":
    main()
