"""A chain of torch's modules as an ONNX model, each module as ONNX's operator of the same name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn, no_grad

KNOWN = (nn.Conv2d, nn.ReLU, nn.MaxPool2d, nn.LocalResponseNorm, nn.Flatten, nn.Linear, nn.Dropout)


def is_chain(module: nn.Module) -> bool:
    """Whether :func:`to_onnx` can write it."""
    return isinstance(module, nn.Sequential) and all(isinstance(child, KNOWN) for child in module)


@no_grad()
def to_onnx(chain: nn.Module, image: Tensor) -> bytes:
    """The serialised model; its input is "image"."""
    nodes, weights, name = [], [], "image"
    for number, module in enumerate(_live(chain)):
        operator, attributes, tensors = _translate(module)
        given = [f"{number}.{key}" for key in tensors]
        weights += [
            numpy_helper.from_array(t.detach().cpu().numpy(), n) for n, t in zip(given, tensors.values(), strict=True)
        ]
        nodes.append(helper.make_node(operator, [name, *given], [f"{number}"], **attributes))
        name = f"{number}"
    inputs = [helper.make_tensor_value_info("image", TensorProto.FLOAT, list(image.shape))]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(chain(image).shape))]
    graph = helper.make_graph(nodes, "chain", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def _live(chain: nn.Module) -> Iterator[nn.Module]:
    return (module for module in chain.children() if not isinstance(module, nn.Dropout))


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def _translate(module: nn.Module) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """ONNX's operator, its attributes and its weights."""
    if isinstance(module, (nn.Conv2d, nn.MaxPool2d)):
        attributes = {
            "kernel_shape": _pair(module.kernel_size),
            "strides": _pair(module.stride),
            "dilations": _pair(module.dilation),
            "pads": 2 * _pair(module.padding),
        }
        if isinstance(module, nn.MaxPool2d):
            return "MaxPool", attributes | {"ceil_mode": int(module.ceil_mode)}, {}
        return "Conv", attributes | {"group": module.groups}, dict(module.named_parameters())
    if isinstance(module, nn.LocalResponseNorm):
        constants = {"alpha": module.alpha, "beta": module.beta, "bias": module.k}
        return "LRN", {name: float(value) for name, value in constants.items()} | {"size": module.size}, {}
    if isinstance(module, nn.Linear):
        return "Gemm", {"transB": 1}, dict(module.named_parameters())
    return type(module).__name__.replace("ReLU", "Relu"), {}, {}
