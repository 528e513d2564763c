"""Full-width ZFNet with trained convolutions, for benchmarks whose time depends on how sparse the signals are.

No trained ZFNet ships in a package, so this trains one with the demo's recipe at the paper's widths: about six minutes
on one core, once, kept in the folder of the results. The convolutions do not depend on the image's size, so they serve
224 x 224.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from zfcuda.demo import Recipe, data
from zfcuda.demo.folder import Stages
from zfcuda.demo.training import train
from zfcuda.models import ZFNet, zfnet

WIDTHS = (96, 256, 384, 384, 256)
RECIPE = Recipe(widths=WIDTHS, steps=600)


def trained_zfnet(state: Path, fc_width: int = 8) -> ZFNet:
    """ZFNet for 224 x 224, convolutions trained on photographs; the fully connected layers are narrow and random.

    ``state`` is the folder where training is kept, and goes on from.
    """
    photographs = data.load_photographs()
    windows = data.sample_windows(photographs, 4000, np.random.default_rng(RECIPE.seed), held_out=False)
    pixels, photos = data.cut(photographs, windows, RECIPE.size), torch.tensor([w.photo for w in windows])
    training = train(RECIPE, len(photographs) * data.TURNS, pixels, photos, Stages(state), _report)
    net = zfnet(10, fc_width=fc_width)
    net.load_state_dict({k: v for k, v in training.net.state_dict().items() if k.startswith("conv")}, strict=False)
    return net.eval()


def photographs_224(count: int) -> torch.Tensor:
    """Windows of the demo's photographs as input for the net: float32 (count, 3, 224, 224)."""
    photographs = data.load_photographs()
    windows = data.grid_windows(photographs, 112)
    chosen = [windows[i * len(windows) // count] for i in range(min(count, len(windows)))]
    return data.normalise(data.cut(photographs, chosen, 224))


def _report(training: object) -> None:
    step = getattr(training, "step", 0)
    if step % 50 == 0:
        print(f"training full-width ZFNet: step {step} of {RECIPE.steps}", flush=True)
