"""Convolutions of a forward() that take the ReLU, and perhaps the max-pool, behind them."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from zfcuda import nn, ops
from zfcuda.deconv.recording import function_name, is_inplace
from zfcuda.rewrite.layers import function_counterpart, is_relu, max_pool, module_of, objection
from zfcuda.rewrite.report import Left, Replaced, public_name

__all__ = ["fuse"]


def fuse(root: torch.nn.Module, graph: fx.Graph) -> list[Replaced | Left]:
    """Change ``graph``, the forward() of ``root``, in place, and say what was changed and what was not."""
    entries: list[Replaced | Left] = []
    for call in list(graph.nodes):
        conv = module_of(root, call)
        if isinstance(conv, torch.nn.Conv2d) and type(conv).__module__ != nn.__name__:
            entries.append(_convolution(root, graph, call, conv))
    for call in list(graph.nodes):
        function = function_counterpart(root, call)
        if function is not None:
            entries.append(Replaced(_name(call), function_name(call), public_name(function)))
            call.target = function
            call.kwargs = {name: value for name, value in call.kwargs.items() if name != "return_indices"}
    return entries


def _convolution(root: torch.nn.Module, graph: fx.Graph, call: fx.Node, conv: Any) -> Replaced | Left:
    reason = objection(conv, torch.nn.Conv2d)
    behind = _behind(root, call) if reason is None else reason
    if isinstance(behind, str):
        return Left(str(call.target), type(conv).__name__, behind)
    pool = max_pool(root, behind[-1])
    function, result = _fused(graph, call, conv, pool)
    for node in (call, *behind):
        node.replace_all_uses_with(result)
    for node in (*reversed(behind), call):
        graph.erase_node(node)
    return Replaced(str(call.target), type(conv).__name__, public_name(function), tuple(map(_name, behind)))


def _behind(root: torch.nn.Module, conv: fx.Node) -> list[fx.Node] | str:
    """The ReLU, and perhaps the pool, that alone see the result of a convolution; or why there is none."""
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
    after = {*relu.users, *users} - {relu}
    pools = [node for node in after if len(after) == 1 and max_pool(root, node) is not None]
    return [relu, *pools]


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


def _fused(graph: fx.Graph, call: fx.Node, conv: Any, pool: Any) -> tuple[Any, fx.Node]:
    """The function that does it all, and its result in the place of the convolution's.

    The parameters are read from the module each time.
    """
    slide: dict[str, Any] = {name: getattr(conv, name) for name in ("stride", "padding", "dilation", "groups")}
    if pool is not None:
        names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
        slide.update({f"pool_{name}": getattr(pool, name) for name in names})
    with graph.inserting_before(call):
        (input,) = call.all_input_nodes
        weight = graph.get_attr(f"{call.target}.weight")
        bias = None if conv.bias is None else graph.get_attr(f"{call.target}.bias")
        if pool is None:
            return ops.conv2d_relu, graph.call_function(ops.conv2d_relu, (input, weight, bias), slide)
        pair = graph.call_function(ops.conv2d_relu_max_pool2d, (input, weight, bias), slide)
        return ops.conv2d_relu_max_pool2d, graph.call_function(operator.getitem, (pair, 0))
