"""Weights from files: safetensors, PyTorch's ``.pth`` and ``.pt``, and the ONNX model zoo's ``zfnet512``.

Nothing in a file is executed: pickles are read by ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Unmatched", "load_weights", "read_weights"]

#: Where training scripts keep the state dict in a checkpoint.
NESTED = ("state_dict", "model_state_dict", "model", "net")
#: What wrappers put before every name: DataParallel and torch.compile.
PREFIXES = ("module.", "_orig_mod.")
SHOWN = 6  # names in an error


class Unmatched(NamedTuple):
    """What ``load_weights(strict=False)`` left alone."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def load_weights(model: torch.nn.Module, path: str | os.PathLike[str], strict: bool = True) -> Unmatched:
    """Fill a model with the weights of a file.

    Either all of them fit, or an error says which do not and the model is left as it was.

    Parameters
    ----------
    model : torch.nn.Module
        Changed in place; weights take its dtypes and devices.
    path : path
        As in `read_weights`.
    strict : bool
        Whether every tensor of the file must be in the model and the other way round. With False, those of either
        that the other lacks are left alone; shapes must agree all the same.

    Returns
    -------
    Unmatched
        ``missing_keys`` (in the model only) and ``unexpected_keys`` (in the file only); both empty when strict.

    Raises
    ------
    RuntimeError
        For missing, unexpected or differently shaped tensors, all of them named; and as `read_weights`.
    """
    return fill(model, read_weights(path), path, strict)


def fill(
    model: torch.nn.Module, state: dict[str, Tensor], path: str | os.PathLike[str], strict: bool = True
) -> Unmatched:
    """The same with the tensors read already; ``path`` is for messages."""
    own = model.state_dict()
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    shapes = [
        f"{name} {tuple(state[name].shape)}, the model {tuple(own[name].shape)}"
        for name in own
        if name in state and own[name].shape != state[name].shape
    ]
    problems = [("has other shapes", shapes)]
    if strict or len(missing) == len(own):
        problems += [("lacks", missing), ("has beyond the model", unexpected)]
    said = "; ".join(f"{what} {_list(names)}" for what, names in problems if names)
    if said:
        raise RuntimeError(
            f"{os.fspath(path)} does not fit {type(model).__name__}: it {said}. "
            + _remedy(missing, unexpected, shapes, len(own))
        )
    model.load_state_dict(state, strict=False)
    return Unmatched(missing, unexpected)


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a file by name, on the CPU.

    Parameters
    ----------
    path : path
        ``.safetensors``; ``.onnx`` (only the model zoo's ``zfnet512``); anything else is a file of ``torch.save``: a
        state dict, alone or as ``state_dict``, ``model_state_dict``, ``model`` or ``net`` of a checkpoint. The
        prefixes ``module.`` (DataParallel) and ``_orig_mod.`` (torch.compile) are dropped.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    RuntimeError
        For a file that cannot be read, would run code, or holds no state dict.
    ModuleNotFoundError
        For ``.onnx`` without the package ``onnx``.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"weights is {os.fspath(path)}, which is not a file")
    suffix = Path(path).suffix.lower()
    if suffix == ".onnx":
        from zfcuda.models.zfnet512 import read_onnx

        return read_onnx(path)
    state = _read_safetensors(path) if suffix == ".safetensors" else _state_dict(_read_pickle(path), path)
    for prefix in PREFIXES:
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _read_safetensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise RuntimeError(f"{os.fspath(path)} is not a safetensors file, or is incomplete: {error}") from None


def _read_pickle(path: str | os.PathLike[str]) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise RuntimeError(
            f"{os.fspath(path)} is refused, as it holds more than tensors: {_first_reason(error)}. Unpickling that "
            "runs code of the file's author. Where you trust it, save its state_dict() alone: "
            "torch.save(torch.load(file, weights_only=False).state_dict(), new_file)"
        ) from None
    except (RuntimeError, EOFError, ValueError) as error:
        raise RuntimeError(f"{os.fspath(path)} is not a file of torch.save, or is incomplete: {error}") from None


def _first_reason(error: Exception) -> str:
    """What torch.load says of the cause, without its advice to load the file unsafely."""
    lines = [line.strip() for line in str(error).splitlines()]
    cause = next((line for line in lines if line.startswith(("WeightsUnpickler error", "Trying to"))), lines[0])
    return cause.removeprefix("WeightsUnpickler error:").partition(", but")[0].strip().rstrip(".")


def _state_dict(loaded: Any, path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state dict in what was loaded, itself or one level below."""
    candidates = [loaded] + ([loaded.get(key) for key in NESTED] if isinstance(loaded, dict) else [])
    for state in candidates:
        if isinstance(state, dict) and state and all(isinstance(value, Tensor) for value in state.values()):
            return dict(state)
    found = f"a dict of {_list([str(key) for key in loaded])}" if isinstance(loaded, dict) else type(loaded).__name__
    raise RuntimeError(
        f"{os.fspath(path)} holds {found}; expected a state dict (names and tensors), alone or as one of "
        + ", ".join(NESTED)
    )


def _list(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _remedy(missing: list[str], unexpected: list[str], shapes: list[str], count: int) -> str:
    if len(missing) == count:
        return "No name agrees: the file is of another architecture, or its names have a prefix of their own"
    if shapes and not missing and not unexpected:
        return "Build the model with the sizes of the file; another number of classes is num_classes"
    return "Check that it is this architecture; strict=False leaves alone what the other side lacks"
