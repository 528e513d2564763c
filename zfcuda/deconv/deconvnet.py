"""The deconvnet of Zeiler & Fergus (2014), section 2.1: activations projected back to pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from zfcuda.deconv import dense
from zfcuda.deconv.dense import Record
from zfcuda.deconv.graph import trace
from zfcuda.deconv.layers import describe
from zfcuda.deconv.node import laid_out
from zfcuda.deconv.receptive_field import Box, Field, Layer

__all__ = ["DeconvNet", "Record", "Strongest"]

Units = int | Sequence[int] | Sequence[Sequence[int]] | Tensor
Gate = Literal["deconvnet", "backprop", "guided"]
GATES = ("deconvnet", "backprop", "guided")

#: Largest map of a chunk of projections; a few of them live at once.
CHUNK_BYTES = 64 * 2**20


class Strongest(NamedTuple):
    """Where units are strongest: ``values`` (N, U), ``positions`` int64 (N, U, 2), y before x.

    Without U for a single unit; positions is None for fully connected units.
    """

    values: Tensor
    positions: Tensor | None


class DeconvNet:
    """Projects activations of a network to the pixels that caused them.

    From one activation down, layer by layer (section 2.1): *unpool* by the image's own switches,
    *rectify* the reconstruction, *filter* with the transposed filters, without bias. Contrast normalisation
    is skipped; every other linear map is transposed. With ``W`` a layer's filters, ``S`` its switches and ``g`` the
    gate::

        signal below = Wᵀ g(Sᵀ signal)

    Where branches meet, in a sum or a concatenation, the signal goes down each of them (its own channels of a
    concatenation), and where a map feeds several layers their signals are added: the transpose of a copy is a
    sum. Batch normalisation is, in evaluation mode, an affine map of each channel: folded into the convolution
    before it where nothing else sees that one's map, else the signal is multiplied by its scale; never skipped.

    Layers are named as in ``model.named_modules()``; `zfcuda.deconv.graph.trace` says how the others are called. The
    map of a convolution, or of a linear layer, is the normalised and rectified one if batch normalisation and a ReLU
    follow it and nothing else sees the map before them; their names mean the same map. Parameters are read at each
    call; they must not change between a record and its projection. Forward hooks of the modules do not run.

    Parameters
    ----------
    model : torch.nn.Module
        A feed-forward network that `torch.fx` can follow, such as `zfcuda.models.ZFNet`, any `torch.nn.Sequential`, or
        torchvision's AlexNet, VGG, SqueezeNet, GoogLeNet, ResNet and DenseNet: convolutions, linear layers, ReLU
        (modules, functions, in place, used several times), max-, average and adaptive pools, contrast and batch
        normalisation, flattening, dropout, sums, concatenations, products with constants. It is not changed.
    input_size : (int, int), optional
        Height and width of the images, for the sizes in `layers`; default ``model.input_size`` where it has one.

    Raises
    ------
    TypeError
        If the model does something that cannot be projected through; the message names it and says why.
    """

    def __init__(self, model: torch.nn.Module, input_size: tuple[int, int] | None = None) -> None:
        self.model = model
        self.input_size = input_size or getattr(model, "input_size", None)
        self.graph = trace(model)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Record:
        """One forward pass, as in evaluation mode, that keeps all maps and switches.

        Parameters
        ----------
        images : Tensor (N, C, H, W)
            In the dtype and on the device of the model, preprocessed for it.

        Returns
        -------
        Record

        Raises
        ------
        RuntimeError
            If the images do not fit the model.
        """
        if not isinstance(images, Tensor):
            raise TypeError(f"images is a {type(images).__name__}; it must be a torch.Tensor (N, C, H, W)")
        if images.dim() != 4:
            raise RuntimeError(
                f"images has shape {tuple(images.shape)}; it must be (N, C, H, W): add a batch with unsqueeze(0)"
            )
        return dense.up(self.graph, images)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Every layer that can be projected: name, kind, channels, size, receptive field and memory."""
        parameter = next(self.model.parameters(), torch.empty(0))
        return describe(self.graph, self.input_size, parameter.element_size())

    def box(self, layer: str, position: Sequence[int]) -> Box:
        """The pixels of the network's input that a position of a layer sees (its receptive field).

        Parameters
        ----------
        layer : str
            A layer with positions.
        position : (int, int)
            Row and column in its map.

        Returns
        -------
        Box
            Top, left, bottom and right, the last two exclusive; it may reach beyond the image (`Box.clip`).

        Raises
        ------
        ValueError
            For an unknown layer, or one that sees the whole image at once (flattened and fully connected).
        """
        info = self.layers[self.graph.find(layer)]
        if info.receptive_field is None or info.jump is None or info.start is None:
            raise ValueError(
                f"layer {layer!r} has no receptive fields: each of its units sees the whole image, or the sizes of "
                "adaptive pools are not known (give input_size)"
            )
        return Field(info.receptive_field, info.jump, info.start).box((int(position[0]), int(position[1])))

    @torch.no_grad()
    def strongest(self, record: Record, layer: str, units: Units) -> Strongest:
        """The value and position of each unit's strongest activation in each image.

        The first maximum in row-major order where there are several.

        Parameters
        ----------
        record : Record
            Of these images.
        layer : str
            Name of the layer.
        units : int, (U,) or (N, U)
            As in `project`.

        Returns
        -------
        Strongest

        Raises
        ------
        ValueError, IndexError
            For an unknown layer, or a unit out of range.
        """
        map_ = record.maps[self.graph.nodes[self.graph.find(layer)].name]
        index = _unit_index(map_, layer, units)
        positions = _strongest_positions(map_, index)
        values = _gather(map_, index, positions)
        if _is_single(units):
            return Strongest(values[:, 0], None if positions is None else positions[:, 0])
        return Strongest(values, positions)

    @torch.no_grad()
    def strongest_unit(self, record: Record, layer: str) -> Tensor:
        """The unit of a layer that holds its strongest activation, for each image: int64 (N,).

        The first one where there are several.

        Raises
        ------
        ValueError
            For an unknown layer.
        """
        map_ = record.maps[self.graph.nodes[self.graph.find(layer)].name]
        return map_.reshape(*map_.shape[:2], map_.shape[2:].numel()).amax(2).argmax(1)

    @torch.no_grad()
    def project(
        self,
        record: Record | Tensor,
        layer: str,
        units: Units,
        position: tuple[int, int] | Tensor | None = None,
        start: Literal["value"] | float | Tensor = "value",
        gate: Gate = "deconvnet",
        overlap: Literal["sum", "overwrite"] = "sum",
    ) -> Tensor:
        """The projection of single activations to pixels.

        Everything else in the layer is zero; the signal then goes down through the layer itself and all those
        below it, and passes a gate at each ReLU, the layer's own included.

        Parameters
        ----------
        record : Record or Tensor (N, C, H, W)
            What calling this object returned, or images to call it with.
        layer : str
            Name of the layer.
        units : int, (U,) or (N, U)
            A map, or a unit of a fully connected layer; several; or different ones for each image.
        position : (int, int) or Tensor, optional
            Row and column in the map, or one for each unit: anything that broadcasts to (N, U, 2), or to (N, 2) for
            a single unit. Default: where the map is strongest (`strongest`). None for fully connected units.
        start : "value", float or Tensor
            What to start from: the activation's value, a number, or one for each unit: anything that broadcasts to
            (N, U), or to (N,) for a single unit.
        gate : {"deconvnet", "backprop", "guided"}
            At each ReLU: ``max(signal, 0)``, as in the paper; zero where the forward map is not
            positive, as in the gradient (Simonyan et al. 2014); or both (Springenberg et al. 2015). Normalisation is
            skipped by all three, so ``backprop`` is the gradient only of a net without it.
        overlap : {"sum", "overwrite"}
            Where switches of overlapping windows meet: their sum, the exact transpose of pooling, or the value
            of the last window.

        Returns
        -------
        Tensor (N, U, C, H, W), or (N, C, H, W) for a single unit
            A map that is zero everywhere gives zeros (with ``start="value"``).

        Raises
        ------
        ValueError
            For an unknown layer, gate, overlap or start.
        IndexError
            For a unit or a position out of range.
        RuntimeError
            For units, positions or starts of a wrong shape.
        """
        if gate not in GATES:
            raise ValueError(f"gate is {gate!r}; it must be one of {', '.join(map(repr, GATES))}")
        if overlap not in ("sum", "overwrite"):
            raise ValueError(f"overlap is {overlap!r}; it must be 'sum' or 'overwrite'")
        if not isinstance(record, Record):
            record = self(record)
        top = self.graph.find(layer)
        map_ = record.maps[self.graph.nodes[top].name]
        index = _unit_index(map_, layer, units)
        single = _is_single(units)
        if position is None:
            positions = _strongest_positions(map_, index)
        else:
            positions = _positions(map_, layer, index, position, single)
        starts = _starts(map_, index, positions, start, single)
        out = record.images.new_empty(index.numel(), *record.images.shape[1:])
        for rows in torch.arange(index.numel(), device=index.device).split(self._chunk(record, top)):
            where = [torch.arange(len(rows), device=rows.device), index.flatten()[rows]]
            if positions is not None:
                where += positions.flatten(0, 1)[rows].unbind(-1)
            signal = laid_out(map_.new_zeros(len(rows), *map_.shape[1:]))
            signal[tuple(where)] = starts.flatten()[rows]
            out[rows] = dense.down(self.graph, top, signal, record, rows // index.shape[1], gate, overlap)
        shape = record.images.shape[:1] if single else index.shape
        return out.view(*shape, *record.images.shape[1:])

    def _chunk(self, record: Record, top: int) -> int:
        """Projections that go down together, so that memory stays bounded."""
        tensors = [record.images, *(record.maps[node.name] for node in self.graph.nodes[: top + 1])]
        largest = max(t[:1].numel() * t.element_size() for t in tensors)
        return max(CHUNK_BYTES // max(largest, 1), 1)


def _is_single(units: Units) -> bool:
    return isinstance(units, int) or (isinstance(units, Tensor) and units.dim() == 0)


def _unit_index(map_: Tensor, layer: str, units: Units) -> Tensor:
    """Units as an int64 tensor (N, U), checked."""
    index = torch.as_tensor(units, device=map_.device)
    if index.numel() and (index.is_floating_point() or index.dtype == torch.bool):
        raise TypeError(f"units has dtype {index.dtype}; it must be integers")
    batch, count = map_.shape[:2]
    index = index.long().reshape(1, 1) if index.dim() == 0 else index.long()
    if index.dim() > 2 or (index.dim() == 2 and index.shape[0] not in (1, batch)):
        raise RuntimeError(
            f"units has shape {tuple(index.shape)}; it must be an int, (U,), or (N, U) with N = {batch} images"
        )
    wrong = index[(index < 0) | (index >= count)]
    if wrong.numel():
        raise IndexError(f"units has {int(wrong[0])}; layer {layer!r} has units 0 to {count - 1}")
    return index.expand(batch, index.shape[-1])


def _strongest_positions(map_: Tensor, index: Tensor) -> Tensor | None:
    """(N, U, 2): the first maximum of each map in row-major order."""
    if map_.dim() == 2:
        return None
    images = torch.arange(len(map_), device=map_.device)[:, None]
    flat = map_[images, index].flatten(2).argmax(2)
    return torch.stack((flat // map_.shape[3], flat % map_.shape[3]), -1)


def _positions(map_: Tensor, layer: str, index: Tensor, position: tuple[int, int] | Tensor, single: bool) -> Tensor:
    """Given positions as (N, U, 2), checked."""
    if map_.dim() == 2:
        raise ValueError(f"position is {position!r}; units of layer {layer!r} have none: leave it out")
    given = torch.as_tensor(position, device=map_.device)
    if given.is_floating_point():
        raise TypeError(f"position has dtype {given.dtype}; it must be integers")
    where = _broadcast("position", given.long(), (*index.shape, 2), single)
    limit = torch.tensor(map_.shape[2:], device=map_.device)
    wrong = where[((where < 0) | (where >= limit)).any(-1)]
    if len(wrong):
        raise IndexError(
            f"position has {tuple(wrong[0].tolist())}; maps of layer {layer!r} have {map_.shape[2]} rows "
            f"and {map_.shape[3]} columns"
        )
    return where


def _starts(
    map_: Tensor, index: Tensor, positions: Tensor | None, start: Literal["value"] | float | Tensor, single: bool
) -> Tensor:
    """What to start from, as (N, U)."""
    if isinstance(start, str):
        if start != "value":
            raise ValueError(f"start is {start!r}; it must be 'value', a number or a tensor")
        return _gather(map_, index, positions)
    given = torch.as_tensor(start, dtype=map_.dtype, device=map_.device)
    return _broadcast("start", given, tuple(index.shape), single)


def _broadcast(name: str, given: Tensor, shape: tuple[int, ...], single: bool) -> Tensor:
    """``given`` expanded to (N, U, …), or from (N, …) where there is a single unit."""
    wanted = shape[:1] + shape[2:] if single else shape
    try:
        expanded = given.expand(wanted)
    except RuntimeError:
        raise RuntimeError(f"{name} has shape {tuple(given.shape)}; it must broadcast to {wanted}") from None
    return expanded.unsqueeze(1) if single else expanded


def _gather(map_: Tensor, index: Tensor, positions: Tensor | None) -> Tensor:
    """(N, U): the activations at the positions."""
    images = torch.arange(len(map_), device=map_.device)[:, None]
    where = (images, index) if positions is None else (images, index, *positions.unbind(-1))
    return map_[where]
