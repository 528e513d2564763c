"""What a model's forward() calls, recorded by `torch.fx`."""

from __future__ import annotations

import inspect
import operator
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from zfcuda.deconv.kinds import is_layer, refuse
from zfcuda.rewrite.forward import original_forwards

__all__ = ["Proxy", "Recording", "Tracer", "function_name", "is_inplace"]

INPLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv)


class Recording:
    """The calls of one forward() in evaluation mode.

    Attributes
    ----------
    root : torch.nn.Module
        The model; a layer by itself is a chain of one, as fx would look into its forward().
    calls : list of fx.Node
        Of modules, functions and methods, in order.
    live : set of fx.Node
        The calls that matter to the output.
    around : dict
        The name of the module whose forward() holds a call.
    use : dict
        How often the module of a call was called before.
    results : dict
        What modules that hold others returned, by the call that was the last one then.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        root = torch.nn.Sequential(OrderedDict({type(model).__name__: model})) if is_layer(model) else model
        tracer = Tracer()
        with _evaluation(model), original_forwards(model):
            graph = _trace(tracer, root)
        self.root, self.calls = root, list(graph.nodes)
        self.around, self.use, self.results = tracer.around, tracer.use, tracer.results
        self.live: set[fx.Node] = set()
        for call in reversed(self.calls):
            if call.op in ("placeholder", "output") or is_inplace(call, root) or self.live.intersection(call.users):
                self.live.add(call)


def is_inplace(call: fx.Node, root: torch.nn.Module) -> bool:
    """Whether it changes its first argument."""
    if call.op == "call_module":
        return bool(getattr(root.get_submodule(str(call.target)), "inplace", False))
    function = function_name(call)
    return (
        (function.endswith("_") and not function.endswith("__"))
        or call.target in INPLACE
        or bool(call.kwargs.get("inplace"))
        or "out" in call.kwargs
    )


def function_name(call: fx.Node) -> str:
    """The name of a function or a method."""
    return call.target if isinstance(call.target, str) else getattr(call.target, "__name__", str(call.target))


def _augmented(function: Any) -> Any:
    def record(self: Any, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


class Proxy(fx.Proxy):
    """fx records ``y += x`` as ``y = y + x``, and loses that whoever else holds y sees the sum; this one keeps it."""


for _function in INPLACE:
    setattr(Proxy, f"__{_function.__name__}__", _augmented(_function))


class Tracer(fx.Tracer):
    """Keeps the `around`, `use` and `results` of a `Recording`, and which module failed first."""

    def __init__(self) -> None:
        super().__init__()
        self.around: dict[fx.Node, str] = {}
        self.use: dict[fx.Node, int] = {}
        self.results: dict[fx.Node, list[tuple[str, fx.Node]]] = {}
        self.failed: tuple[str, str] | None = None
        self._path = ""
        self._uses: Counter[str] = Counter()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Proxy(node, self)

    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        return is_layer(m) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: torch.nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        outer, self._path = self._path, self.path_of_module(m)
        try:
            # Not ``forward``, which would run hooks.
            result = super().call_module(m, m.forward, args, kwargs)
            if isinstance(result, fx.Proxy) and not self.is_leaf_module(m, self._path):
                last = next(iter(reversed(self.graph.nodes)))
                self.results.setdefault(last, []).append((self._path, result.node))
            return result
        except Exception:
            self.failed = self.failed or (self._path, type(m).__name__)
            raise
        finally:
            self._path = outer

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(kind, target, *args, **kwargs)
        self.around[node] = self._path
        if kind == "call_module":
            self.use[node] = self._uses[target]
            self._uses[target] += 1
        return node


@contextmanager
def _evaluation(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode for a while: a forward() may ask which one it is."""
    training = [m for m in model.modules() if m.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def _trace(tracer: Tracer, root: torch.nn.Module) -> fx.Graph:
    parameters = list(inspect.signature(root.forward).parameters.values())[1:]
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    try:
        return tracer.trace(root, defaults or None)
    except Exception as error:
        name, what = tracer.failed or (type(root).__name__, "the model")
        reason = str(error).strip().rstrip(".").split("\n")[0]
        refuse(
            name,
            what,
            f"torch.fx cannot follow its forward(): {reason}. What a forward() does must not depend on the values in "
            "the image or on its size; write such a part as torch.nn.Sequential",
            error,
        )
