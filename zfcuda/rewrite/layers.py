"""Which modules and calls have a counterpart in this library, which one, and why others are left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.nn.utils.parametrize import is_parametrized

from zfcuda import core, nn, ops
from zfcuda.deconv.kinds import FUNCTIONS
from zfcuda.ops._common import MAX_WINDOW, pair

__all__ = [
    "counterpart",
    "function_counterpart",
    "is_relu",
    "local_response_norm",
    "max_pool",
    "module_of",
    "objection",
]

_T = torch.nn
RELUS = (F.relu, torch.relu, torch.relu_, "relu", "relu_")
MAX_POOLS = (F.max_pool2d, torch.max_pool2d)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

LOCAL_RESPONSE_NORMS = (F.local_response_norm, ops.local_response_norm)

#: Modules that have a counterpart by themselves.
ALONE: dict[type, type] = {_T.MaxPool2d: nn.FastestMaxPool2d, _T.LocalResponseNorm: nn.LocalResponseNorm}
#: Those that do exactly what a module of torch does.
SAME: dict[type, tuple[type, ...]] = {
    _T.MaxPool2d: (_T.MaxPool2d, nn.MaxPool2d, nn.FastestMaxPool2d),
    _T.LocalResponseNorm: (_T.LocalResponseNorm, nn.LocalResponseNorm),
}


def module_of(root: torch.nn.Module, call: fx.Node) -> Any:
    """The module that a node calls; None if it calls a function or a method."""
    return root.get_submodule(str(call.target)) if call.op == "call_module" else None


def objection(module: Any, kind: type) -> str | None:
    """Why a module that is a ``kind`` must stay as it is; None if it may be replaced."""
    if is_parametrized(module):
        return "its parameters are parametrised"
    if type(module) not in SAME.get(kind, (kind,)) or "forward" in vars(module):
        return f"it is derived from {kind.__name__}, and may do something else"
    if any(getattr(module, name) for name in HOOKS):
        return "it has hooks"
    if kind is _T.Conv2d:
        return _conv_objection(module)
    if kind is _T.MaxPool2d:
        return _pool_objection(module)
    return None


def _conv_objection(conv: Any) -> str | None:
    if conv.padding_mode != "zeros":
        return f"its padding_mode is {conv.padding_mode!r}"
    width = conv.in_channels // conv.groups
    if conv.groups > 1 and not (2 <= width <= 8 and conv.in_channels == conv.out_channels):
        return f"it has {conv.groups} groups of a width for which torch's is faster"
    if conv.weight.dtype not in core.DTYPES:
        return f"its dtype is {conv.weight.dtype}"
    if conv.weight.is_cpu and conv.weight.dtype == torch.bfloat16:
        return "it is bfloat16 on the CPU, for which torch's is faster"
    return None


def _pool_objection(pool: Any) -> str | None:
    if pool.return_indices:
        return "it returns indices"
    if getattr(pool, "return_switches", False):
        return "it returns switches"
    height, width = pair("kernel_size", pool.kernel_size)
    return f"its window has more than {MAX_WINDOW} positions" if height * width > MAX_WINDOW else None


def is_relu(root: torch.nn.Module, call: fx.Node) -> bool:
    """Whether a call is a ReLU, however written, that may become a part of another operator."""
    module = module_of(root, call)
    if module is None:
        return call.target in RELUS
    return isinstance(module, _T.ReLU) and objection(module, _T.ReLU) is None


def max_pool(root: torch.nn.Module, call: fx.Node) -> Any:
    """The ``MaxPool2d`` that a call is, or does the work of; None if it is none, or must stay as it is."""
    return _module(root, call, _T.MaxPool2d, MAX_POOLS, "max_pool2d")


def local_response_norm(root: torch.nn.Module, call: fx.Node) -> Any:
    """The ``LocalResponseNorm`` that a call is, or does the work of; None as of :func:`max_pool`."""
    return _module(root, call, _T.LocalResponseNorm, LOCAL_RESPONSE_NORMS, "local_response_norm")


def _module(root: torch.nn.Module, call: fx.Node, kind: type, functions: Sequence[Any], name: str) -> Any:
    module = module_of(root, call)
    if module is None and call.op == "call_function" and call.target in functions:
        module = _as_module(call, name)
    return module if isinstance(module, kind) and objection(module, kind) is None else None


def _as_module(call: fx.Node, function: str) -> Any:
    """A function's call as a module; None where an argument is not a constant."""
    if len(call.all_input_nodes) != 1:
        return None
    make, names, _ = FUNCTIONS[function]
    options = {**dict(zip(names, call.args[1:], strict=False)), **call.kwargs}
    options.pop("input", None)
    return make(**options)


def counterpart(module: torch.nn.Module) -> tuple[type, str | None] | None:
    """What could replace a module by itself, and why it does not; None for a module that has nothing such."""
    kind = next((kind for kind in ALONE if isinstance(module, kind)), None)
    if kind is None or type(module).__module__ == nn.__name__:
        return None
    return ALONE[kind], objection(module, kind)


def function_counterpart(root: torch.nn.Module, call: fx.Node) -> Any:
    """The function of this library that takes the place of one that is called, with the same arguments; or None."""
    if call.op != "call_function":
        return None
    if call.target is F.local_response_norm:
        return ops.local_response_norm
    return nn.fastest_max_pool2d if max_pool(root, call) is not None else None
