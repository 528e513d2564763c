"""A model's forward() as a list of nodes, or a clear refusal.

Three steps: `torch.fx` records which modules and functions the forward() calls; each call becomes a node; nodes that
belong together are joined. Whatever is not known is refused by name, with the reason, rather than projected wrongly.
"""

from __future__ import annotations

import inspect
import operator
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import fx

from zfcuda import nn
from zfcuda.deconv.node import Arithmetic, Channels, Features, Node
from zfcuda.deconv.receptive_field import Window

__all__ = ["lower"]

_T = torch.nn

#: Modules by what they are to the deconvnet. "alias": nothing to do in evaluation mode.
KINDS: dict[Any, str] = {
    nn.ConvReLU2d: "conv",
    _T.Conv2d: "conv",
    _T.Linear: "linear",
    _T.ReLU: "relu",
    nn.MaxPool2d: "pool",
    _T.MaxPool2d: "pool",
    _T.AdaptiveMaxPool2d: "adaptive_pool",
    _T.AvgPool2d: "average",
    _T.AdaptiveAvgPool2d: "average",
    nn.LocalResponseNorm: "norm",
    _T.LocalResponseNorm: "norm",
    _T.BatchNorm1d: "affine",
    _T.BatchNorm2d: "affine",
    _T.SyncBatchNorm: "affine",
    _T.Flatten: "flatten",
    **dict.fromkeys(
        (_T.Identity, _T.Dropout, _T.Dropout1d, _T.Dropout2d, _T.Dropout3d, _T.AlphaDropout, _T.FeatureAlphaDropout),
        "alias",
    ),
}

#: Functions and methods that do what a module does: the module, the names of the arguments after the input, defaults.
FUNCTIONS: dict[str, tuple[Any, tuple[str, ...], dict[str, Any]]] = {
    "relu": (_T.ReLU, ("inplace",), {}),
    "relu_": (_T.ReLU, (), {"inplace": True}),
    "max_pool2d": (
        _T.MaxPool2d,
        ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
        {},
    ),
    "avg_pool2d": (
        _T.AvgPool2d,
        ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
        {},
    ),
    "adaptive_max_pool2d": (_T.AdaptiveMaxPool2d, ("output_size", "return_indices"), {}),
    "adaptive_avg_pool2d": (_T.AdaptiveAvgPool2d, ("output_size",), {}),
    "local_response_norm": (_T.LocalResponseNorm, ("size", "alpha", "beta", "k"), {}),
    "flatten": (_T.Flatten, ("start_dim", "end_dim"), {"start_dim": 0}),
    "dropout": (_T.Dropout, ("p", "training", "inplace"), {"training": True}),
    "dropout2d": (_T.Dropout2d, ("p", "training", "inplace"), {"training": True}),
    "alpha_dropout": (_T.AlphaDropout, ("p", "training", "inplace"), {"training": False}),
}

#: Why, by the names of functions and of modules, in lower case and without underscores.
REASONS: tuple[tuple[str, str], ...] = (
    (
        "softmax softmax2d logsoftmax softmin",
        "probabilities are not projected; leave it out and project the logits",
    ),
    (
        "celu elu gelu glu hardsigmoid hardswish hardtanh leakyrelu logsigmoid mish prelu relu6 rrelu selu sigmoid "
        "silu softplus softsign tanh threshold clamp clip clampmin",
        "the paper's gates are defined for ReLU only",
    ),
    (
        "groupnorm layernorm instancenorm1d instancenorm2d instancenorm",
        "its divisor comes from the image itself, so it is neither an affine map, as batch normalisation is in "
        "evaluation mode, nor the contrast normalisation that the paper skips",
    ),
    (
        "squeeze unsqueeze permute transpose movedim",
        "it moves dimensions, and maps must stay (N, C, H, W) until they are flattened; use x.flatten(1) before linear "
        "layers",
    ),
    (
        "lppool2d fractionalmaxpool2d",
        "only max-pools with a regular grid have switches to unpool by; replace it by MaxPool2d",
    ),
    ("conv2d linear batchnorm", "its parameters belong to no module; use the module of torch.nn instead"),
)
UNKNOWN = (
    "it is none of the supported layers: "
    + ", ".join(sorted({c.__name__ for c in KINDS}))
    + (", sums, torch.cat, and products with constants")
)

#: Calls whose results are numbers or nothing, not maps; whoever takes them for maps is refused.
PASSIVE = frozenset({"size", "getattr", "dim", "_assert", "_assert_is_none"})

ARITHMETIC = {
    **dict.fromkeys(("add", "iadd", "add_"), "add"),
    **dict.fromkeys(("sub", "isub", "sub_", "subtract"), "sub"),
    **dict.fromkeys(("mul", "imul", "mul_", "multiply"), "mul"),
    **dict.fromkeys(("truediv", "itruediv", "div", "div_", "divide"), "div"),
}


def lower(model: torch.nn.Module) -> list[Node]:
    """The nodes of ``model`` in the order in which they run; the last one is its output."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    # A layer by itself is a chain of one: fx would look into its forward().
    root = _T.Sequential(OrderedDict({type(model).__name__: model})) if _is_layer(model) else model
    tracer = _Tracer()
    with _evaluation(model):
        recorded = _record(tracer, root)
    lowering = _Lowering(root, tracer)
    for node in _live(recorded, root):
        lowering.add(node)
    nodes = _joined(*_needed(lowering.nodes, lowering.result))
    if not nodes:
        raise TypeError(f"model is a {type(model).__name__} without layers; there is nothing to project")
    return nodes


def _refuse(name: str, what: str, reason: str, cause: BaseException | None = None) -> NoReturn:
    raise TypeError(f"DeconvNet cannot go back through {name} ({what}): {reason}") from cause


def _is_layer(module: torch.nn.Module) -> bool:
    return isinstance(module, tuple(KINDS))


# ------------------------------------------------------------------ recording


class _Tracer(fx.Tracer):
    """Keeps where each call stands: for a module how often it was called before, else the module around it."""

    def __init__(self) -> None:
        super().__init__()
        self.around: dict[fx.Node, str] = {}
        self.use: dict[fx.Node, int] = {}
        self.failed: tuple[str, str] | None = None
        self._path = ""
        self._uses: Counter[str] = Counter()

    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        return _is_layer(m) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: torch.nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        outer, self._path = self._path, self.path_of_module(m)
        try:
            return super().call_module(m, forward, args, kwargs)
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


def _record(tracer: _Tracer, root: torch.nn.Module) -> fx.Graph:
    parameters = list(inspect.signature(root.forward).parameters.values())[1:]
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    try:
        return tracer.trace(root, defaults or None)
    except Exception as error:
        name, what = tracer.failed or (type(root).__name__, "the model")
        reason = str(error).strip().rstrip(".").split("\n")[0]
        _refuse(
            name,
            what,
            f"torch.fx cannot follow its forward(): {reason}. What a forward() does must not depend on the values in "
            "the image or on its size; write such a part as torch.nn.Sequential",
            error,
        )


def _live(graph: fx.Graph, root: torch.nn.Module) -> list[fx.Node]:
    """The calls that matter to the output, in order."""
    live: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op in ("placeholder", "output") or _is_inplace(node, root) or live.intersection(node.users):
            live.add(node)
    return [node for node in graph.nodes if node in live]


def _is_inplace(node: fx.Node, root: torch.nn.Module) -> bool:
    if node.op == "call_module":
        return bool(getattr(root.get_submodule(str(node.target)), "inplace", False))
    function = _function(node)
    return (
        (function.endswith("_") and not function.endswith("__"))
        or (function.startswith("i") and hasattr(operator, f"__{function}__") and node.target is not operator.index)
        or function == "setitem"
        or bool(node.kwargs.get("inplace"))
        or (function == "relu" and node.args[1:] == (True,))
        or "out" in node.kwargs
    )


def _function(node: fx.Node) -> str:
    """The name of a function or a method."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


# ------------------------------------------------------------------ one call, one node


class _Lowering:
    """Calls become nodes, one by one; ``of`` tells which node's output each call's result is now."""

    def __init__(self, root: torch.nn.Module, tracer: _Tracer) -> None:
        self.root, self.tracer = root, tracer
        self.nodes: list[Node] = []
        self.result = -1
        self.of: dict[fx.Node, int] = {}
        self._flat: dict[int, bool] = {-1: False}
        # In place: tensors that share memory have one owner; views of a changed one are stale.
        self._owner: dict[int, int] = {-1: -1}
        self._stale: dict[int, str] = {}
        self._registered: dict[Any, list[str]] = {}
        for name, module in root.named_modules(remove_duplicate=False):
            self._registered.setdefault(module, []).append(name)
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

    # Names

    def _name(self, call: fx.Node) -> str:
        if call.op == "call_module":
            names = self._registered[self.root.get_submodule(str(call.target))]
            use = self.tracer.use[call]
            if use < len(names):
                return names[use]
            base = names[0]
        else:
            around, function = self.tracer.around[call], ARITHMETIC.get(_function(call), _function(call)).strip("_")
            base = f"{around}.{function}" if around else function
            if base not in self._taken:
                self._taken.add(base)
                return base
        number = 1
        while f"{base}_{number}" in self._taken:
            number += 1
        self._taken.add(f"{base}_{number}")
        return f"{base}_{number}"

    def _refuse(self, call: fx.Node, reason: str) -> NoReturn:
        what = type(self.root.get_submodule(str(call.target))).__name__ if call.op == "call_module" else _function(call)
        if call.op == "output":
            what = "the output"
        name = self._name(call) if call.op != "output" else type(self.root).__name__
        _refuse(name, what, reason)

    # Maps

    def _map(self, call: fx.Node, value: Any) -> int:
        """The node of a call's argument."""
        if not isinstance(value, fx.Node) or value not in self.of:
            given = f"the second argument {value}" if getattr(value, "op", "") == "placeholder" else f"{value}"
            self._refuse(call, f"its input is {given}, which is not a map of the one image that the model takes")
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
            self._refuse(call, _reason(type(module).__name__, module))
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
        for reason in _objections(kind, module):
            self._refuse(call, reason)
        window = _window(kind, module)
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
        function = _function(call)
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
        elif function not in PASSIVE:
            self._refuse(call, _reason(function))

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
        function = _function(call)
        if function.startswith("i") or function.endswith("_"):
            if not maps[0]:
                self._refuse(call, "it changes a constant in place")
            self._in_place(node.name, node.inputs[0], new)

    def _constant(self, call: fx.Node, value: Any, flat: bool) -> float | str:
        """A number, or the name of a tensor with one number for each channel."""
        if isinstance(value, (int, float)):
            return value
        if not isinstance(value, fx.Node) or value.op != "get_attr":
            self._refuse(call, f"its operand {value} is neither a map nor a constant")
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
        tensors = options["tensors"]
        below = tuple(self._map(call, v) for v in (tensors if isinstance(tensors, (list, tuple)) else [tensors]))
        dim = options.get("dim", options.get("axis", 0))
        if dim not in (1, -1 if self._flat[below[0]] else -3):
            self._refuse(call, f"it concatenates along dimension {dim}; only channels (dim=1) are known")
        self._new(call, Node(self._name(call), "concat", below))

    def _channels(self, call: fx.Node, function: str) -> None:
        """``x[:, a:b]``, ``x[:, [2, 1, 0]]`` and ``x[:, a].unsqueeze(1)``."""
        if function == "getitem" and call.args[0] not in self.of:
            return  # of a shape
        if function == "getitem":
            value, index = call.args[0], call.args[1]
            whole = (
                isinstance(index, tuple) and len(index) > 1 and all(i == slice(None) for i in (index[0], *index[2:]))
            )
            chosen: Any = index[1] if isinstance(index, tuple) and whole else None
            if isinstance(chosen, int) and all(
                _function(u) == "unsqueeze" and [*u.args[1:], *u.kwargs.values()] == [1] for u in call.users
            ):
                return  # with its unsqueeze(1)
        else:
            getitem = call.args[0]
            known = isinstance(getitem, fx.Node) and _function(getitem) == "getitem" and getitem.args[0] in self.of
            if not known:
                self._refuse(call, _reason(function))
            assert isinstance(getitem, fx.Node)
            value, chosen = getitem.args[0], [getitem.args[1][1]]  # type: ignore[index]
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


def _reason(name: str, module: torch.nn.Module | None = None) -> str:
    plain = name.lower().replace("_", "")
    for names, reason in REASONS:
        if plain in names.split():
            return reason
    if isinstance(module, _T.modules.batchnorm._NormBase):
        return "only batch normalisation of maps (BatchNorm2d) and of flattened features (BatchNorm1d) is known"
    return UNKNOWN


def _depends_on_the_image(value: Any) -> bool:
    found: list[fx.Node] = []
    fx.map_arg(value, lambda node: found.append(node))
    return bool(found)


def _is_batch(value: Any) -> bool:
    """``x.size(0)`` or ``x.shape[0]``."""
    if not isinstance(value, fx.Node):
        return False
    if _function(value) == "size":
        return [*value.args[1:], *value.kwargs.values()] == [0]
    if _function(value) != "getitem" or value.args[1] != 0 or not isinstance(value.args[0], fx.Node):
        return False
    shape = value.args[0]
    return (_function(shape) == "size" and len(shape.args) == 1) or shape.args[1:] == ("shape",)


def _attribute(root: Any, path: str) -> Any:
    for part in path.split("."):
        root = getattr(root, part)
    return root


def _objections(kind: str, module: Any) -> Iterator[str]:
    """Why this one cannot be projected through, although its kind can."""
    for option in ("return_indices", "return_switches"):
        if getattr(module, option, False):
            yield f"{option}=True makes it return two tensors; the deconvnet keeps its own"
    if kind == "flatten" and (module.start_dim, module.end_dim) not in ((1, -1), (1, 3)):
        yield "it must flatten everything but the batch (start_dim=1, end_dim=-1)"
    if kind == "affine" and module.running_mean is None:
        yield (
            "without running statistics it takes the batch's own even in evaluation mode, and is no affine map; "
            "use track_running_stats=True"
        )
    if kind == "conv" and module.padding_mode != "zeros":
        yield f"padding_mode={module.padding_mode!r} has no transposed convolution; use 'zeros'"
    if kind == "conv" and module.padding == "same" and any(t % 2 for t in _same_padding(module)):
        yield "padding='same' with an even kernel pads one side more; pad explicitly"


def _window(kind: str, module: Any) -> Window | None:
    if kind == "conv":
        padding = module.padding
        if padding in ("valid", "same"):
            padding = 0 if padding == "valid" else [t // 2 for t in _same_padding(module)]
        return Window(_pair(module.kernel_size), _pair(module.stride), _pair(padding), _pair(module.dilation))
    if kind == "pool" or isinstance(module, _T.AvgPool2d):
        stride = module.kernel_size if module.stride is None else module.stride
        dilation = getattr(module, "dilation", 1)
        return Window(
            _pair(module.kernel_size), _pair(stride), _pair(module.padding), _pair(dilation), module.ceil_mode
        )
    return None


def _same_padding(conv: Any) -> list[int]:
    """Rows and columns that ``padding="same"`` adds in all."""
    return [d * (k - 1) for k, d in zip(_pair(conv.kernel_size), _pair(conv.dilation), strict=True)]


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


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
