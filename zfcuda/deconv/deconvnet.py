"""The deconvnet of Zeiler & Fergus (2014), section 2.1: activations projected back to pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from zfcuda.deconv import dense as dense_path
from zfcuda.deconv.asked import (
    Asked,
    Gate,
    Overlap,
    Start,
    Units,
    check_gate,
    gather,
    is_single,
    strongest_positions,
    unit_index,
)
from zfcuda.deconv.dense import Record
from zfcuda.deconv.graph import trace
from zfcuda.deconv.layers import describe
from zfcuda.deconv.local import Crops, Local, boxes, cut, paste
from zfcuda.deconv.mined import Mined
from zfcuda.deconv.node import laid_out
from zfcuda.deconv.projections import Projections, project_mined
from zfcuda.deconv.receptive_field import Box, Field, Layers
from zfcuda.deconv.windows import Path, pack_bits

__all__ = ["DeconvNet", "Record", "Strongest"]

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
        return dense_path.up(self.graph, images)

    @property
    def layers(self) -> Layers:
        """Every layer that can be projected: name, kind, channels, size, receptive field and memory."""
        parameter = next(self.model.parameters(), torch.empty(0))
        return Layers(describe(self.graph, self.input_size, parameter.element_size()))

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
        index = unit_index(map_, layer, units)
        positions = strongest_positions(map_, index)
        values = gather(map_, index, positions)
        if is_single(units):
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

    @overload
    def project(
        self,
        record: Record | Tensor,
        layer: str,
        units: Units,
        position: tuple[int, int] | Tensor | None = None,
        start: Start = "value",
        gate: Gate = "deconvnet",
        overlap: Overlap = "sum",
        *,
        dense: bool = False,
        crop: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def project(
        self,
        record: Record | Tensor,
        layer: str,
        units: Units,
        position: tuple[int, int] | Tensor | None = None,
        start: Start = "value",
        gate: Gate = "deconvnet",
        overlap: Overlap = "sum",
        *,
        dense: bool = False,
        crop: Literal[True],
    ) -> Crops: ...

    @torch.no_grad()
    def project(
        self,
        record: Record | Tensor,
        layer: str,
        units: Units,
        position: tuple[int, int] | Tensor | None = None,
        start: Start = "value",
        gate: Gate = "deconvnet",
        overlap: Overlap = "sum",
        *,
        dense: bool = False,
        crop: bool = False,
    ) -> Tensor | Crops:
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
        dense : bool
            Send whole maps down. By default only the receptive field goes down, with equal results but for rounding,
            where that is exact and less work: from layers that depend on the image through convolutions, pools, ReLUs
            and normalisation one after the other (no sums, concatenations, flattening), with ``overlap="sum"``, and
            receptive fields smaller than the image.
        crop : bool
            Return the receptive fields and their places rather than whole images; whole images with the box of the
            image for units that see all of it.

        Returns
        -------
        Tensor (N, U, C, H, W), or (N, C, H, W) for a single unit
            A map that is zero everywhere gives zeros (with ``start="value"``).
        Crops
            With ``crop=True``: ``pixels`` (N, U, C, h, w), zero outside the image, and ``boxes`` int64 (N, U, 4): top,
            left, bottom, right in pixels of the network's input, perhaps beyond it. Without U for a single unit.

        Raises
        ------
        ValueError
            For an unknown layer, gate, overlap or start.
        IndexError
            For a unit or a position out of range.
        RuntimeError
            For units, positions or starts of a wrong shape.

        Notes
        -----
        It can be captured into a CUDA graph, forward pass included, if units, positions and starts are tensors on the
        device; their values are then not checked, and activations that agree do not share work.
        """
        record = record if isinstance(record, Record) else self(record)
        top = self.graph.find(layer)
        map_ = record.maps[self.graph.nodes[top].name]
        asked = Asked.of(map_, layer, units, position, start, gate, overlap)
        path = self.path(layer, (record.images.shape[2], record.images.shape[3]))
        local = path is not None and overlap == "sum" and not dense and pays(path)
        crops = self._local(record, path, map_.shape[1], asked) if path and local else self._dense(record, top, asked)
        if crop and not local and path:
            crops = cut(crops.pixels, path.pixels.origins(asked.flat_positions), path.pixels.size)
        if not crop and local:
            crops = Crops(paste(crops, record.images.shape[2:]), crops.boxes)
        shape = record.images.shape[:1] if is_single(units) else asked.units.shape
        pixels, boxes = (part.unflatten(0, shape) for part in crops)
        return Crops(pixels, boxes) if crop else pixels

    def path(self, layer: str, image_size: tuple[int, int]) -> Path | None:
        """The way down from a layer for windows of images of this size; None where there is only the dense one."""
        found = self.graph.path(self.graph.find(layer))
        return None if found is None else Path([self.graph.nodes[i] for i in found], image_size)

    def project_mined(
        self,
        mined: Mined,
        layer: str,
        units: Sequence[int] | Tensor | None = None,
        gate: Gate = "deconvnet",
        dataset: Any = None,
    ) -> Projections:
        """The projections of a layer's mined activations, from the switches that mining kept: no forward pass.

        Parameters
        ----------
        mined : Mined
            What `mine` returned, for this model.
        layer : str
            A layer that was mined.
        units : sequence of int, optional
            Maps of the layer; default all.
        gate : {"deconvnet", "backprop", "guided"}
            As in `project`. The last two need what mining keeps for them if told (``mine(..., gates=...)``).
        dataset : map-style data set, optional
            The one that was mined. Needed, and its images passed forwards again, only for layers whose switches mining
            did not keep: fully connected ones, those behind sums and concatenations, and those that did not fit its
            memory. A `zfcuda.deconv.again.Passes` of it remembers the passes from one call to the next.

        Returns
        -------
        Projections

        Raises
        ------
        ValueError
            If something that the projection needs was not kept, or the data set is missing.
        IndexError
            For a unit out of range.
        """
        return Projections.join(list(self.iterate_mined(mined, layer, units, gate, dataset)))

    @torch.no_grad()
    def iterate_mined(
        self,
        mined: Mined,
        layer: str,
        units: Sequence[int] | Tensor | None = None,
        gate: Gate = "deconvnet",
        dataset: Any = None,
    ) -> Iterator[Projections]:
        """`project_mined` in parts of bounded memory."""
        check_gate(gate)
        yield from project_mined(self, mined, layer, units, gate, dataset)

    def _local(self, record: Record, path: Path, channels: int, asked: Asked) -> Crops:
        """Receptive fields alone, a part at a time, so that what is cut out of the record stays small."""
        units, positions, starts = asked.units.flatten(), asked.flat_positions, asked.starts.flatten()
        local = Local(path, channels, asked.gate, len(units), starts)
        images = torch.arange(len(asked.units), device=units.device).repeat_interleave(asked.units.shape[1])
        masks = path.rectified if asked.gate != "deconvnet" else ()
        positive = {name: pack_bits(record.maps[name]) for name in masks}
        parts = [
            local(
                units[rows],
                starts[rows],
                positions[rows],
                path.cut(record.switches, images[rows], positions[rows], positive),
            )
            for rows in torch.arange(len(units), device=units.device).split(max(CHUNK_BYTES // local.bytes, 1))
            for where in [positions[rows]]
        ]
        return Crops(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def _dense(self, record: Record, top: int, asked: Asked) -> Crops:
        """Whole maps, a part at a time, with the box of the whole image."""
        index, map_ = asked.units, record.maps[self.graph.nodes[top].name]
        out = record.images.new_empty(index.numel(), *record.images.shape[1:])
        for rows in torch.arange(index.numel(), device=index.device).split(self._chunk(record, top)):
            where = [torch.arange(len(rows), device=rows.device), index.flatten()[rows]]
            if asked.positions is not None:
                where += asked.flat_positions[rows].unbind(-1)
            signal = laid_out(map_.new_zeros(len(rows), *map_.shape[1:]))
            signal[tuple(where)] = asked.starts.flatten()[rows]
            out[rows] = dense_path.down(
                self.graph, top, signal, record, rows // index.shape[1], asked.gate, asked.overlap
            )
        return Crops(out, boxes(index.new_zeros(index.numel(), 2), record.images.shape[2:]))

    def _chunk(self, record: Record, top: int) -> int:
        """Projections that go down together, so that memory stays bounded."""
        tensors = [record.images, *(record.maps[node.name] for node in self.graph.nodes[: top + 1])]
        largest = max(t[:1].numel() * t.element_size() for t in tensors)
        return max(CHUNK_BYTES // max(largest, 1), 1)


def pays(path: Path) -> bool:
    """Whether the windows are smaller than the maps: else whole maps are less work."""
    return prod(path.pixels.size) < prod(path.pixels.map_size)
