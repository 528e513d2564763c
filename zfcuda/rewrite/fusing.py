"""Convolutions of a forward() that take the ReLU, and perhaps max-pool and normalisation, behind them."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from zfcuda import nn, ops
from zfcuda.deconv.recording import function_name, is_inplace
from zfcuda.rewrite.layers import (
    function_counterpart,
    is_relu,
    local_response_norm,
    max_pool,
    module_of,
    objection,
)
from zfcuda.rewrite.report import Left, Replaced, public_name

__all__ = ["fuse"]


def fuse(root: torch.nn.Module, graph: fx.Graph) -> list[Replaced | Left]:
    """Change ``graph``, the forward() of ``root``, in place, and say what was changed and what was not."""
    entries: list[Replaced | Left] = []
    for call in list(graph.nodes):
        conv = module_of(root, call)
        if isinstance(conv, torch.nn.Conv2d):
            entries += _convolution(root, graph, call, conv)
    for call in list(graph.nodes):
        function = function_counterpart(root, call)
        if function is not None:
            entries.append(Replaced(_name(call), function_name(call), public_name(function)))
            call.target = function
            call.kwargs = {name: value for name, value in call.kwargs.items() if name != "return_indices"}
    return entries


def _convolution(root: torch.nn.Module, graph: fx.Graph, call: fx.Node, conv: Any) -> list[Replaced | Left]:
    """What became of a convolution. One of ours, which has its ReLU, needs no mention where no pool follows."""
    ours = type(conv).__module__ == nn.__name__
    reason = objection(conv, nn.ConvReLU2d if ours else torch.nn.Conv2d)
    found = reason or (None if ours else _relu_behind(root, call))
    if isinstance(found, str):
        return [] if ours else [Left(str(call.target), type(conv).__name__, found)]
    joined = [found] if found else []
    pool, norm = _layers_behind(root, call, joined)
    if ours and pool is None:
        return []
    function, result = _fused(graph, call, conv, pool, norm)
    for node in (call, *joined):
        node.replace_all_uses_with(result)
    for node in (*reversed(joined), call):
        graph.erase_node(node)
    return [Replaced(str(call.target), type(conv).__name__, public_name(function), tuple(map(_name, joined)))]


def _relu_behind(root: torch.nn.Module, conv: fx.Node) -> fx.Node | str:
    """The ReLU that alone sees the result of a convolution; or why there is none."""
    order = {node: i for i, node in enumerate(conv.graph.nodes)}
    users = sorted(conv.users, key=order.__getitem__)
    if not users:
        return "its output is not used"
    relu = next((user for user in users if is_relu(root, user)), None)
    if relu is None:
        return f"{_what(root, users[0])} follows it, not a ReLU"
    # In place, all later users see what the ReLU leaves.
    if len(users) > 1 and not (relu is users[0] and is_inplace(relu, root)):
        other = next(user for user in users if user is not relu)
        return f"{_what(root, other)} uses its output before the ReLU"
    return relu


def _layers_behind(root: torch.nn.Module, conv: fx.Node, joined: list[fx.Node]) -> tuple[Any, Any]:
    """The pool that alone sees the rectified maps, and the normalisation that alone sees the pool's, or None.

    ``joined`` has the ReLU, if it is a call by itself, and gets theirs.
    """
    layers: list[Any] = [None, None]
    users = {user for node in (conv, *joined) for user in node.users} - {*joined}
    for i, layer in enumerate((max_pool, local_response_norm)):
        if len(users) != 1:
            break
        (node,) = users
        layers[i] = layer(root, node)
        if layers[i] is None:
            break
        joined.append(node)
        users = {*node.users}
    return layers[0], layers[1]


def _what(root: torch.nn.Module, call: fx.Node) -> str:
    """A call, as a reason mentions it."""
    if call.op == "output":
        return "the end of the forward()"
    module = module_of(root, call)
    if module is None:
        return f"{function_name(call)}()"
    reason = objection(module, torch.nn.ReLU) if isinstance(module, torch.nn.ReLU) else None
    return type(module).__name__ + (f" ({reason})" if reason else "")


def _name(call: fx.Node) -> str:
    return str(call.target) if call.op == "call_module" else f"{function_name(call)}()"


def _fused(graph: fx.Graph, call: fx.Node, conv: Any, pool: Any, norm: Any) -> tuple[Any, fx.Node]:
    """The function that does it all, and its result in the place of the convolution's.

    The parameters are read from the module each time.
    """
    options = _arguments(conv, "", "stride", "padding", "dilation", "groups")
    function: Any = ops.conv2d_relu
    if pool is not None:
        function = ops.conv2d_relu_max_pool2d
        options |= _arguments(pool, "pool_", "kernel_size", "stride", "padding", "dilation", "ceil_mode")
    if norm is not None:
        function = ops.conv2d_relu_max_pool2d_norm
        options |= _arguments(norm, "norm_", "size", "alpha", "beta", "k")
    with graph.inserting_before(call):
        (input,) = call.all_input_nodes
        weight = graph.get_attr(f"{call.target}.weight")
        bias = None if conv.bias is None else graph.get_attr(f"{call.target}.bias")
        result = graph.call_function(function, (input, weight, bias), options)
        return function, result if pool is None else graph.call_function(operator.getitem, (result, 0))


def _arguments(module: Any, prefix: str, *names: str) -> dict[str, Any]:
    return {prefix + name: getattr(module, name) for name in names}
