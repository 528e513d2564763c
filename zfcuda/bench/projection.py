"""The main job: the nine strongest activations of every map of ZFNet's five layers, projected to pixels.

Ours projects a whole layer a call; the rivals, of a few activations each, are compared by the time of one. With random
weights (`--quick`) half of the values of a map are positive, which is less sparse than trained ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zfcuda.bench import projection_rivals as rivals
from zfcuda.bench.case import MODES, Built, Call, Case, Contender, Mode, Outputs, Setting
from zfcuda.bench.nets import zfnet
from zfcuda.bench.trained import photographs_224, trained_zfnet
from zfcuda.deconv import DeconvNet, Mined, mine

LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5")
IMAGES = 400
QUICK_LAYER, QUICK_IMAGES = "conv3", 4
COMPARED = 8  # activations whose results are checked
#: Batches that the rivals are tried with; the best one counts.
BATCHES = {"dense torch": (1, 8), "crops in torch": (8, 32), "captum": (1, 8)}
LACKS = {
    "captum": "sends the signal through the normalisation too, as the paper does not",
    "crops in torch": "does not drop what lies beyond the maps, so its results are wrong at the image's border",
}


def cases(setting: Setting, modes: list[Mode]) -> Iterator[Case]:
    """Quick: layer 3 with random weights; else all layers with trained ones."""
    weights = "random" if setting.quick else "trained"
    for layer in LAYERS:
        yield Case(
            "projection",
            f"{layer} {weights} weights",
            MODES["ieee"],
            partial(project, layer),
            unit="projection",
            quick=layer == QUICK_LAYER,
            notes=["how much work it is depends on the sparsity of the signals, so no share of a ceiling is given"],
        )


@dataclass
class Job:
    """A network, images, and the strongest activations that were found in them."""

    net: DeconvNet
    images: Tensor
    mined: Mined

    def count(self, layer: str) -> int:
        return int(self.mined[layer].count.sum())

    def strongest(self, layer: str, count: int) -> tuple[Tensor, ...]:
        """Some of the layer's maps, the first ones the same for any count; where and how strong each is at most."""
        found = self.mined[layer]
        assert found.positions is not None
        alive = (found.images[:, 0] >= 0).nonzero()[:, 0]
        units = alive[torch.randperm(len(alive), generator=torch.Generator().manual_seed(0))[:count]]
        return units, found.images[units, 0], found.positions[units, 0], found.values[units, 0]

    def sample(self, layer: str, batch: int) -> rivals.Activations:
        device = next(self.net.model.parameters()).device
        units, images, positions, values = self.strongest(layer, batch)
        chosen = self.images[images].to(device)
        windows = {name: kept[units, 0].to(device) for name, kept in self.mined[layer].switches.items()}
        net: Any = self.net.model
        where = units.to(device), positions.to(device), values.to(device)
        return rivals.Activations(net, int(layer[-1]), chosen, self.net(chosen), *where, windows)

    def zero_beyond(self, layer: str, windows: Tensor) -> Tensor:
        """Receptive fields of the first activations, zero where they lie beyond the image."""
        out = torch.zeros_like(windows)
        for i, (top, left, bottom, right) in enumerate(self.boxes(layer, len(windows))):
            rows = slice(max(-top, 0), out.shape[2] - max(bottom - self.images.shape[2], 0))
            columns = slice(max(-left, 0), out.shape[3] - max(right - self.images.shape[3], 0))
            out[i, :, rows, columns] = windows[i, :, rows, columns]
        return out

    def cut(self, layer: str, whole: Tensor) -> Tensor:
        """The same out of whole images."""
        boxes = self.boxes(layer, len(whole))
        size = boxes[0][2] - boxes[0][0]  # so far beyond the image does none of them reach
        padded = F.pad(whole, (size,) * 4)
        return torch.stack(
            [
                image[:, top + size : bottom + size, left + size : right + size]
                for image, (top, left, bottom, right) in zip(padded, boxes, strict=True)
            ]
        )

    def boxes(self, layer: str, count: int) -> list[tuple[int, ...]]:
        return [tuple(self.net.box(layer, place)) for place in self.strongest(layer, count)[2].tolist()]


@cache
def job(state: Path, quick: bool, device: torch.device) -> Job:
    """Found once a process; the trained network is kept in ``state``."""
    if quick:
        net, images = zfnet(), torch.randn(QUICK_IMAGES, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        layers: tuple[str, ...] = (QUICK_LAYER,)
    else:
        net, images, layers = trained_zfnet(state / "trained"), photographs_224(IMAGES), LAYERS
    net = net.to(device)
    return Job(DeconvNet(net), images, mine(net, torch.utils.data.TensorDataset(images), layers, progress=False))


def project(layer: str, setting: Setting, mode: Mode) -> Built:
    todo = job(setting.state, setting.quick, setting.device)

    def whole_layer() -> Call:
        def call() -> None:
            for _ in todo.net.iterate_mined(todo.mined, layer):
                pass

        return call

    def ours(_: None) -> Outputs:
        found = todo.net.project_mined(todo.mined, layer, todo.strongest(layer, COMPARED)[0])
        return Outputs([found.pixels[found.ranks == 0]])

    def exact() -> Outputs:
        sample = rivals.in_float64(todo.sample(layer, COMPARED))
        return Outputs([todo.cut(layer, rivals.dense(sample, False)())])

    def dense(whole: Tensor) -> Outputs:
        return Outputs([todo.cut(layer, whole)])

    def crops(windows: Tensor) -> Outputs:
        return Outputs([todo.zero_beyond(layer, windows)])

    def rival(family: str, batch: int, channels_last: bool) -> Call:
        sample = todo.sample(layer, batch)
        if family == "captum":
            return rivals.captum(sample)
        return torch.no_grad()((rivals.dense if family == "dense torch" else rivals.crops)(sample, channels_last))

    mine_ = Contender("zfcuda", whole_layer, True, None, ours, "zfcuda", todo.count(layer), graph=False)
    reads = {"dense torch": dense, "crops in torch": crops, "captum": None}
    theirs = [
        Contender(
            f"{family} batch {batch}" + (" channels_last" if last else ""),
            partial(rival, family, batch, last),
            read=reads[family],
            family=family,
            pieces=batch,
            graph=False,
            lacks=LACKS.get(family, ""),
        )
        for family, batches in BATCHES.items()
        for batch in (batches[:1] if setting.quick else batches)
        for last in ((False,) if family == "captum" else (False, True))
    ]
    return Built([mine_, *theirs], exact)
