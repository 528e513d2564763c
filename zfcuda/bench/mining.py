"""Mining beside the forward pass that it needs, and beside a maximum and a top-9 in plain torch."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import zfcuda
from zfcuda.bench.case import MODES, Built, Call, Case, Contender, Mode, Outputs, Setting
from zfcuda.bench.nets import counted, torch_twin, zfnet
from zfcuda.deconv.batches import Batch
from zfcuda.deconv.collector import Collector, Settings

TOP = 9
LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5")


def cases(setting: Setting, modes: list[Mode]) -> Iterator[Case]:
    batch = 2 if setting.quick else 32
    flops, _ = counted("zfnet")
    full = 2 * (256 * 36 * 4096 + 4096 * 4096 + 4096 * 1000)  # the fully connected layers, which mining leaves out
    yield Case(
        "mining",
        f"zfnet batch {batch}",
        MODES["ieee"],
        partial(mine, batch),
        flops=flops - full,
        bytes=4 * 3 * 224**2,
        unit="image",
        notes=["the nine strongest of each of 1376 maps, in lists that the batch enters or that are closed to it"],
    )


@dataclass
class Miner:
    """A collector for ZFNet's five convolutions, and a batch of images."""

    collector: Collector
    images: Tensor
    batch: Batch

    @staticmethod
    def of(images: Tensor) -> Miner:
        net = zfnet().to(images.device)
        collector = Collector(zfcuda.DeconvNet(net), Settings(LAYERS, TOP, 1, ("deconvnet",), 2**31), (3, 224, 224))
        return Miner(
            collector, images, Batch(0, images, torch.ones(len(images), dtype=torch.bool), [None] * len(images))
        )

    def close(self, open_maps: int) -> Any:
        """Empty the lists of so many maps, and close those of the others; returns which are open."""
        ranking = self.collector.ranking
        ranking.values[:], ranking.images[:] = torch.inf, 0
        chosen = torch.randperm(len(ranking.values))[:open_maps].numpy()
        ranking.values[chosen], ranking.images[chosen] = 0, -1
        return chosen

    def forward(self) -> None:
        """The forward pass alone, by the same executor: layers with a pool run as one, as in mining."""
        graph, last = self.collector.net.graph, max(target.last for target in self.collector.targets)
        graph.run(self.images, None, last, dict.fromkeys(graph.pooled, lambda values, positions: None))

    def mine(self, open_maps: int) -> Any:
        """A batch of mining; the lists' values."""
        self.close(open_maps)
        self.collector.absorb(self.batch)
        return self.collector.ranking.values


class Rival:
    """The forward pass by ``net`` of torch's modules, a maximum of every map, a top-9 of every list by torch.

    It keeps neither switches nor patches.
    """

    def __init__(self, net: nn.Sequential) -> None:
        self.net = nn.Sequential(*list(net.children())[: [n for n, _ in net.named_children()].index("relu5") + 1])

    @torch.no_grad()
    def __call__(self, images: Tensor) -> list[Tensor]:
        lists, signal = [], images
        for module in self.net:
            signal = module(signal)
            if isinstance(module, nn.ReLU):
                values = signal.flatten(2).amax(2).T
                old = torch.zeros(len(values), TOP, dtype=values.dtype, device=values.device)
                lists.append(torch.cat([old, values], 1).topk(TOP).values)
        return lists


def mine(batch: int, setting: Setting, mode: Mode) -> Built:
    images = setting.normal(batch, 3, 224, 224)
    miner, plain = Miner.of(images), torch_twin(zfnet()).to(setting.device)
    maps = len(miner.collector.ranking.values)
    each = partial(Contender, ours=True, family="zfcuda", pieces=batch, graph=False)

    def rival(layout: torch.memory_format) -> Call:
        net = copy.deepcopy(plain).to(memory_format=layout)  # type: ignore[call-overload]
        return partial(Rival(net), images.contiguous(memory_format=layout))

    def read(values: Any) -> Outputs:
        return Outputs([torch.from_numpy(values)])

    def joined(lists: list[Tensor]) -> Outputs:
        return Outputs([torch.cat(lists)])

    return Built(
        [
            each("zfcuda, all lists open", lambda: partial(miner.mine, maps), read=read),
            each("zfcuda, lists closed", lambda: partial(miner.mine, 0), read=None),
            each("forward pass alone", lambda: miner.forward, ours=False, read=None, lacks="mines nothing"),
            *(
                Contender(
                    f"torch eager {name}, max and topk",
                    partial(rival, layout),
                    read=joined,
                    family="torch eager",
                    pieces=batch,
                    graph=False,
                    lacks="keeps neither switches nor patches",
                )
                for name, layout in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last))
            ),
        ],
        lambda: joined(Rival(torch_twin(zfnet()).to(setting.device).double())(images.double())),
    )
