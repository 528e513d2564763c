"""The deconvnet of Zeiler & Fergus (2014), section 2.1: activations projected back to pixels.

This is the dense path: whole maps travel down, for every projection. It is exact, general, and the
reference for faster ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from zfcuda import ops
from zfcuda.deconv.chain import Step, chain
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


@dataclass(frozen=True)
class Record:
    """What one forward pass leaves behind, in the order of the chain.

    Attributes
    ----------
    images : Tensor (N, C, H, W)
        The input.
    maps : mapping of str to Tensor
        The output of every layer by its name, rectified where a ReLU follows: (N, K, h, w) or (N, K).
    switches : mapping of str to Tensor
        uint8 (N, K, h, w): the position within its window of each pooled maximum, by the pool's name.
    logits : Tensor
        The output of the last layer.
    """

    images: Tensor
    maps: Mapping[str, Tensor]
    switches: Mapping[str, Tensor]
    logits: Tensor


class DeconvNet:
    """Projects activations of a network to the pixels that caused them.

    From one activation down, layer by layer (section 2.1): *unpool* by the image's own switches,
    *rectify* the reconstruction, *filter* with the transposed filters, without bias. Contrast normalisation
    is skipped; linear layers are transposed. With ``W`` a layer's filters, ``S`` its switches and ``g`` the
    gate::

        signal below = Wᵀ g(Sᵀ signal)

    Layers are named as in ``model.named_modules()``. The map of a convolution, or of a linear layer, is the
    rectified one if a ReLU follows it; the ReLU's own name means the same map. Parameters are read at each call; they
    must not change between a record and its projection. Forward hooks of the modules do not run.

    Parameters
    ----------
    model : torch.nn.Module
        A `zfcuda.models.ZFNet` or any `torch.nn.Sequential`, nested or not, of Conv2d, ConvReLU2d, ReLU, MaxPool2d,
        LocalResponseNorm, dropout, Flatten, Linear and Identity. It is not changed.
    input_size : (int, int), optional
        Height and width of the images, for the sizes in `layers`; default ``model.input_size`` where it has one.

    Raises
    ------
    TypeError
        If the model holds a layer that cannot be projected through; the message names it and says why.
    """

    def __init__(self, model: torch.nn.Module, input_size: tuple[int, int] | None = None) -> None:
        self.model = model
        self.input_size = input_size or getattr(model, "input_size", None)
        self._steps = chain(model)
        self._index = {n: i for i, step in enumerate(self._steps) for n in (step.name, *step.aliases)}

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
        maps: dict[str, Tensor] = {}
        switches: dict[str, Tensor] = {}
        x = images
        for step in self._steps:
            x, switch = _up(step, x)
            maps |= dict.fromkeys((step.name, *step.aliases), x)
            if switch is not None:
                switches[step.name] = switch
        return Record(images, MappingProxyType(maps), MappingProxyType(switches), x)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Every layer that can be projected: name, kind, channels, size and receptive field."""
        out: list[Layer] = []
        size, channels, field = self.input_size, None, Field()
        flat = False
        for step in self._steps:
            if step.window:
                field = field.through(step.window)
                size = size and step.window.output_size(size)
            if step.kind == "flatten":
                channels = channels * size[0] * size[1] if channels and size else None
                flat = True
            channels = getattr(
                step.module, {"conv": "out_channels", "linear": "out_features"}.get(step.kind, ""), channels
            )
            where = (None,) * 4 if flat else (size, field.size, field.jump, field.start)
            out.append(Layer(step.name, step.kind, step.aliases, channels, *where))
        return tuple(out)

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
        info = self.layers[self._find(layer)]
        if info.receptive_field is None or info.jump is None or info.start is None:
            raise ValueError(f"layer {layer!r} has no positions; each of its units sees the whole image")
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
        map_ = record.maps[self._steps[self._find(layer)].name]
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
        map_ = record.maps[self._steps[self._find(layer)].name]
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
        top = self._find(layer)
        map_ = record.maps[self._steps[top].name]
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
            signal = map_.new_zeros(len(rows), *map_.shape[1:])
            signal[tuple(where)] = starts.flatten()[rows]
            out[rows] = self._down(signal, top, record, rows // index.shape[1], gate, overlap)
        shape = record.images.shape[:1] if single else index.shape
        return out.view(*shape, *record.images.shape[1:])

    def _find(self, layer: str) -> int:
        """The step of a layer's name."""
        if layer not in self._index:
            raise ValueError(f"layer is {layer!r}; it must be one of {', '.join(self._index)}")
        return self._index[layer]

    def _chunk(self, record: Record, top: int) -> int:
        """Projections that go down together, so that memory stays bounded."""
        tensors = [record.images, *(record.maps[step.name] for step in self._steps[: top + 1])]
        largest = max(t[:1].numel() * t.element_size() for t in tensors)
        return max(CHUNK_BYTES // max(largest, 1), 1)

    def _down(self, signal: Tensor, top: int, record: Record, images: Tensor, gate: str, overlap: str) -> Tensor:
        """From layer ``top`` to pixels; ``images`` tells which image each signal belongs to."""
        for i in range(top, -1, -1):
            step = self._steps[i]
            below = record.maps[self._steps[i - 1].name] if i > 0 else record.images
            forward = None
            if gate != "deconvnet" and (step.rectified or step.kind == "relu"):
                forward = record.maps[step.name][images]
            switches = record.switches[step.name][images] if step.kind == "pool" else None
            signal = _step_down(step, signal, below.shape, forward, switches, gate, overlap)
        return signal


def _up(step: Step, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """One step forward: its output, and the switches of a pool."""
    module, window = step.module, step.window
    if step.kind == "conv":
        assert window is not None
        convolve = ops.conv2d_relu if step.rectified else torch.nn.functional.conv2d
        slide = (window.stride, window.padding, window.dilation)
        return convolve(x, module.weight, module.bias, *slide, module.groups), None
    if step.kind == "pool":
        assert window is not None
        return ops.max_pool2d(x, window.kernel, window.stride, window.padding, window.dilation, window.ceil)
    if step.kind == "linear":
        x = torch.nn.functional.linear(x, module.weight, module.bias)
        return (x.relu() if step.rectified else x), None
    if step.kind == "norm":
        return ops.local_response_norm(x, module.size, module.alpha, module.beta, module.k), None
    if step.kind == "relu":
        return x.relu(), None
    if step.kind == "flatten":
        return x.flatten(1), None
    return _check_identity(step, x), None


def _check_identity(step: Step, x: Tensor) -> Tensor:
    """An adaptive pool to the size that the maps have already."""
    size = step.module.output_size
    wanted = (size, size) if isinstance(size, int) else tuple(size)
    if any(w is not None and w != have for w, have in zip(wanted, x.shape[2:], strict=True)):
        raise RuntimeError(
            f"{step.name} ({type(step.module).__name__}) would pool maps of {tuple(x.shape[2:])} to {wanted}; "
            "DeconvNet goes through it only where it changes nothing: use images of the size the model was made for"
        )
    return x


def _step_down(
    step: Step,
    signal: Tensor,
    below: torch.Size,
    forward: Tensor | None,
    switches: Tensor | None,
    gate: str,
    overlap: str,
) -> Tensor:
    """One step back: from a signal of the size of the step's output to one of the size of its input."""
    window = step.window
    if step.kind == "conv":
        assert window is not None
        return ops.deconv2d(
            signal,
            step.module.weight,
            None,
            window.stride,
            window.padding,
            _output_padding(step, signal.shape, below),
            step.module.groups,
            window.dilation,
            gate=gate if step.rectified else "none",
            forward=forward,
        )
    if step.kind == "pool":
        assert window is not None
        assert switches is not None
        slide = (window.kernel, window.stride, window.padding, window.dilation)
        return ops.max_unpool2d(signal, switches, *slide, output_size=below[2:], overlap=overlap)
    if step.kind == "linear":
        return (_gated(signal, forward, gate) if step.rectified else signal) @ step.module.weight
    if step.kind == "relu":
        return _gated(signal, forward, gate)
    if step.kind == "flatten":
        return signal.unflatten(1, below[1:])
    return signal  # normalisation is skipped


def _gated(signal: Tensor, forward: Tensor | None, gate: str) -> Tensor:
    """The gate where no convolution follows; ``deconv2d`` has its own."""
    if gate != "backprop":
        signal = signal.relu()
    return signal if forward is None else signal.masked_fill(forward <= 0, 0)


def _output_padding(step: Step, maps: torch.Size, below: torch.Size) -> list[int]:
    """Pixels at the bottom and right that no window of the convolution reached."""
    window = step.window
    assert window is not None
    return [
        below[2 + d] - ((maps[2 + d] - 1) * window.stride[d] - 2 * window.padding[d] + window.extent[d]) for d in (0, 1)
    ]


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
