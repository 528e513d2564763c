"""A model's forward() as a list of nodes, or a clear refusal.

Three steps: `torch.fx` records which modules and functions the forward() calls (`zfcuda.deconv.recording`); each call
becomes a node; nodes that belong together are joined. Whatever is not known (`zfcuda.deconv.kinds`) is refused by name,
with the reason, rather than projected wrongly.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import fx

from zfcuda import nn
from zfcuda.deconv import kinds
from zfcuda.deconv.kinds import ARITHMETIC, FUNCTIONS, KINDS
from zfcuda.deconv.node import Arithmetic, Channels, Features, Node
from zfcuda.deconv.recording import Recording, function_name, is_inplace

__all__ = ["lower"]

_T = torch.nn


def lower(model: torch.nn.Module, joined: bool) -> list[Node]:
    """The nodes of ``model`` in the order in which they run; the last one is its output."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    recording = Recording(model)
    lowering = _Lowering(recording)
    for call in recording.calls:
        if call in recording.live:
            lowering.add(call)
        lowering.name_results(call)
    nodes, uses = _needed(lowering.nodes, lowering.result)
    if joined:
        nodes = _joined(nodes, uses)
    if not nodes:
        raise TypeError(f"model is a {type(model).__name__} without layers; there is nothing to project")
    return nodes


class _Lowering:
    """Calls become nodes, one by one; ``of`` tells which node's output each call's result is now."""

    def __init__(self, recording: Recording) -> None:
        self.root, self.recording = recording.root, recording
        self.nodes: list[Node] = []
        self.result = -1
        self.of: dict[fx.Node, int] = {}
        self._flat: dict[int, bool] = {-1: False}
        # In place: tensors that share memory have one owner; views of a changed one are stale.
        self._owner: dict[int, int] = {-1: -1}
        self._stale: dict[int, str] = {}
        self._registered: dict[Any, list[str]] = {}
        for name, module in recording.root.named_modules(remove_duplicate=False):
            self._registered.setdefault(module, []).append(name)
        self._returned: Counter[str] = Counter()
        self._taken = {name for names in self._registered.values() for name in names}

    def add(self, call: fx.Node) -> None:
        """What one call does."""
        if call.op == "placeholder":
            if not self.of:
                self.of[call] = -1
        elif call.op == "output":
            self._output(call)
        elif call.op == "call_module":
            module = self.root.get_submodule(str(call.target))
            self._module(call, self._name(call), module, call.args, call.kwargs)
        elif call.op in ("call_function", "call_method"):
            self._call(call)

    def name_results(self, call: fx.Node) -> None:
        """A module that holds others names what it returns."""
        for path, result in self.recording.results.get(call, ()):
            if result in self.of:
                self._alias(self.of[result], self._nth_name(self.root.get_submodule(path), self._returned[path]))
                self._returned[path] += 1

    # Names

    def _name(self, call: fx.Node) -> str:
        if call.op == "call_module":
            return self._nth_name(self.root.get_submodule(str(call.target)), self.recording.use[call])
        around, function = self.recording.around[call], function_name(call)
        function = ARITHMETIC.get(function, function).strip("_")
        name = f"{around}.{function}" if around else function
        return self._free(name) if name in self._taken else self._take(name)

    def _nth_name(self, module: torch.nn.Module, use: int) -> str:
        """Of a module's use: the names that it is registered under, then numbered ones."""
        names = self._registered[module]
        return names[use] if use < len(names) else self._free(names[0])

    def _free(self, name: str) -> str:
        return self._take(next(f"{name}_{n}" for n in itertools.count(1) if f"{name}_{n}" not in self._taken))

    def _take(self, name: str) -> str:
        self._taken.add(name)
        return name

    def _refuse(self, call: fx.Node, reason: str) -> NoReturn:
        if call.op == "output":
            kinds.refuse(type(self.root).__name__, "its output", reason)
        module = call.op == "call_module"
        what = type(self.root.get_submodule(str(call.target))).__name__ if module else function_name(call)
        kinds.refuse(self._name(call), what, reason)

    # Maps

    def _map(self, call: fx.Node, value: Any) -> int:
        """The node of a call's argument."""
        if not isinstance(value, fx.Node) or value not in self.of:
            self._refuse(call, f"its input {_given(value)} is not a map")
        index = self.of[value]
        if index in self._stale:
            self._refuse(
                call,
                f"its input shares memory with a map that {self._stale[index]} changed in place; "
                "make that one not in place",
            )
        return index

    def _new(self, call: fx.Node, node: Node, view: bool = False) -> int:
        """One more node; ``view`` says that it shares memory with its input."""
        self._check_rank(call, node)
        self.nodes.append(node)
        index = self.of[call] = len(self.nodes) - 1
        self._owner[index] = self._owner[node.inputs[0]] if view else index
        self._flat[index] = self._flat[node.inputs[0]] or node.kind == "flatten"
        return index

    def _in_place(self, name: str, old: int, new: int) -> None:
        """From here on, whoever holds ``old`` sees ``new``."""
        for call, index in self.of.items():
            if index == old:
                self.of[call] = new
        for index, owner in self._owner.items():
            if owner == self._owner[old] and index not in (old, new):
                self._stale[index] = name
        self._owner[new] = self._owner[old]

    def _check_rank(self, call: fx.Node, node: Node) -> None:
        """Maps must be flattened exactly before linear layers."""
        flat = {self._flat[i] for i in node.inputs}
        if len(flat) > 1:
            self._refuse(call, "one of its inputs is flattened, another is not")
        if node.kind == "linear" and flat == {False}:
            self._refuse(call, "a linear layer needs a Flatten before it")
        maps = node.kind in ("conv", "pool", "adaptive_pool", "norm", "average", "flatten") or isinstance(
            node.module, _T.BatchNorm2d
        )
        if maps and flat == {True}:
            self._refuse(call, "its input has no height and width: they were flattened before it")
        if isinstance(node.module, _T.BatchNorm1d) and flat == {False}:
            self._refuse(call, "its input is not flattened; use BatchNorm2d for maps")

    # Modules

    def _module(self, call: fx.Node, name: str, module: Any, args: Sequence[Any], kwargs: Any) -> None:
        cls: Any = next((c for c in type(module).__mro__ if c in KINDS), None)
        if cls is None:
            self._refuse(call, kinds.reason(type(module).__name__, module))
        if type(module).forward is not cls.forward:
            self._refuse(call, f"it overrides the forward() of {cls.__name__}, so what it computes is not known")
        if len(args) + len(kwargs) != 1:
            self._refuse(call, "it is called with more than its input")
        below = self._map(call, [*args, *kwargs.values()][0])
        kind = KINDS[cls]
        if kind == "alias":
            self.of[call] = below
            self._alias(below, name)
            return
        for reason in kinds.objections(kind, module):
            self._refuse(call, reason)
        window = kinds.window(kind, module)
        node = Node(name, kind, (below,), module, window, rectified=isinstance(module, nn.ConvReLU2d))
        new = self._new(call, node, view=kind == "flatten")
        if kind == "relu" and module.inplace:
            self._in_place(name, below, new)

    def _alias(self, index: int, name: str) -> None:
        if index >= 0:
            node = self.nodes[index]
            self.nodes[index] = replace(node, aliases=(*node.aliases, name))

    # Functions and methods

    def _call(self, call: fx.Node) -> None:
        function = function_name(call)
        if function in FUNCTIONS:
            self._function(call, function)
        elif function in ("view", "reshape"):
            self._view(call)
        elif function in ARITHMETIC:
            self._arithmetic(call, ARITHMETIC[function])
        elif function in ("cat", "concat", "concatenate"):
            self._concat(call)
        elif function in ("getitem", "unsqueeze"):
            self._channels(call, function)
        elif function == "mean":
            self._mean(call)
        elif function in kinds.COPIES:
            once = Arithmetic("mul", 1.0, self.root)
            node = Node(self._name(call), "affine", (self._map(call, call.args[0]),), once)
            self._new(call, node, view=function != "clone")
        elif function not in kinds.PASSIVE:
            self._refuse(call, kinds.reason(function))

    def _function(self, call: fx.Node, function: str) -> None:
        """By the module that does the same."""
        make, parameters, defaults = FUNCTIONS[function]
        options = {**defaults, **dict(zip(parameters, call.args[1:], strict=False)), **call.kwargs}
        value = call.args[0] if call.args else options.pop("input", None)
        unknown = sorted(set(options) - set(parameters) - set(defaults))
        computed = sorted(k for k, v in options.items() if _depends_on_the_image(v))
        if unknown or len(call.args) > len(parameters) + 1:
            self._refuse(call, f"its arguments {', '.join(unknown) or call.args[1:]} are not known")
        if computed:
            self._refuse(
                call,
                f"its {computed[0]} is computed from the image; write a number, or the adaptive pool to one size",
            )
        if options.pop("training", False):
            self._refuse(call, "it drops values even in evaluation mode; pass training=self.training")
        self._module(call, self._name(call), make(**options), (value,), {})

    def _view(self, call: fx.Node) -> None:
        """``x.view(x.size(0), -1)`` and its like."""
        below = self._map(call, call.args[0])
        given = [*call.args[1:], *call.kwargs.values()]
        shape = list(given[0]) if len(given) == 1 and isinstance(given[0], (tuple, list)) else given
        if len(shape) != 2 or not (_is_batch(shape[0]) or (shape[0] == -1 and isinstance(shape[1], int))):
            self._refuse(call, "only a flattening to (N, features) is known; use x.flatten(1)")
        if not isinstance(shape[1], int):
            self._refuse(call, "its features are computed from the image's size; use x.flatten(1)")
        if self._flat[below]:
            self._refuse(call, "its input is flattened already; leave it out")
        module = Features(shape[1])
        self._new(call, Node(self._name(call), "flatten", (below,), module), view=True)

    def _arithmetic(self, call: fx.Node, operation: str) -> None:
        values = list(call.args)
        if not any(isinstance(v, fx.Node) and v in self.of for v in call.all_input_nodes):
            return  # of sizes
        if len(values) != 2 or call.kwargs:
            self._refuse(call, "only its two operands are known, and no other arguments")
        maps = [isinstance(v, fx.Node) and v in self.of for v in values]
        if all(maps):
            if operation != "add":
                self._refuse(call, f"{operation} of two maps: only sums of maps have a rule on the way down")
            node = Node(self._name(call), "add", tuple(self._map(call, v) for v in values))
        else:
            below = self._map(call, values[0] if maps[0] else values[1])
            operand = self._constant(call, values[1] if maps[0] else values[0], self._flat[below])
            if not maps[0] and operation in ("sub", "div"):
                operation = f"r{operation}"
            if operation == "rdiv":
                self._refuse(call, "division by a map has no rule on the way down")
            node = Node(self._name(call), "affine", (below,), Arithmetic(operation, operand, self.root))
        new = self._new(call, node)
        if is_inplace(call, self.root):
            if not maps[0]:
                self._refuse(call, "it changes a constant in place")
            self._in_place(node.name, node.inputs[0], new)

    def _constant(self, call: fx.Node, value: Any, flat: bool) -> float | str:
        """A number, or the name of a tensor with one number for each channel."""
        if isinstance(value, (int, float)):
            return value
        if not isinstance(value, fx.Node) or value.op != "get_attr":
            self._refuse(call, f"its operand {_given(value)} is neither a map nor a constant")
        tensor = _attribute(self.root, str(value.target))
        after = 0 if flat else 2
        shape = tuple(tensor.shape)
        channelwise = len(shape) in (after + 1, after + 2) and shape[len(shape) - after :] == (1,) * after
        if tensor.numel() != 1 and not (channelwise and shape[: -after - 1] in ((), (1,))):
            self._refuse(
                call, f"its operand {value.target} has shape {shape}; only one number for each channel is known"
            )
        return str(value.target)

    def _concat(self, call: fx.Node) -> None:
        options = {**dict(zip(("tensors", "dim"), call.args, strict=False)), **call.kwargs}
        tensors = options.pop("tensors")
        below = tuple(self._map(call, v) for v in (tensors if isinstance(tensors, (list, tuple)) else [tensors]))
        dim = options.pop("dim", 0)
        if options:
            self._refuse(call, f"its arguments {', '.join(options)} are not known")
        if dim not in (1, -1 if self._flat[below[0]] else -3):
            self._refuse(call, f"it concatenates along dimension {dim}; only channels (dim=1) are known")
        self._new(call, Node(self._name(call), "concat", below))

    def _channels(self, call: fx.Node, function: str) -> None:
        """``x[:, a:b]``, ``x[:, [2, 1, 0]]`` and ``x[:, a].unsqueeze(1)``."""
        chosen: Any = None
        if function == "getitem":
            value, index = call.args[:2]
            if value not in self.of:
                return  # of a shape
            if isinstance(index, tuple) and len(index) > 1 and all(i == slice(None) for i in (index[0], *index[2:])):
                chosen = index[1]
            if isinstance(chosen, int) and all(_is_unsqueeze(user) for user in call.users):
                return  # with its unsqueeze(1)
        else:
            getitem: Any = call.args[0]
            if function_name(getitem) != "getitem" or getitem in self.of or getitem.args[0] not in self.of:
                self._refuse(call, kinds.reason(function))
            value, chosen = getitem.args[0], [getitem.args[1][1]]
        if not isinstance(chosen, (slice, list)) or _depends_on_the_image(chosen):
            self._refuse(call, "only a choice of channels is known: x[:, a:b] or x[:, [a, b]]")
        below = self._map(call, value)
        self._new(call, Node(self._name(call), "channels", (below,), Channels(chosen)), view=True)

    def _mean(self, call: fx.Node) -> None:
        """Of height and width: an average pool to one pixel, flattened unless ``keepdim``."""
        options = {**dict(zip(("input", "dim", "keepdim"), call.args, strict=False)), **call.kwargs}
        below, dims = self._map(call, options["input"]), options.get("dim")
        if (
            not isinstance(dims, (list, tuple))
            or {d % 4 for d in dims} != {2, 3}
            or set(options) > {"input", "dim", "keepdim"}
        ):
            self._refuse(call, "only the mean over height and width (dim=(2, 3)) is known")
        new = self._new(call, Node(self._name(call), "average", (below,), _T.AdaptiveAvgPool2d(1)))
        if not options.get("keepdim"):
            self._new(call, Node(self._name(call), "flatten", (new,), Features(-1)))

    def _output(self, call: fx.Node) -> None:
        value = call.args[0]
        if not isinstance(value, fx.Node):
            self._refuse(call, f"it is a {type(value).__name__}; the model must return one tensor")
        self.result = self._map(call, value)


def _given(value: Any) -> str:
    second = isinstance(value, fx.Node) and value.op == "placeholder"
    return f"{value} (the model must take images, and nothing else)" if second else str(value)


def _depends_on_the_image(value: Any) -> bool:
    found: list[fx.Node] = []
    fx.map_arg(value, lambda node: found.append(node))
    return bool(found)


def _is_unsqueeze(call: fx.Node) -> bool:
    return function_name(call) == "unsqueeze" and [*call.args[1:], *call.kwargs.values()] == [1]


def _is_batch(value: Any) -> bool:
    """``x.size(0)`` or ``x.shape[0]``."""
    if not isinstance(value, fx.Node):
        return False
    if function_name(value) == "size":
        return [*value.args[1:], *value.kwargs.values()] == [0]
    if function_name(value) != "getitem" or value.args[1] != 0 or not isinstance(value.args[0], fx.Node):
        return False
    shape = value.args[0]
    return (function_name(shape) == "size" and len(shape.args) == 1) or shape.args[1:] == ("shape",)


def _attribute(root: Any, path: str) -> Any:
    for part in path.split("."):
        root = getattr(root, part)
    return root


# ------------------------------------------------------------------ nodes that belong together


def _needed(nodes: Sequence[Node], result: int) -> tuple[list[Node], list[int]]:
    """The nodes that the result depends on, and how often each one's output is used."""
    uses: Counter[int] = Counter({result: 1} if result >= 0 else {})
    for i in range(len(nodes) - 1, -1, -1):
        if uses[i]:
            uses.update(nodes[i].inputs)
    kept = [i for i in range(len(nodes)) if uses[i]]
    number = {-1: -1} | {old: new for new, old in enumerate(kept)}
    renumbered = [replace(nodes[i], inputs=tuple(number[j] for j in nodes[i].inputs)) for i in kept]
    return renumbered, [uses[i] for i in kept]


def _joined(nodes: Iterable[Node], uses: Sequence[int]) -> list[Node]:
    """Batch normalisation and ReLU joined to the convolution or linear layer that only they see."""
    out: list[Node] = []
    used: list[int] = []
    place = {-1: -1}
    for i, node in enumerate(nodes):
        node = replace(node, inputs=tuple(place[j] for j in node.inputs))
        below = node.inputs[0]
        joined = _join(out[below], node) if below >= 0 and used[below] == 1 else None
        if joined is not None:
            out[below], used[below], place[i] = joined, uses[i], below
        else:
            out.append(node)
            used.append(uses[i])
            place[i] = len(out) - 1
    return out


def _join(below: Node, node: Node) -> Node | None:
    if below.kind not in ("conv", "linear") or below.rectified:
        return None
    aliases = (*below.aliases, node.name, *node.aliases)
    if node.kind == "relu":
        return replace(below, aliases=aliases, rectified=True)
    if node.kind == "affine" and not isinstance(node.module, Arithmetic) and below.folded is None:
        return replace(below, aliases=aliases, folded=node.module)
    return None
