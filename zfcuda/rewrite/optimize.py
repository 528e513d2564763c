"""A model, rewritten to run on this library's operators."""

from __future__ import annotations

import copy
import itertools
from typing import TypeVar

import torch

from zfcuda.rewrite.forward import set_forward, use_original_forward
from zfcuda.rewrite.fusing import fuse
from zfcuda.rewrite.layers import counterpart
from zfcuda.rewrite.recording import Unfollowable, holds_calls, record
from zfcuda.rewrite.report import Left, Replaced, Report, public_name

__all__ = ["optimize"]

Model = TypeVar("Model", bound=torch.nn.Module)


def optimize(model: Model) -> Model:
    """A copy of a model that runs on this library's operators, and shares the model's parameters and buffers.

    In the forward() of every module, by `torch.fx`:

    - a ``Conv2d`` with the ReLU behind it, with the ``MaxPool2d`` behind that, and with the ``LocalResponseNorm``
      behind the pool, becomes one call of :func:`zfcuda.ops.conv2d_relu`, :func:`zfcuda.ops.conv2d_relu_max_pool2d` or
      :func:`zfcuda.ops.conv2d_relu_max_pool2d_norm`, where nothing else sees what is between them, and however they
      are written: as modules, functions or methods, in place or not; with groups of 2 to 8 channels, too, but not of
      others, which torch convolves faster;
    - so does a :class:`zfcuda.nn.ConvReLU2d`, which has its ReLU, with the pool and the normalisation behind it;
    - local response normalisation becomes :func:`zfcuda.ops.local_response_norm`;
    - other max-pools become :func:`zfcuda.nn.fastest_max_pool2d`, which is ours where it is the faster one.

    Results and gradients are the same within rounding. Whatever cannot be replaced stays as it is, and
    ``zfcuda_report`` of the result, a :class:`zfcuda.rewrite.report.Report`, says what was replaced, what was left,
    and why.

    Parameters
    ----------
    model : torch.nn.Module
        Any; it is not changed.

    Returns
    -------
    torch.nn.Module
        Of the same class, in the same mode, with the same modules under the same names, and the same state dict. Of its
        modules only the pools and the normalisations are of another class, derived from torch's; otherwise nothing but
        what a forward() calls is different. It can be trained, copied, pickled and compiled.

    Raises
    ------
    TypeError
        If ``model`` is not a module.

    Notes
    -----
    *Shared* means that training one trains the other, as with :func:`torch.fx.symbolic_trace`; ``copy.deepcopy`` the
    result for parameters of its own. Move the model to its device first: ``.to()`` on one of the two moves the
    parameters of both, but the buffers of that one only.

    *Hooks.* A convolution, ReLU or pool with hooks is left alone, as one with parametrised weights is. One that gets a
    hook later does not call it where it has become a part of another operator: register hooks first.

    *What cannot be followed.* Each module's forward() is recorded by itself; those within are called, not looked into.
    So one that `torch.fx` cannot follow (control flow that depends on values, ...), or that does more than a recording
    repeats (gradients switched off for a part, attributes set, the type of an input asked for, other calls in training
    than in evaluation) stays as it is, and those within are optimised all the same. A convolution whose ReLU is called
    by another module's forward() is left.

    *Changes afterwards.* A module that gets another module in the place of one that it held, or one more, or loses one,
    returns to the forward() of its class.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    tensors = itertools.chain(model.parameters(), model.buffers())
    model = copy.deepcopy(model, {id(t): t for t in tensors})
    forwards = {path: _forward(module) for path, module in model.named_modules()}
    alone = {path: _alone(module) for path, module in model.named_modules()}
    model.zfcuda_report = _report(model, forwards, alone)  # type: ignore[assignment]
    return model


def _forward(module: torch.nn.Module) -> list[Replaced | Left]:
    """Rewrite a forward(); the names of the entries are the calls' in it."""
    use_original_forward(module)
    if not holds_calls(module):
        return []
    try:
        graph = record(module)
    except Unfollowable as error:
        return [Left("", type(module).__name__, f"its forward() stays: {error}")]
    entries = fuse(module, graph)
    if any(isinstance(entry, Replaced) for entry in entries):
        set_forward(module, graph)
    return entries


def _alone(module: torch.nn.Module) -> Replaced | Left | None:
    """Make a pool or a normalisation one of ours."""
    found = counterpart(module)
    if found is None:
        return None
    kind, reason = found
    was = type(module).__name__
    if reason is not None:
        return Left("", was, reason)
    module.__class__ = kind
    return Replaced("", was, public_name(kind))


def _report(
    model: torch.nn.Module, forwards: dict[str, list[Replaced | Left]], alone: dict[str, Replaced | Left | None]
) -> Report:
    """The entries in the order of the modules; names within a module become names within the model."""
    found: list[Replaced | Left] = []
    for path, entries in forwards.items():
        found += [entry.within(path) for entry in entries]
    done = {name for entry in found for name in (entry.name, *(entry.joined if isinstance(entry, Replaced) else ()))}
    found += [entry.within(path) for path, entry in alone.items() if entry is not None and path not in done]
    for path, module in model.named_modules():
        if type(module) is torch.nn.Conv2d and path not in done:
            found.append(Left(path, "Conv2d", "no forward() that could be followed calls it"))
    order = {path: number for number, (path, _) in enumerate(model.named_modules(remove_duplicate=False))}
    # A function's call comes after the modules of the one that holds it.
    found.sort(key=lambda entry: order.get(entry.name, len(order)))
    return Report(
        tuple(entry for entry in found if isinstance(entry, Replaced)),
        tuple(entry for entry in found if isinstance(entry, Left)),
    )
