"""A network as a graph of layers: how maps are computed from images, and which way leads back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import torch
from torch import Tensor

from zfcuda.deconv.node import Node, laid_out
from zfcuda.deconv.tracing import lower

__all__ = ["LOCAL", "Graph", "Node", "trace"]

#: Kinds of nodes through which a window of the map can go down by itself.
LOCAL = frozenset({"conv", "relu", "pool", "norm", "affine"})

Visit = Callable[[int, Tensor, "Tensor | None"], None]
Maxima = Callable[[Tensor, Tensor], None]


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
    def run(
        self,
        images: Tensor,
        visit: Visit | None = None,
        last: int | None = None,
        maxima: Mapping[int, Maxima] = MappingProxyType({}),
    ) -> Tensor:
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
        maxima : dict of int to callable
            Convolutions of `pooled` that ``visit`` need not see, with their pools before ``last``: each runs as one
            with its pool, its maps are never in memory, and the callable gets the values and positions (N, channels)
            of their maxima.

        Returns
        -------
        Tensor
            The output of node ``last``.
        """
        last = len(self.nodes) - 1 if last is None else last
        maps = {-1: laid_out(images)}
        switches: dict[int, Tensor | None] = {}
        for i, node in enumerate(self.nodes[: last + 1]):
            if i in maxima:
                pool = self.pooled[i]
                results = node.forward_pooled(maps[node.inputs[0]], self.nodes[pool])
                maps[pool], switches[pool], *strongest = results
                maxima[i](*strongest)
            elif i not in maps:
                maps[i], switches[i] = node.forward([maps[j] for j in node.inputs])
            if visit is not None and i not in maxima:
                visit(i, maps[i], switches[i])
            switches.pop(i, None)
            for j in set(node.inputs):
                if self._last_use[j] <= i:
                    maps.pop(j, None)
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

    @cached_property
    def pooled(self) -> dict[int, int]:
        """The pools of the rectified convolutions that nothing but a pool sees.

        Those with groups are not among them: on the CPU they have ways of their own, which are faster alone.
        """
        seen_by: dict[int, list[int]] = {}
        for i, node in enumerate(self.nodes):
            for j in node.inputs:
                seen_by.setdefault(j, []).append(i)
        return {
            i: others[0]
            for i, others in seen_by.items()
            if i >= 0 and self.nodes[i].kind == "conv" and self.nodes[i].rectified and self.nodes[i].groups == 1
            if len(others) == 1 and self.nodes[others[0]].kind == "pool"
        }

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
