"""`zfcuda demo`: trains a narrow ZFNet on photographs and shows what every map of it responds to.

The stages, each of which a second run takes over from the first: the colour baseline, training, held-out accuracy,
mining of the strongest activations, their pictures. Then the page, which is always written anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import zfcuda
from zfcuda.demo import baseline, data, figures, page, strongest
from zfcuda.demo.console import Bars, Step
from zfcuda.demo.folder import Stages
from zfcuda.demo.training import Recipe, Training, accuracy, train
from zfcuda.models import ZFNet

__all__ = ["Recipe", "Sizes", "run"]

FILTERS = "layer1-filters.png"


@dataclass(frozen=True)
class Sizes:
    """How many windows of the photographs each stage works on."""

    train: int = 8000
    held_out: int = 800
    baseline: int = 3200  # of the training windows
    mined: tuple[int, ...] = (96, 128)  # sides of the grids of windows that are mined


def run(output: Path, recipe: Recipe | None = None, sizes: Sizes | None = None) -> Path:
    """Do all stages that are not done yet, in the folder `output`; returns the path of the page."""
    return Demo(Path(output), recipe or Recipe(), sizes or Sizes()).run()


class Demo:
    """One run of the demo."""

    def __init__(self, output: Path, recipe: Recipe, sizes: Sizes) -> None:
        self.output, self.recipe, self.sizes = output, recipe, sizes
        self.stages = Stages(output / "state")
        self.settings = {"recipe": asdict(recipe), "sizes": asdict(sizes), "version": zfcuda.__version__}
        self.bars = Bars()

    def run(self) -> Path:
        self.output.mkdir(parents=True, exist_ok=True)
        with self.bars:
            content = self._all()
        path = page.write_page(self.output, content)
        self._report(path, content)
        return path

    def _all(self) -> dict[str, Any]:
        """All stages; returns what the page shows."""
        recipe, sizes = self.recipe, self.sizes
        self.photographs = data.load_photographs()
        self.classes = len(self.photographs) * data.TURNS
        with self.bars.bar("Cutting windows", 3) as step:
            draw = np.random.default_rng(recipe.seed)
            self.train = self._cut(data.sample_windows(self.photographs, sizes.train, draw, held_out=False), step)
            self.held_out = self._cut(data.sample_windows(self.photographs, sizes.held_out, draw, held_out=True), step)
            grids = [data.grid_windows(self.photographs, side) for side in sizes.mined]
            self.windows = [window for grid in grids for window in grid]
            self.mined = self._cut(self.windows, step)[0]
        colours = self._stage("baseline", "Colour baseline", self._baseline)
        net = self._train()
        scores = self._stage("accuracy", "Held-out accuracy", lambda step: accuracy(net, *self.held_out))
        layers = self._layers(net)
        figures.save_filters(self.output / FILTERS, net.get_parameter("conv1.weight").detach())
        return {
            "photographs": [photograph.name for photograph in self.photographs],
            "classes": self.classes,
            "held_out": sizes.held_out,
            "steps": recipe.steps,
            "batch": recipe.crops * data.TURNS,
            "accuracy": scores,
            "baseline": colours["accuracy"],
            "filters": FILTERS,
            "kernel": net.get_parameter("conv1.weight").shape[-1],
            "size": recipe.size,
            "layers": layers,
            "overlap": strongest.OVERLAP,
            "percent": lambda part: f"{100 * part:.1f} %",
            "version": zfcuda.__version__,
            "seed": recipe.seed,
        }

    def _stage(
        self, name: str, title: str, work: Callable[[Step], dict[str, Any]], total: int | None = None
    ) -> dict[str, Any]:
        """The result of a stage: that of an earlier run, if its files are there, or of doing the work now."""
        result = self.stages.load(name, self.settings)
        if result is not None and all((self.output / file).exists() for file in result.get("files", ())):
            self.bars.say(f"{title}: taken from the earlier run")
            return result
        with self.bars.bar(title, total or 1) as step:
            result = work(step)
            if total is None:
                step(1)
        self.stages.save(name, self.settings, result)
        return result

    def _cut(self, windows: list[data.Window], step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """The windows as crops, and the photograph of each."""
        pixels = data.cut(self.photographs, windows, self.recipe.size)
        step(1)
        return pixels, torch.tensor([window.photo for window in windows])

    def _baseline(self, step: Step) -> dict[str, Any]:
        pixels, photos = self.train
        count = self.sizes.baseline
        return {"accuracy": baseline.colour_baseline(pixels[:count], photos[:count], *self.held_out)}

    def _train(self) -> ZFNet:
        steps = self.recipe.steps
        with self.bars.training("Training", steps) as show:

            def report(training: Training) -> None:
                show(training.step, training.loss)

            def resumed(step: int) -> None:
                where = "taken from the earlier run" if step == steps else f"goes on from step {step} of {steps}"
                self.bars.say(f"Training: {where}")

            return train(self.recipe, self.classes, *self.train, self.stages, report, resumed).net

    def _layers(self, net: ZFNet) -> list[dict[str, Any]]:
        """Mining and pictures; returns what the page shows of each layer."""
        deconvnet = zfcuda.DeconvNet(net.eval())
        found = self._stage(
            "strongest",
            "Strongest activations",
            lambda step: strongest.strongest_everywhere(deconvnet, self.mined, step),
            len(self.mined),
        )
        return [self._layer(deconvnet, layer, found[layer]) for layer in strongest.LAYERS]

    def _layer(self, deconvnet: zfcuda.DeconvNet, layer: str, found: dict[str, torch.Tensor]) -> dict[str, Any]:
        nines = strongest.strongest_nine(deconvnet, layer, found, self.windows, self.recipe.size)
        alive = [index for index, spots in enumerate(nines) if spots]
        sources = {index: f"maps/{layer}/{index:03d}.jpg" for index in alive}
        figure = f"{layer}.png"

        def draw(step: Step) -> dict[str, Any]:
            maps = figures.layer_pictures(deconvnet, layer, nines, self.mined, step)
            for index, source in sources.items():
                figures.save_map(self.output / source, layer, maps[index])
            figures.save_figure(self.output / figure, layer, maps)
            return {"files": [*sources.values(), figure]}

        self._stage(f"pictures-{layer}", f"Pictures of layer {layer[-1]}", draw, sum(map(len, nines)))
        width, height = figures.map_size(layer)
        info = next(info for info in deconvnet.layers if info.name == layer)
        return {
            "name": layer,
            "number": layer[-1],
            "count": len(nines),
            "field": info.receptive_field[0] if info.receptive_field else None,
            "dead": [index for index, spots in enumerate(nines) if not spots],
            "few": sum(0 < len(spots) < strongest.NINE for spots in nines),
            "figure": figure,
            "on_figure": min(figures.ON_FIGURE, len(alive)),
            "maps": [
                {
                    "index": index,
                    "src": sources[index],
                    "width": width,
                    "height": height,
                    "activations": [spot.value for spot in nines[index]],
                    "photos": figures.names(nines[index], self.windows, self.photographs),
                }
                for index in alive
            ],
        }

    def _report(self, path: Path, content: dict[str, Any]) -> None:
        """Says what came out and where everything is."""
        percent, scores = content["percent"], content["accuracy"]
        dead = sum(len(layer["dead"]) for layer in content["layers"])
        self.bars.say(
            f"\nWhich photograph and which way up, on held-out windows: [bold]{percent(scores['both'])}[/] right; "
            f"colour statistics {percent(content['baseline'])}, chance {percent(1 / self.classes)}. "
            f"Dead maps: {dead} of {sum(layer['count'] for layer in content['layers'])}."
        )
        for what, where in (
            ("Page", path),
            ("Figures", f"{self.output / 'conv1.png'} … conv5.png, {FILTERS}"),
            ("A picture of every map", self.output / "maps"),
            ("Checkpoint and results", self.stages.folder),
        ):
            self.bars.say(f"  {what:<24} {where}")
