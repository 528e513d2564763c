"""The demo's data: square windows of photographs that ship inside scikit-image and scikit-learn.

The task is *which photograph, and which way up?* Every window is shown in all four quarter turns and the label is
the pair (photograph, turn). A turn moves pixels and changes no colour, so a classifier that sees only the colours of a
window (means, covariances, histograms, any statistic that ignores positions) gives the four turns one and the same
answer and is right for at most one of them: 25 % is its ceiling, whatever it is, before any measurement.

Held-out windows lie in a vertical band of each photograph that no training window touches.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

# Photographs for which "which way up?" has an answer: gravity, writing, or light that falls from one side.
SOURCES = {
    "skimage": (
        "data",
        (
            *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "clock_motion.png", "coffee.png", "coins.png"),
            *("grass.png", "gravel.png", "moon.png", "motorcycle_left.png", "page.png", "rocket.jpg", "text.png"),
        ),
    ),
    "sklearn": ("datasets/images", ("china.jpg", "flower.jpg")),
}
TURNS = 4
SIDES = (80, 128)  # of a window, in pixels of the photograph
HELD_OUT = (0.5, 0.75)  # of the photograph's width
FLAT = 8.0  # grey levels of standard deviation under which a window (sky, paper, wall) has no way up and is not used


@dataclass(frozen=True)
class Photograph:
    name: str
    image: Image.Image

    def bands(self, held_out: bool) -> list[tuple[int, int]]:
        """The columns [left, right) from which windows are cut."""
        start, stop = (round(self.image.width * part) for part in HELD_OUT)
        return [(start, stop)] if held_out else [(0, start), (stop, self.image.width)]


@dataclass(frozen=True)
class Window:
    """A square of a photograph, in its pixels."""

    photo: int
    left: int
    top: int
    side: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        return self.left, self.top, self.left + self.side, self.top + self.side


def load_photographs() -> list[Photograph]:
    """The photographs, in a fixed order, as RGB images.

    Raises
    ------
    FileNotFoundError
        A package no longer ships one of them.
    """
    photographs = []
    for package, (folder, names) in SOURCES.items():
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise FileNotFoundError(
                f"the demo reads photographs from {package}, which is not installed: "
                "pip install scikit-image scikit-learn"
            )
        for name in names:
            path = Path(spec.origin).parent / folder / name
            if not path.exists():
                raise FileNotFoundError(
                    f"{package} does not ship the photograph {name} ({path}); the demo was written "
                    "for scikit-image 0.22-0.26 and scikit-learn 1.3-1.9"
                )
            photographs.append(Photograph(path.stem.split("_")[0], Image.open(path).convert("RGB")))
    return photographs


def is_flat(photograph: Photograph, window: Window) -> bool:
    grey = photograph.image.crop(window.box).convert("L")
    return float(np.asarray(grey, dtype=np.float32)[::2, ::2].std()) < FLAT


def sample_windows(photographs: list[Photograph], count: int, rng: np.random.Generator, held_out: bool) -> list[Window]:
    """`count` random windows, the photographs in turn, none of them flat."""
    windows: list[Window] = []
    while len(windows) < count:
        index = len(windows) % len(photographs)
        image = photographs[index].image
        bands = photographs[index].bands(held_out)
        widths = np.array([right - left for left, right in bands], dtype=np.float64)
        left, right = bands[rng.choice(len(bands), p=widths / widths.sum())]
        side = int(rng.integers(SIDES[0], min(SIDES[1], right - left, image.height) + 1))
        window = Window(
            index, int(rng.integers(left, right - side + 1)), int(rng.integers(0, image.height - side + 1)), side
        )
        if not is_flat(photographs[index], window):
            windows.append(window)
    return windows


def grid_windows(photographs: list[Photograph], side: int) -> list[Window]:
    """Windows of one size at half-overlapping positions that cover every photograph; flat ones are left out."""
    windows = []
    for index, photograph in enumerate(photographs):
        across, down = (
            np.linspace(0, size - side, 2 * (size // side) - 1).round().astype(int) for size in photograph.image.size
        )
        windows += [Window(index, int(left), int(top), side) for top in down for left in across]
    return [window for window in windows if not is_flat(photographs[window.photo], window)]


def cut(photographs: list[Photograph], windows: list[Window], size: int) -> torch.Tensor:
    """The windows, resized: uint8, N x 3 x size x size."""
    pixels = np.empty((len(windows), size, size, 3), dtype=np.uint8)
    for pixel, window in zip(pixels, windows, strict=True):
        image = photographs[window.photo].image
        pixel[:] = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=window.box))
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """Float crops with each crop's mean colour removed and its contrast set to 1."""
    crops = pixels.float()
    crops = crops - crops.mean((2, 3), keepdim=True)
    return crops / (crops.square().mean((1, 2, 3), keepdim=True).sqrt() + 1.0)


def turn(crops: torch.Tensor) -> torch.Tensor:
    """Every crop in its four quarter turns: 4N crops; turn t of crop n is at t * N + n."""
    return torch.cat([torch.rot90(crops, t, (2, 3)) for t in range(TURNS)])


def labels(photos: torch.Tensor) -> torch.Tensor:
    """The label, photograph * 4 + turn, of each crop that `turn` gives, from the photograph of each crop."""
    return torch.cat([photos * TURNS + t for t in range(TURNS)])
