"""What the gallery's tests show: a small network, pictures with awkward names, and what mining would have found."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage import data
from torch import nn

from zfcuda.deconv import DeconvNet
from zfcuda.deconv.mined import Mined, MinedLayer, Preprocessing, Source
from zfcuda.report.tiles import windows

LAYERS = ("conv1", "b/<i>2</i> ?#", "conv3")
AWKWARD = LAYERS[1]
FC = "fc4"
DEAD, FEW, FEW_COUNT = 3, 5, 4  # maps of the second layer
CLASSES = ["cat", "<b>dog</b> & co", 'a "quoted" class']
NAMES = ("<img src=x onerror=alert(1)>.png", 'it\'s "odd" & %20 #1?.png', "ünïcode-猫.png", "</script><script>.png")
SIZE = 48
MEAN, STD = (120.0, 110.0, 100.0), (60.0, 62.0, 64.0)


def network() -> nn.Sequential:
    """Three convolutions and a linear layer, with names that a page must not take for markup or addresses."""
    torch.manual_seed(0)
    net = nn.Sequential(
        OrderedDict(
            [
                ("conv1", nn.Conv2d(3, 7, 7, 2, 1)),
                ("relu1", nn.ReLU()),
                ("pool1", nn.MaxPool2d(3, 2, ceil_mode=True)),
                (AWKWARD, nn.Conv2d(7, 12, 3, padding=1)),
                ("relu2", nn.ReLU()),
                ("conv3", nn.Conv2d(12, 5, 3, padding=1)),
                ("relu3", nn.ReLU()),
                ("flat", nn.Flatten()),
                (FC, nn.Linear(5 * 11 * 11, 6)),
            ]
        )
    )
    return net.eval()


def pictures(folder: Path, count: int = 24) -> tuple[torch.Tensor, list[Source]]:
    """Photographs' windows as files, and what the network sees of them: the middle, scaled."""
    photographs = [data.astronaut(), data.chelsea(), data.coffee()]
    draw = np.random.default_rng(0)
    inputs, sources = [], []
    for i in range(count):
        whole = Image.fromarray(photographs[i % 3])
        height, width = 96 + 8 * (i % 3), 120
        left, top = int(draw.integers(whole.width - width)), int(draw.integers(whole.height - height))
        picture = whole.crop((left, top, left + width, top + height))
        name = NAMES[i] if i < len(NAMES) else f"{i:02d}.png"
        path = folder / f"{i:02d}.png"
        picture.save(path)
        box = (4, 12, 4 + 90, 12 + 90)
        seen = picture.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=(box[1], box[0], box[3], box[2]))
        pixels = (np.asarray(seen, np.float32) - MEAN) / STD
        inputs.append(torch.from_numpy(pixels).permute(2, 0, 1).float())
        sources.append(Source(name, i % 3, str(path), (height, width), box))
    return torch.stack(inputs), sources


def brute_force(model: nn.Module, images: torch.Tensor, sources: list[Source], layers: tuple[str, ...]) -> Mined:
    """Top nine, one an image, from the maps of all images."""
    net = DeconvNet(model, (SIZE, SIZE))
    record = net(images)
    maps = record.maps
    lines = {line.name: line for line in net.layers}
    found = {}
    for name in layers:
        flat = maps[name].reshape(*maps[name].shape[:2], -1).transpose(0, 1)  # maps, images, positions
        strongest, at = flat.max(2)
        values, which = strongest.clamp(min=0).sort(dim=1, descending=True, stable=True)
        values, which = values[:, :9].clone(), which[:, :9].clone()
        missing = values <= 0
        positions = patches = None
        switches = {}
        if maps[name].dim() == 4:
            at = at.gather(1, which)
            positions = torch.stack((at // maps[name].shape[3], at % maps[name].shape[3]), -1)
            boxes = [net.box(name, position) for position in positions.flatten(0, 1).tolist()]
            cut = windows(list(images[which.flatten()].numpy()), np.array(boxes))
            patches = torch.from_numpy(cut).unflatten(0, which.shape).half()
            kept = net.path(name, (SIZE, SIZE)).cut(record.switches, which.flatten(), positions.flatten(0, 1))
            switches = {pool: window.unflatten(0, which.shape) for pool, window in kept.switches.items()}
            positions[missing] = -1
            patches[missing] = 0
        which[missing] = -1
        sparsity = (strongest <= 0).float().mean(1)
        mean = strongest.clamp(min=0).mean(1)
        found[name] = MinedLayer(lines[name], values, which, positions, patches, mean, sparsity, switches)
    used = {i for layer in found.values() for i in layer.images.flatten().tolist() if i >= 0}
    known = {i: sources[i] for i in sorted(used)}
    return Mined(found, len(images), 9, 1, 8, (SIZE, SIZE), ("deconvnet",), sources=known,
                 preprocessing=Preprocessing(MEAN, STD), classes=CLASSES)  # fmt: skip


def small(folder: Path, layers: tuple[str, ...] = LAYERS) -> tuple[nn.Module, torch.Tensor, Mined]:
    """The network, with a dead map and one that few images move; the images; what is mined of them."""
    model = network()
    images, sources = pictures(folder)
    layer = model.get_submodule(AWKWARD)
    strongest = DeconvNet(model, (SIZE, SIZE))
    with torch.no_grad():
        before = nn.functional.conv2d(strongest(images).maps["pool1"], layer.weight, layer.bias, padding=1).amax((2, 3))
        ordered = before[:, FEW].sort(descending=True).values
        layer.bias[FEW] -= (ordered[FEW_COUNT - 1] + ordered[FEW_COUNT]) / 2
        layer.bias[DEAD] -= before[:, DEAD].max() + 1
    return model, images, brute_force(model, images, sources, layers)
