"""Training: gradient descent with momentum that can stop after any step and go on as if it had not.

Every step draws its crops, mirror images, colours and dropout from a seed of its own, so the parameters, the momenta
and the number of the step are the whole state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F

from zfcuda.demo.data import TURNS, labels, normalise, turn
from zfcuda.demo.first_layer import typical_patches
from zfcuda.demo.folder import Stages
from zfcuda.models import ZFNet, zfnet
from zfcuda.ops import renormalize_filters_

CHECKPOINT_EVERY = 50  # steps


@dataclass(frozen=True)
class Recipe:
    """What the trained network depends on, besides the photographs."""

    seed: int = 0
    steps: int = 1700
    size: int = 96
    widths: tuple[int, ...] = (32, 64, 96, 96, 64)
    fc_width: int = 256
    dropout: float = 0.0
    crops: int = 8  # a step, each in its four turns
    first_rms: float = 0.05  # of each filter of layer 1 at the start
    gain: float = 1.7  # of layers 2 and 3 at the start: what the normalisation before them takes away
    rate: float = 0.02
    momentum: float = 0.9
    decay: float = 3e-3  # wears off the noise that layers 2 and up start with, which projections would show
    warm_up: int = 50  # steps
    norm: float = 5.0  # of the gradient, at most
    filter_rms: float = 0.1  # of each filter of layer 1, at most (section 3 of the paper)

    def rate_at(self, step: int) -> float:
        """A short rise, then half a cosine down to 0."""
        return self.rate * min(1.0, (step + 1) / self.warm_up) * 0.5 * (1 + math.cos(math.pi * step / self.steps))


class Training:
    """A network, its optimiser and the steps done."""

    def __init__(self, recipe: Recipe, classes: int) -> None:
        self.recipe = recipe
        self.step = 0
        self.loss = math.nan  # running mean
        self.net = narrow_zfnet(recipe, classes)
        weights = [p for name, p in self.net.named_parameters() if name.endswith("weight")]
        biases = [p for name, p in self.net.named_parameters() if name.endswith("bias")]
        self.optimizer = torch.optim.SGD(
            [
                {"params": weights, "weight_decay": recipe.decay},
                {"params": biases, "weight_decay": 0.0},
            ],
            lr=recipe.rate,
            momentum=recipe.momentum,
        )

    @torch.no_grad()
    def start_at(self, pixels: torch.Tensor) -> None:
        """Set layer 1 to typical patches of the crops `pixels` (uint8)."""
        filters = self.net.get_parameter("conv1.weight")
        filters.copy_(typical_patches(pixels, len(filters), filters.shape[-1], self.recipe.seed))
        filters.mul_(self.recipe.first_rms)

    def advance(self, pixels: torch.Tensor, photos: torch.Tensor) -> None:
        """One step on crops drawn from `pixels` (uint8)."""
        recipe = self.recipe
        draw = torch.Generator().manual_seed(recipe.seed * 1_000_003 + self.step)
        torch.manual_seed(recipe.seed * 1_000_003 + self.step)  # dropout
        chosen = torch.randint(len(pixels), (recipe.crops,), generator=draw)
        crops = augment(normalise(pixels[chosen]), draw)
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.rate_at(self.step)
        self.net.train()
        loss = F.cross_entropy(self.net(turn(crops)), labels(photos[chosen]))
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), recipe.norm)
        self.optimizer.step()
        renormalize_filters_(self.net.get_parameter("conv1.weight"), recipe.filter_rms)
        self.loss = loss.item() if self.step == 0 else 0.98 * self.loss + 0.02 * loss.item()
        self.step += 1

    def state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "loss": self.loss,
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.step, self.loss = state["step"], state["loss"]
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])


def narrow_zfnet(recipe: Recipe, classes: int) -> ZFNet:
    """ZFNet with fewer maps, for small crops, and with weights that start larger than the paper's N(0, 0.01²).

    The paper's start needs pixels of ±128 and days of training.
    """
    torch.manual_seed(recipe.seed)
    net = zfnet(
        classes,
        widths=recipe.widths,
        fc_width=recipe.fc_width,
        dropout=recipe.dropout,
        input_size=recipe.size,
    )
    weights = {name.removesuffix(".weight"): p for name, p in net.named_parameters() if name.endswith("weight")}
    with torch.no_grad():
        for layer in ("conv2", "conv3", "conv4", "conv5", "fc6", "fc7"):
            torch.nn.init.kaiming_normal_(weights[layer], nonlinearity="relu")
        for layer in ("conv2", "conv3"):
            weights[layer].mul_(recipe.gain)
    return net


def augment(crops: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Half of the crops mirrored; hue, saturation and contrast of each changed a little.

    Crops are N x 3 x H x W with mean colour 0, so colours turn about, and scale away from, the grey axis.
    """

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.rand(len(crops), 1, 1, generator=draw) * (high - low) + low

    mirrored = torch.where(uniform(-1, 1)[..., None] < 0, crops.flip(3), crops)
    angle, saturation, contrast = uniform(-0.35, 0.35), uniform(-0.5, 0.5).exp(), uniform(-0.25, 0.25).exp()
    grey = torch.full((3, 3), 1 / 3)
    across = torch.eye(3) - grey
    quarter = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)  # a turn about the grey axis
    colours = contrast * (grey + saturation * (angle.cos() * across + angle.sin() * quarter))
    return torch.einsum("nij,njhw->nihw", colours, mirrored)


def train(
    recipe: Recipe,
    classes: int,
    pixels: torch.Tensor,
    photos: torch.Tensor,
    stages: Stages,
    report: Callable[[Training], object] = lambda training: None,
    resumed: Callable[[int], object] = lambda step: None,
) -> Training:
    """Train to the last step, from the latest checkpoint if there is one.

    `resumed` hears of the step of that checkpoint, `report` of the start and of every step.
    """
    settings = {**asdict(recipe), "classes": classes, "pool": len(pixels)}
    training = Training(recipe, classes)
    if (state := stages.load("training", settings)) is not None:
        training.restore(state)
        resumed(training.step)
    else:
        training.start_at(pixels)
    report(training)
    while training.step < recipe.steps:
        training.advance(pixels, photos)
        report(training)
        if training.step % CHECKPOINT_EVERY == 0 or training.step == recipe.steps:
            stages.save("training", settings, training.state())
    return training


@torch.no_grad()
def accuracy(net: ZFNet, pixels: torch.Tensor, photos: torch.Tensor) -> dict[str, float]:
    """Fractions of right answers, over the four turns of every crop: both parts, the photograph, the turn."""
    net.eval()
    right = {"both": 0, "photo": 0, "turn": 0}
    for crops, photo in zip(pixels.split(64), photos.split(64), strict=True):
        answers = net(turn(normalise(crops))).argmax(1).view(TURNS, -1)
        photo_right = answers // TURNS == photo
        turn_right = answers % TURNS == torch.arange(TURNS)[:, None]
        right["photo"] += int(photo_right.sum())
        right["turn"] += int(turn_right.sum())
        right["both"] += int((photo_right & turn_right).sum())
    return {part: count / (TURNS * len(pixels)) for part, count in right.items()}
