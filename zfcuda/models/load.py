"""A model by its name: how the command line finds a network, its weights and its preprocessing."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import urllib.error
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zfcuda.models.weights import fill, load_weights
from zfcuda.models.zfnet import zfnet
from zfcuda.models.zfnet512 import zfnet512

__all__ = ["LoadedModel", "load_model"]

IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
DEMO = Path("zfcuda-demo/state/training.pt")  # where `zfcuda demo` leaves its network
DEMO_SPREAD = 60.0  # about the standard deviation of a photograph, to show the demo's inputs by
MODELS = "zfnet, zfnet512, demo, a network of torchvision (vgg16), a .onnx or .pt file, or package.module:name"


@dataclass(frozen=True)
class LoadedModel:
    """A network with what its images must go through.

    Attributes
    ----------
    model : torch.nn.Module
        In evaluation mode.
    name : str
        As asked for.
    weights : str
        Where they are from, in words.
    random : bool
        Whether they are random, so that pictures show an untrained network.
    input_size : (int, int)
        Height and width of its images.
    mean, std : tuple of float
        ``(pixels - mean) / std`` for each channel, with pixels in 0 … 255.
    normalise : function of a Tensor (N, C, H, W), optional
        What is done in the place of that, from pixels to inputs, where each image has a mean and a contrast of its
        own; ``mean`` and ``std`` then only serve to show inputs as pictures.
    """

    model: torch.nn.Module
    name: str
    weights: str
    random: bool
    input_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    normalise: Callable[[Tensor], Tensor] | None = None


def load_model(
    spec: str | os.PathLike[str],
    weights: str | os.PathLike[str] | None = None,
    *,
    num_classes: int | None = None,
    input_size: int | tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
) -> LoadedModel:
    """A network by name, with its weights and preprocessing.

    Parameters
    ----------
    spec : str or path
        - ``zfnet``, ``zfnet512``: `zfcuda.models.zfnet`, `zfcuda.models.zfnet512`;
        - ``path/to/zfnet512.onnx``: the same with the weights of the ONNX model zoo's file;
        - a classification network of torchvision by its name there, such as ``vgg16``;
        - ``demo``: what ``zfcuda demo`` trained, from ``zfcuda-demo/state/training.pt``; or the path of that file;
        - ``package.module:name``: a function that returns a module, or a module; also from the current folder. Its
          attributes ``input_size``, ``mean`` and ``std``, where it has them, are its preprocessing.
    weights : path or str, optional
        A file for `load_weights`; for torchvision also the name of published weights (``DEFAULT``), which are fetched.
        Default: random weights, or those that the file or the function brings.
    num_classes : int, optional
        Outputs of the last layer; default that of the network, mostly 1000.
    input_size : int or (int, int), optional
        Height and width of the images. Default: the network's own; 224 where it has none.
    mean, std : one number or one for each channel, optional
        In units of pixels in 0 … 255. Default: 128 and 1 for ``zfnet`` (the paper subtracts the mean image and does not
        scale); 128 and 128 for ``zfnet512`` (the zoo states none; these are the defaults of the framework that trained
        it); those of the weights for torchvision; each image's own for the demo; ImageNet's otherwise.
    seed : int
        Of random weights: the same seed, the same network.

    Returns
    -------
    LoadedModel

    Raises
    ------
    ValueError
        For an unknown name, or an option that this network does not take.
    FileNotFoundError, RuntimeError, ImportError
        For weights that do not fit or cannot be read, and packages that are missing; the message says what to do.
    """
    spec = os.fspath(spec)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        loaded = _find(spec, weights, num_classes, seed)
    loaded.model.eval()
    own = {field.name: getattr(loaded, field.name) for field in fields(loaded)}
    if input_size is not None:
        own["input_size"] = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
    if mean is not None or std is not None:
        own["normalise"] = None
    channels = _channels(loaded.model)
    own |= {
        name: _each_channel(name, value, channels)
        for name, value in (("mean", mean), ("std", std))
        if value is not None
    }
    return LoadedModel(**own)


def _channels(model: torch.nn.Module) -> int:
    """Channels of the images: those of the first convolution."""
    return next((m.in_channels for m in model.modules() if isinstance(m, torch.nn.Conv2d)), 3)


def _each_channel(name: str, value: float | Sequence[float], channels: int) -> tuple[float, ...]:
    numbers = (float(value),) * channels if isinstance(value, (int, float)) else tuple(float(v) for v in value)
    numbers = numbers * channels if len(numbers) == 1 else numbers
    if len(numbers) != channels or (name == "std" and min(numbers) <= 0):
        raise ValueError(
            f"{name} is {value!r}; it must be one number, or one for each of {channels} channels, std above 0"
        )
    return numbers


def _find(spec: str, weights: str | os.PathLike[str] | None, num_classes: int | None, seed: int) -> LoadedModel:
    suffix = Path(spec).suffix.lower()
    if spec == "demo" or suffix in (".pt", ".pth"):
        return _demo(DEMO if spec == "demo" else Path(spec), spec, weights, num_classes)
    if suffix == ".onnx":
        if weights is not None:
            raise ValueError(f"weights is {os.fspath(weights)!r}, but {spec} brings its own: leave them out")
        return _own(zfnet512, spec, spec, num_classes, seed, 128.0, 128.0)
    if spec == "zfnet":
        return _own(zfnet, spec, weights, num_classes, seed, 128.0, 1.0)
    if spec == "zfnet512":
        return _own(zfnet512, spec, weights, num_classes, seed, 128.0, 128.0)
    if ":" in spec:
        return _factory(spec, weights, num_classes)
    return _torchvision(spec, weights, num_classes, seed)


def _origin(weights: str | os.PathLike[str] | None, seed: int) -> str:
    return f"random (seed {seed})" if weights is None else os.fspath(weights)


def _own(
    builder: Callable[..., Any],
    spec: str,
    weights: str | os.PathLike[str] | None,
    num_classes: int | None,
    seed: int,
    mean: float,
    std: float,
) -> LoadedModel:
    """A network of this package."""
    net = builder(num_classes=1000 if num_classes is None else num_classes)
    if weights is not None:
        load_weights(net, weights)
    return LoadedModel(net, spec, _origin(weights, seed), weights is None, net.input_size, (mean,) * 3, (std,) * 3)


def _demo(path: Path, spec: str, weights: str | os.PathLike[str] | None, num_classes: int | None) -> LoadedModel:
    """The network that ``zfcuda demo`` trained; its checkpoint tells its sizes."""
    from zfcuda.demo.data import normalise
    from zfcuda.demo.training import Recipe, narrow_zfnet

    if weights is not None or num_classes is not None:
        raise ValueError(f"{spec} has weights and classes of its own: leave out weights and num_classes")
    if not path.is_file():
        where = "run `zfcuda demo` first, in this folder" if spec == "demo" else "there is no such file"
        raise FileNotFoundError(f"model is {spec!r}, which reads {path}: {where}")
    try:
        kept = torch.load(path, map_location="cpu", weights_only=True)
        settings, result = kept["settings"], kept["result"]
        recipe = Recipe(**{field.name: settings[field.name] for field in fields(Recipe)})
        net = narrow_zfnet(recipe, settings["classes"])
    except Exception as error:  # whatever a stranger's file makes of it
        raise RuntimeError(
            f"{path} is not the checkpoint of this version's `zfcuda demo` ({type(error).__name__}). A file of weights "
            "does not tell its network: name that, and the file as weights"
        ) from None
    fill(net, result["net"], path)
    state = f"{path}, {result['step']} of {recipe.steps} training steps"
    return LoadedModel(net, spec, state, False, net.input_size, (128.0,) * 3, (DEMO_SPREAD,) * 3, normalise)


def _factory(spec: str, weights: str | os.PathLike[str] | None, num_classes: int | None) -> LoadedModel:
    """A user's own: ``package.module:name``, importable from the current folder too."""
    module_name, _, name = spec.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ImportError(f"model is {spec!r}, which cannot be imported: {error}") from error
    if not isinstance(found, torch.nn.Module):
        found = found() if num_classes is None else found(num_classes=num_classes)
    elif num_classes is not None:
        raise ValueError(
            f"num_classes is {num_classes}, but {spec} is a module already: name a function that builds one"
        )
    if not isinstance(found, torch.nn.Module):
        raise ValueError(f"model is {spec!r}, which gives a {type(found).__name__}; it must give a torch.nn.Module")
    if weights is not None:
        load_weights(found, weights)
    size, channels = getattr(found, "input_size", 224), _channels(found)
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else (sum(IMAGENET_MEAN) / 3, sum(IMAGENET_STD) / 3)
    return LoadedModel(
        found,
        spec,
        f"as {spec} made them" if weights is None else os.fspath(weights),
        False,
        (size, size) if isinstance(size, int) else (int(size[0]), int(size[1])),
        _each_channel("mean", getattr(found, "mean", mean), channels),
        _each_channel("std", getattr(found, "std", std), channels),
    )


def _torchvision(name: str, weights: str | os.PathLike[str] | None, num_classes: int | None, seed: int) -> LoadedModel:
    """A classification network of torchvision."""
    from zfcuda.models import torchvision

    models = torchvision.load().models
    known = models.list_models(module=models)
    if name not in known:
        near = difflib.get_close_matches(name, [*known, "zfnet", "zfnet512", "demo"], 3)
        hint = f". Did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"model is {name!r}; it must be {MODELS}{hint}")
    published = models.get_model_weights(name)
    chosen = published.__members__.get(os.fspath(weights)) if weights is not None else None
    if weights is not None and chosen is None and not Path(weights).is_file():
        raise FileNotFoundError(
            f"weights is {os.fspath(weights)!r}, which is neither a file nor published for {name}: "
            + ", ".join(published.__members__)
        )
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False  # minutes of truncated normals, announced by a warning
    net = models.get_model(name, weights=None, **options)
    if chosen is not None:
        fill(net, _fetch(chosen.url), f"{name} {chosen.name}")
    elif weights is not None:
        load_weights(net, weights)
    transform = (chosen or next(iter(published))).transforms()
    # Trained on pixels in -1 … 1, which their own transform_input=True would make of ImageNet's preprocessing.
    minus_one_to_one = hasattr(net, "transform_input")
    mean, std = ((0.5,) * 3,) * 2 if minus_one_to_one else (transform.mean, transform.std)
    return LoadedModel(
        net,
        name,
        f"{name} {chosen.name}, published" if chosen is not None else _origin(weights, seed),
        weights is None,
        (transform.crop_size[0],) * 2,
        tuple(255 * m for m in mean),
        tuple(255 * s for s in std),
    )


def _fetch(url: str) -> dict[str, Tensor]:
    """Published weights, checked by the hash in their name, kept in torch's cache."""
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except urllib.error.URLError as error:
        raise RuntimeError(f"{url} cannot be fetched ({error.reason}); bring the file and name it as weights") from None
