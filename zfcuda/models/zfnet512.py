"""``zfnet512`` of the ONNX model zoo: a public, trained relative of the paper's network, and its file.

Normalisation stands before the pools, as in Krizhevsky et al. (2012); layers 3 to 5 have 512 maps each, layer 7 has
1024 units, and nothing is padded in layers 1 and 2::

    conv 7x7 s2 (96) · ReLU · LRN · pool 3/2 · conv 5x5 s2 (256) · ReLU · LRN · pool 3/2
    conv 3x3 p1 (512) · ReLU, three times · pool 2/2 · fc 4096 · ReLU · fc 1024 · ReLU · fc 1000
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zfcuda import nn
from zfcuda.models.weights import load_weights
from zfcuda.models.zfnet import Conv, Full, Table, ZFNet, build

__all__ = ["read_onnx", "zfnet512"]

ZFNET512: Table = {
    1: Conv(96, kernel=7, stride=2, pool=3, norm=True),
    2: Conv(256, kernel=5, stride=2, pool=3, norm=True),
    3: Conv(512, kernel=3, padding=1),
    4: Conv(512, kernel=3, padding=1),
    5: Conv(512, kernel=3, padding=1, pool=2),
    6: Full(4096),
    7: Full(1024),
}


def zfnet512(
    weights: str | os.PathLike[str] | None = None,
    *,
    num_classes: int = 1000,
    dropout: float = 0.5,
    input_size: int | tuple[int, int] = 224,
) -> ZFNet:
    """The model zoo's ``zfnet512``, with fresh weights or those of a file.

    From 3x224x224: maps of 109, 54 (pool1), 25, 12 (pool2), 12, 12, 12 and 6 (pool5) pixels; 87 250 536 parameters.

    Parameters
    ----------
    weights : path, optional
        The zoo's ``.onnx`` file, or anything else that `load_weights` reads. Default: drawn from N(0, 0.01²),
        biases 0.
    num_classes : int
        Outputs of the last layer; the zoo's file has 1000.
    dropout : float
        Probability of dropout in layers 6 and 7, for training on; the zoo's file has none.
    input_size : int or (int, int)
        Height and width of the images; the zoo's file has 224.

    Returns
    -------
    ZFNet
        Takes (N, 3, height, width), returns logits (N, num_classes); the file's softmax is left out.

    Raises
    ------
    FileNotFoundError, RuntimeError, ModuleNotFoundError
        As `load_weights`.
    """
    net = build(ZFNET512, num_classes, "before", dropout, 3, input_size, ceil_mode=False)
    if weights is not None:
        load_weights(net, weights)
    return net


class _Op(NamedTuple):
    """A node that the graph must have: its type, the attributes that matter, and the parameters it takes by name."""

    type: str
    attributes: dict[str, Any]
    parameters: Mapping[str, str] = MappingProxyType({})  # name in the file: name in the network


#: What an attribute means where a node does not write it.
DEFAULTS: dict[str, dict[str, Any]] = {
    "Conv": {"auto_pad": "NOTSET", "dilations": (1, 1), "group": 1, "pads": (0, 0, 0, 0), "strides": (1, 1)},
    "MaxPool": {
        "auto_pad": "NOTSET",
        "ceil_mode": 0,
        "dilations": (1, 1),
        "pads": (0, 0, 0, 0),
        "storage_order": 0,
        "strides": (1, 1),
    },
    "LRN": {"alpha": 1e-4, "beta": 0.75, "bias": 1.0},
    "Gemm": {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0},
}
CONSTANTS = ("Constant", "ConstantFill", "ConstantOfShape", "GivenTensorFill")


def read_onnx(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The weights of the model zoo's ``zfnet512`` file, by the names of `zfnet512`.

    The file's graph must be this network: the same operators in the same order, with the same attributes, each
    taking the weights of its name (``gpu_0/conv1_w_0``, …). Any other is refused rather than read wrongly.

    Raises
    ------
    ModuleNotFoundError
        Without the package ``onnx``.
    RuntimeError
        For a file that is not ONNX, or not this network; the message names the node and the reason.
    """
    model = _load(path)
    graph = model.graph
    made = {output: node.op_type for node in graph.node if node.op_type in CONSTANTS for output in node.output}
    nodes = [node for node in graph.node if node.op_type not in CONSTANTS]
    with torch.device("meta"):
        expected = list(_expected(build(ZFNET512, 1000, "before", 0.5, 3, 224, ceil_mode=False)))
    _check_order(path, nodes, expected)
    stored = {tensor.name: tensor for tensor in graph.initializer}
    state: dict[str, Tensor] = {}
    for node, op in zip(nodes, expected, strict=True):
        _check_attributes(path, node, op)
        if list(node.input[1 : 1 + len(op.parameters)]) != list(op.parameters):
            raise _refusal(path, node, f"it takes {list(node.input[1:])}; expected {list(op.parameters)}")
        for theirs, ours in op.parameters.items():
            if theirs not in stored:
                how = f"made by {made[theirs]}, a constant" if theirs in made else "missing"
                raise _refusal(
                    path, node, f"its weights {theirs} are {how}: this file has no trained weights, get the model zoo's"
                )
            state[ours] = _tensor(path, stored[theirs])
    return state


def _load(path: str | os.PathLike[str]) -> Any:
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{os.fspath(path)}: ONNX files are read by the package onnx, which is not installed: "
            "pip install 'zfcuda[onnx]'"
        ) from error
    from google.protobuf.message import DecodeError

    try:
        return onnx.load(path)
    except DecodeError:
        raise RuntimeError(f"{os.fspath(path)} is not an ONNX file, or is incomplete; fetch it again") from None


def _expected(net: ZFNet) -> Iterator[_Op]:
    """The nodes that the network is made of, from its own modules, so that the two cannot differ."""
    for name, module in net.named_children():
        parameters = {f"gpu_0/{name}_{p[0]}_0": f"{name}.{p}" for p, _ in module.named_parameters(recurse=False)}
        if isinstance(module, nn.ConvReLU2d):
            window = {
                "kernel_shape": module.kernel_size,
                "strides": module.stride,
                "pads": module.padding * 2,
                "dilations": module.dilation,
                "group": module.groups,
            }
            yield _Op("Conv", window, parameters)
            yield _Op("Relu", {})
        elif isinstance(module, nn.MaxPool2d):
            yield _Op("MaxPool", {"kernel_shape": (module.kernel_size,) * 2, "strides": (module.stride,) * 2})
        elif isinstance(module, nn.LocalResponseNorm):
            constants = {"size": module.size, "alpha": module.alpha, "beta": module.beta, "bias": module.k}
            yield _Op("LRN", constants)
        elif isinstance(module, torch.nn.Flatten):
            yield _Op("Reshape", {})
        elif isinstance(module, torch.nn.Linear):
            yield _Op("Gemm", {"transB": 1}, parameters)
        elif isinstance(module, torch.nn.ReLU):
            yield _Op("Relu", {})
    yield _Op("Softmax", {})


def _check_order(path: str | os.PathLike[str], nodes: list[Any], expected: list[_Op]) -> None:
    """The operators, one after the other, each on the output of the one before."""
    for i, (node, op) in enumerate(zip(nodes, expected, strict=False)):
        if node.op_type != op.type:
            raise _refusal(path, node, f"node {i + 1} is {node.op_type}; expected {op.type}")
        if i > 0 and node.input[0] != nodes[i - 1].output[0]:
            raise _refusal(path, node, f"it takes {node.input[0]}, not the output of the node before it")
    if len(nodes) != len(expected):
        raise RuntimeError(
            f"{os.fspath(path)} is not the model zoo's zfnet512: {len(nodes)} nodes; expected {len(expected)}"
        )


def _check_attributes(path: str | os.PathLike[str], node: Any, op: _Op) -> None:
    from onnx import helper

    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    for name, wanted in {**DEFAULTS.get(op.type, {}), **op.attributes}.items():
        value = given.get(name, DEFAULTS.get(op.type, {}).get(name))
        if not _same(value, wanted):
            raise _refusal(path, node, f"its {name} is {value}; expected {wanted}")


def _same(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, float):  # stored in single precision
        return isinstance(value, (int, float)) and abs(value - wanted) <= 1e-6 * abs(wanted)
    if isinstance(wanted, tuple):
        return isinstance(value, (list, tuple)) and tuple(value) == wanted
    return (value.decode() if isinstance(value, bytes) else value) == wanted


def _tensor(path: str | os.PathLike[str], stored: Any) -> Tensor:
    from onnx import numpy_helper

    array = numpy_helper.to_array(stored)
    if array.dtype.kind != "f":
        raise RuntimeError(f"{os.fspath(path)}: {stored.name} is {array.dtype}; expected floating point")
    return torch.from_numpy(array.copy())


def _refusal(path: str | os.PathLike[str], node: Any, reason: str) -> RuntimeError:
    where = f"{node.op_type} node {node.name or ', '.join(node.output)}"
    return RuntimeError(f"{os.fspath(path)} is not the model zoo's zfnet512: {where}: {reason}")
