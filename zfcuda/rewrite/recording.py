"""A module's own forward() as a graph that holds in both modes and for all optional arguments; or why there is none."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from zfcuda.deconv import recording
from zfcuda.deconv.recording import function_name

__all__ = ["Unfollowable", "holds_calls", "record"]


class Unfollowable(Exception):
    """A forward() of which no recording says all that it does; the message says why."""


def holds_calls(module: torch.nn.Module) -> bool:
    """Whether it has a forward() made of calls that can be recorded."""
    lists = torch.nn.ModuleList, torch.nn.ModuleDict, torch.nn.ParameterList, torch.nn.ParameterDict
    leaf = recording.Tracer().is_leaf_module(module, "")
    return not leaf and not isinstance(module, lists) and type(module).forward is not torch.nn.Module.forward


def record(module: torch.nn.Module) -> fx.Graph:
    """The calls of ``module.forward()``; modules within are called and not looked into.

    Raises
    ------
    Unfollowable
        If `torch.fx` cannot follow it, or not all of it.
    """
    training, evaluation = _record(module, True, True), _record(module, False, False)
    for other in (_record(module, True, False), *_with_nones(module)):
        if _lines(other) != _lines(training):
            raise Unfollowable("it depends on the mode of a module within, or on its optional arguments")
    return _merged(training.graph, evaluation.graph)


class _Tracer(recording.Tracer):
    """Looks into no module."""

    def __init__(self) -> None:
        super().__init__()
        self._context = _context()

    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        if _context() != self._context:
            raise Unfollowable("it switches gradients or autocast, which no recording repeats")
        return super().create_node(kind, *args, **kwargs)


class _Proxy(recording.Proxy):
    """Does not let a forward() ask what it is, which fx answers wrongly."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        if not sys._getframe(1).f_globals["__name__"].startswith("torch."):
            raise Unfollowable("it asks for the type of a value")
        return type(self)


def _context() -> tuple[bool, ...]:
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


def _record(module: torch.nn.Module, own: bool, others: bool, nones: dict[str, None] | None = None) -> _Tracer:
    """With the module and those within in training (True) or evaluation, and with some arguments None."""
    tracer = _Tracer()
    with _kept(module) as changed, _modes(module, own, others):
        try:
            tracer.graph = tracer.trace(module, nones)
        except Unfollowable:
            raise
        except Exception as error:
            reason = str(error).strip().rstrip(".").split("\n")[0]
            raise Unfollowable(f"torch.fx cannot follow it: {reason}") from error
    if changed:
        raise Unfollowable(f"it sets {', '.join(changed)}, which no recording repeats")
    return tracer


def _with_nones(module: torch.nn.Module) -> Iterator[_Tracer]:
    """fx takes an argument that may be None for a tensor: once more, without each of them."""
    for name, parameter in inspect.signature(module.forward).parameters.items():
        if parameter.default is None:
            yield _record(module, True, True, {name: None})


def _lines(tracer: _Tracer) -> list[str | None]:
    """The graph in words, without what fx adds for arguments that are fixed."""
    nodes = (n for n in tracer.graph.nodes if n.op != "placeholder")
    return [n.format_node() for n in nodes if function_name(n) not in ("_assert", "_assert_is_none")]


# ------------------------------------------------------------------ nothing but the recording is left


@contextmanager
def _modes(module: torch.nn.Module, own: bool, others: bool) -> Iterator[None]:
    """Training or evaluation for a while."""
    before = {m: m.training for m in module.modules()}
    try:
        for m in before:
            m.training = own if m is module else others
        yield
    finally:
        for m, training in before.items():
            m.training = training


@contextmanager
def _kept(module: torch.nn.Module) -> Iterator[list[str]]:
    """Undo what happens to attributes, and name them in the list that is yielded."""
    before = {m: {k: (v, _contents(v)) for k, v in vars(m).items()} for m in module.modules()}
    changed: list[str] = []
    try:
        yield changed
    finally:
        for m, attributes in before.items():
            changed += _restore(vars(m), attributes)


def _restore(now: dict[str, Any], attributes: dict[str, tuple[Any, Any]]) -> list[str]:
    """Make ``now`` what it was; the names that differed."""
    changed = [name for name in now if name not in attributes]
    for name in changed:
        del now[name]
    for name, (value, contents) in attributes.items():
        if now.get(name, _MISSING) is not value or not _same(_contents(value), contents):
            changed.append(name)
            now[name] = value
            if contents is not None:
                value.clear()
                getattr(value, "extend" if isinstance(value, list) else "update")(contents)
    return changed


_MISSING = object()


def _contents(value: Any) -> Any:
    return copy.copy(value) if isinstance(value, (list, dict, set)) else None


def _same(one: Any, other: Any) -> bool:
    """Whether two containers hold the very same things."""
    if isinstance(one, dict):
        one, other = [*one.keys(), *one.values()], [*other.keys(), *other.values()]
    if isinstance(one, list):
        return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))
    return bool(one == other)


# ------------------------------------------------------------------ training and evaluation in one graph


def _merged(training: fx.Graph, evaluation: fx.Graph) -> fx.Graph:
    """One graph that does what both do: flags that differ become ``self.training``."""
    if [(n.op, n.target, n.name) for n in training.nodes] != [(n.op, n.target, n.name) for n in evaluation.nodes]:
        raise Unfollowable(_MODES)
    pairs = list(zip(training.nodes, evaluation.nodes, strict=True))
    first = next(node for node in training.nodes if node.op != "placeholder")
    with training.inserting_before(first):
        flag = training.create_node("get_attr", "training")
    for one, other in pairs:
        one.args, one.kwargs = _merged_value(one.args, other.args, flag), _merged_value(one.kwargs, other.kwargs, flag)
    if not flag.users:
        training.erase_node(flag)
    return training


_MODES = "what it does in training is not what it does in evaluation"


def _merged_value(one: Any, other: Any, flag: fx.Node) -> Any:
    if one is True and other is False:
        return flag
    if type(one) is not type(other):
        raise Unfollowable(_MODES)
    if isinstance(one, slice):
        return slice(*(_merged_value(getattr(one, k), getattr(other, k), flag) for k in ("start", "stop", "step")))
    if isinstance(one, (tuple, list)) and len(one) == len(other):
        values = [_merged_value(a, b, flag) for a, b in zip(one, other, strict=True)]
        return type(one)(*values) if hasattr(one, "_fields") else type(one)(values)
    if isinstance(one, dict) and list(one) == list(other):
        return type(one)({name: _merged_value(one[name], other[name], flag) for name in one})
    if isinstance(one, fx.Node):
        one_, other_ = one.name, other.name
    else:
        one_, other_ = one, other
    if one_ != other_:
        raise Unfollowable(_MODES)
    return one
