"""A network as a graph of layers: how maps are computed from images, and which way leads back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from zfcuda.deconv.node import Node, laid_out
from zfcuda.deconv.tracing import lower

__all__ = ["LOCAL", "Graph", "Node", "trace"]

#: Kinds of nodes through which a window of the map can go down by itself.
LOCAL = frozenset({"conv", "relu", "pool", "norm", "affine"})

Visit = Callable[[int, Tensor, "Tensor | None"], None]


@dataclass(frozen=True)
class Graph:
    """Layers in the order in which they run; the last one is the model's output."""

    nodes: tuple[Node, ...]

    @cached_property
    def names(self) -> dict[str, int]:
        """The node of every name, aliases included."""
        return {name: i for i, node in enumerate(self.nodes) for name in (node.name, *node.aliases)}

    def find(self, name: str) -> int:
        """The node of a layer's name or alias.

        Raises
        ------
        ValueError
            For an unknown name.
        """
        if name not in self.names:
            raise ValueError(f"layer is {name!r}; it must be one of {', '.join(self.names)}")
        return self.names[name]

    @torch.no_grad()
    def run(self, images: Tensor, visit: Visit | None = None, last: int | None = None) -> Tensor:
        """One forward pass, as in evaluation mode; each map is freed after its last use.

        Parameters
        ----------
        images : Tensor (N, C, H, W)
            In the dtype and on the device of the model.
        visit : callable, optional
            Called as ``visit(i, output, switches)`` after each node, in order; ``switches`` is None except for pools.
            Maps are in channels_last on the CPU, where that is faster.
        last : int, optional
            The node to stop at; default the last one.

        Returns
        -------
        Tensor
            The output of node ``last``.
        """
        last = len(self.nodes) - 1 if last is None else last
        maps = {-1: laid_out(images)}
        for i, node in enumerate(self.nodes[: last + 1]):
            maps[i], switches = node.forward([maps[j] for j in node.inputs])
            if visit is not None:
                visit(i, maps[i], switches)
            for j in set(node.inputs):
                if self._last_use[j] <= i:
                    del maps[j]
        return maps[last]

    def path(self, top: int) -> tuple[int, ...] | None:
        """The nodes from ``top`` down to the image, where each has one input and is of a kind in `LOCAL`; else None.

        What else uses the maps on the way does not matter: a projection starts from ``top`` alone.
        """
        found = []
        while top >= 0:
            if len(self.nodes[top].inputs) != 1 or self.nodes[top].kind not in LOCAL:
                return None
            found.append(top)
            (top,) = self.nodes[top].inputs
        return tuple(found)

    @property
    def image_channels(self) -> int:
        """Channels of the images, by the first convolution; 3 where there is none."""
        for node in self.nodes:
            if node.kind == "conv":
                return node.parameters()[0].shape[1] * node.groups
        return 3

    @cached_property
    def _last_use(self) -> dict[int, int]:
        return {j: i for i, node in enumerate(self.nodes) for j in node.inputs}


def trace(model: torch.nn.Module, joined: bool = True) -> Graph:
    """The graph of a model in evaluation mode, by `torch.fx`; the model is not changed.

    Layers have the names of ``model.named_modules()``. A module that is used several times has as many nodes: the
    first uses take the names under which it is registered, in order, later ones ``name_1``, ``name_2``, ….
    An operation without a module is called after the module whose forward() holds it and its function:
    ``layer1.0.add``, ``layer1.0.relu``, ``layer1.0.relu_1``, ….

    A module that holds others, such as a residual block, is another name of what it returns.

    A ReLU that is the only one to see the map of a convolution or linear layer is joined with it, and its name is an
    alias; so is a batch normalisation that is the only one to see such a map: it is folded into the weights when
    they are read. An operation in place changes what all later ones see of that map.

    Parameters
    ----------
    model : torch.nn.Module
        Takes images (N, C, H, W), and returns one tensor.
    joined : bool
        False leaves ReLU and batch normalisation nodes of their own.

    Raises
    ------
    TypeError
        If ``model`` is not a module, or does something that cannot be projected through; the message names it, says
        why, and what to do.
    """
    return Graph(tuple(lower(model, joined)))
