"""Attribution with captum's names and arguments: change ``captum.attr`` to ``zfcuda.attr`` in the import.

Where captum is right the results are equal: networks of ReLU modules without normalisation. Beyond that they follow the
paper. captum finds only modules, so it returns the plain gradient of networks that call ``F.relu``; here every ReLU is
a gate. captum goes through the gradient of contrast normalisation; here it is skipped. The network is taken as in
evaluation mode. Arguments that have no meaning here raise.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from zfcuda.deconv import dense
from zfcuda.deconv.graph import Graph, trace

__all__ = ["Deconvolution", "GuidedBackprop", "NeuronDeconvolution", "NeuronGuidedBackprop"]

Inputs = TypeVar("Inputs", Tensor, tuple[Tensor])
Target = int | Tensor | tuple[int, ...] | list[int] | list[tuple[int, ...]] | None
Selector = int | tuple[int | slice, ...] | Callable[[Tensor], Tensor]


class _OfOutput:
    """Attribution of one of the model's outputs."""

    gate: str

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        # captum's layers are what modules return, before another one rectifies it.
        self._graph = trace(model, joined=False)

    def attribute(self, inputs: Inputs, target: Target = None, additional_forward_args: Any = None) -> Inputs:
        """The attribution of one output of each image to its pixels.

        Parameters
        ----------
        inputs : Tensor (N, C, H, W), or a tuple of one
            Images, preprocessed for the model.
        target : int, tuple of int, Tensor, list of int, list of tuple, or None
            Which output: the same one for all images (int, tensor of one int, or tuple for outputs with several
            dimensions), one for each image (tensor (N,) or list); None where the model has only one.
        additional_forward_args
            Must be None: the model must take images and nothing else.

        Returns
        -------
        Tensor (N, C, H, W), or a tuple of one, as ``inputs``

        Raises
        ------
        TypeError
            For arguments of types that are not supported.
        RuntimeError, IndexError
            If ``target`` does not choose one output for each image.
        """
        top = len(self._graph.nodes) - 1
        return _attribution(self._graph, inputs, top, lambda x: _target(x, target), self.gate, additional_forward_args)


class _OfNeuron:
    """Attribution of a neuron of one layer."""

    gate: str

    def __init__(self, model: torch.nn.Module, layer: torch.nn.Module, device_ids: Sequence[int] | None = None) -> None:
        if device_ids is not None:
            raise TypeError(f"device_ids is {device_ids!r}; it must be None: DataParallel is not supported")
        self.model, self.layer = model, layer
        self._graph = trace(model, joined=False)
        self._top = _find(self._graph, model, layer)

    def attribute(
        self,
        inputs: Inputs,
        neuron_selector: Selector,
        additional_forward_args: Any = None,
        attribute_to_neuron_input: bool = False,
    ) -> Inputs:
        """The attribution of a neuron of the layer to the pixels of each image.

        Parameters
        ----------
        inputs : Tensor (N, C, H, W), or a tuple of one
            Images, preprocessed for the model.
        neuron_selector : int, tuple of int and slice, or callable
            The indices of the neuron behind the batch's; with slices the sum of these neurons. A callable takes the
            layer's output and returns one number for each image, or one in all.
        additional_forward_args
            Must be None: the model must take images and nothing else.
        attribute_to_neuron_input : bool
            Choose from the layer's input instead of its output.

        Returns
        -------
        Tensor (N, C, H, W), or a tuple of one, as ``inputs``

        Raises
        ------
        TypeError
            For arguments of types that are not supported.
        RuntimeError, IndexError
            If ``neuron_selector`` does not choose one neuron for each image.
        """
        top = self._top
        if attribute_to_neuron_input:
            node = self._graph.nodes[top]
            if node.module is not self.layer:
                raise TypeError(
                    f"attribute_to_neuron_input is True, but layer is a {type(self.layer).__name__}, which holds "
                    "others: give the first of them"
                )
            (top,) = node.inputs
        select = _neuron(neuron_selector)
        return _attribution(self._graph, inputs, top, select, self.gate, additional_forward_args)


class Deconvolution(_OfOutput):
    """Deconvnet of an output: at each ReLU the signal is rectified (Zeiler & Fergus 2014, section 2.1).

    Parameters
    ----------
    model : torch.nn.Module
        Anything that `zfcuda.DeconvNet` accepts.

    Raises
    ------
    TypeError
        If the model does something that cannot be projected through; the message names it and says why.
    """

    gate = "deconvnet"


class GuidedBackprop(_OfOutput):
    """Guided backpropagation of an output (Springenberg et al. 2015): at each ReLU both the signal and the map on the
    way up must be positive. Parameters and errors as in `Deconvolution`.
    """

    gate = "guided"


class NeuronDeconvolution(_OfNeuron):
    """Deconvnet of a neuron of one layer.

    Parameters
    ----------
    model : torch.nn.Module
        Anything that `zfcuda.DeconvNet` accepts.
    layer : torch.nn.Module
        One of its modules; what it returns is meant, so a convolution's map before the ReLU behind it.
    device_ids
        Must be None.

    Raises
    ------
    TypeError
        If the model does something that cannot be projected through; the message names it and says why.
    ValueError
        If the layer is not in the model, or is used more than once.
    """

    gate = "deconvnet"


class NeuronGuidedBackprop(_OfNeuron):
    """Guided backpropagation of a neuron of one layer. Parameters and errors as in `NeuronDeconvolution`."""

    gate = "guided"


def _attribution(
    graph: Graph, inputs: Inputs, top: int, select: Callable[[Tensor], Tensor], gate: str, additional: Any
) -> Inputs:
    if additional not in (None, ()):
        raise TypeError("additional_forward_args is given; it must be None: the model must take images, nothing else")
    images = inputs[0] if isinstance(inputs, tuple) and len(inputs) == 1 else inputs
    if not isinstance(images, Tensor) or images.dim() != 4:
        given = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"inputs is {given}; it must be a Tensor (N, C, H, W), or a tuple of one")
    record = dense.up(graph, images.detach())
    map_ = record.maps[graph.nodes[top].name] if top >= 0 else record.images
    # As captum does: the signal starts as the gradient of what was selected, 1 for a single neuron.
    with torch.enable_grad():
        leaf = map_.detach().requires_grad_()
        (signal,) = torch.autograd.grad(select(leaf).sum(), leaf)
    every = torch.arange(len(images), device=images.device)
    with torch.no_grad():
        pixels = dense.down(graph, top, signal, record, every, gate) if top >= 0 else signal
    pixels = pixels.contiguous()
    return (pixels,) if isinstance(inputs, tuple) else pixels


def _target(output: Tensor, target: Target) -> Tensor:
    """One output for each image."""
    count = len(output)
    chosen = output
    if isinstance(target, Tensor) and target.numel() == 1 and not target.is_floating_point():
        target = int(target)
    if isinstance(target, Tensor):
        if target.is_floating_point() or target.shape != (count,):
            raise RuntimeError(
                f"target is a {target.dtype} tensor of shape {tuple(target.shape)}; it must hold one integer, or one "
                f"for each of the {count} images"
            )
        target = target.tolist()
    if isinstance(target, list):
        if len(target) != count:
            raise RuntimeError(f"target has {len(target)} entries; it must have one for each of the {count} images")
        chosen = torch.stack([o[_indices("target", t)] for o, t in zip(output, target, strict=True)])
    elif target is not None:
        chosen = _column(output, _indices("target", target))
    if chosen.numel() != count:
        raise RuntimeError(
            f"target is {target!r}; it leaves {tuple(chosen.shape)} of an output of shape {tuple(output.shape)}, and "
            "must choose one number for each image"
        )
    return chosen


def _neuron(selector: Selector) -> Callable[[Tensor], Tensor]:
    """What takes a layer's output to one number for each image, or to one in all."""

    def select(output: Tensor) -> Tensor:
        if callable(selector):
            chosen = selector(output)
            sizes: tuple[int, ...] = (1, len(output))
        else:
            index = _indices("neuron_selector", selector)
            chosen = _column(output, index)
            if any(isinstance(i, slice) for i in index):
                chosen = chosen.flatten(1).sum(1)
            sizes = (len(output),)
        if chosen.numel() not in sizes:
            raise RuntimeError(
                f"neuron_selector is {selector!r}; it leaves {tuple(chosen.shape)} of a layer of shape "
                f"{tuple(output.shape)}, and must choose one neuron for each image"
            )
        return chosen

    return select


def _column(output: Tensor, index: tuple[int | slice, ...]) -> Tensor:
    whole = (slice(None), *index)
    return output[whole]


def _indices(name: str, index: Any) -> tuple[int | slice, ...]:
    given = index if isinstance(index, tuple) else (index,)
    if not all(isinstance(i, (int, slice)) and not isinstance(i, bool) for i in given):
        raise TypeError(f"{name} is {index!r}; it must be made of int")
    return given


def _find(graph: Graph, model: torch.nn.Module, layer: torch.nn.Module) -> int:
    """The node that computes what the layer returns."""
    if layer is model:
        return len(graph.nodes) - 1
    registered = dict(model.named_modules(remove_duplicate=False))
    names = [name for name, module in registered.items() if module is layer]
    if not names:
        raise ValueError(f"layer is a {type(layer).__name__} that is not a module of the model")
    # Uses beyond the registered names are called name_1, name_2, ….
    again = re.compile(re.escape(names[0]) + r"_\d+")
    found = [i for n, i in graph.names.items() if n in names or (again.fullmatch(n) and n not in registered)]
    if len(found) != 1:
        times = "more than once" if found else "by no part of it that leads to the output"
        raise ValueError(f"layer {names[0]} is used {times} in the model; there must be one map of it")
    return found[0]
