"""Images in the lists of mining, run again: for layers whose windows mining did not keep, or in another network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zfcuda.deconv.batches import image_of
from zfcuda.deconv.dense import Record
from zfcuda.deconv.mined import Mined, MinedLayer
from zfcuda.deconv.windows import Kept, Path, pack_bits

if TYPE_CHECKING:
    from zfcuda.deconv.deconvnet import DeconvNet

__all__ = ["Passed", "Passes"]

#: Bytes that may be remembered, those of the images that come first: of ZFNet some 6000, of VGG-16 1400.
MEMORY = 2 * 2**30


@dataclass(frozen=True)
class Passed:
    """What the forward pass of some images, in the order of their indices, leaves for windows on the way down.

    ``whole`` holds the switches and masks of all of their maps, as `Path.cut` takes them.
    """

    images: Tensor
    whole: Kept

    def cut(self, path: Path, found: MinedLayer, units: Tensor, ranks: Tensor) -> Kept:
        """What these entries of a layer need, all of them of these images."""
        assert found.positions is not None
        rows = torch.searchsorted(self.images, found.images[units, ranks])
        device = next(iter(self.whole.switches.values()), self.images).device
        positions = found.positions[units, ranks].to(device)
        return path.cut(self.whole.switches, rows.to(device), positions, self.whole.positive)


class Passes:
    """Forward passes of the images in the lists; each image is run once, as far as `MEMORY` remembers them.

    Parameters
    ----------
    net : DeconvNet
        The network that was mined, or another one of its architecture.
    mined : Mined
    dataset : map-style dataset
        What was mined.
    masks : bool
        Whether the gate needs the forward masks.
    """

    def __init__(self, net: DeconvNet, mined: Mined, dataset: Any, masks: bool) -> None:
        self.net, self.dataset, self.batch_size = net, dataset, mined.batch_size
        self._left = MEMORY
        paths = [path for name in mined if (path := net.path(name, mined.input_size))]
        self._pools = {name for path in paths for name in path.pools}
        self._rectified = {name for path in paths for name in path.rectified} if masks else set()
        self._known: dict[int, Kept] = {}
        self._masks = masks
        self._records: dict[int, Record] = {}

    def batches(self, images: Tensor) -> Iterator[Passed]:
        """The passes of these images, each once, a batch at a time."""
        for batch in images.unique().split(self.batch_size) if len(images) else ():
            new = [image for image in batch.tolist() if image not in self._known]
            run = dict(zip(new, self._run(new), strict=True)) if new else {}
            self._remember(run)
            yield Passed(batch, Kept.join([(run | self._known)[image] for image in batch.tolist()]))

    def record(self, image: int) -> Record:
        """The pass of one image for the dense path, which reads the values of its maps only as masks."""
        if image in self._records:
            return self._records[image]
        record = self.net(image_of(self.dataset, image)[None].to(next(self.net.model.parameters())))
        bytes_ = sum(switches.nbytes for switches in record.switches.values())
        if self._masks:
            bytes_ += sum(map_.nbytes for map_ in record.maps.values())
        else:
            record = _hollow(record)
        if bytes_ <= self._left:
            self._left -= bytes_
            self._records[image] = record
        return record

    def _run(self, images: list[int]) -> list[Kept]:
        """What one forward pass leaves of each image, as far as it is needed."""
        inputs = torch.stack([image_of(self.dataset, image) for image in images])
        switches: dict[str, Tensor] = {}
        positive: dict[str, Tensor] = {}
        graph = self.net.graph

        def visit(i: int, output: Tensor, of_pool: Tensor | None) -> None:
            name = graph.nodes[i].name
            if name in self._pools and of_pool is not None:
                switches[name] = of_pool
            if name in self._rectified:
                positive[name] = pack_bits(output)

        last = max(map(graph.find, self._pools | self._rectified), default=-1)
        graph.run(inputs.to(next(self.net.model.parameters())), visit, last)
        whole = Kept(switches, positive)
        return [whole[place : place + 1] for place in range(len(images))]

    def _remember(self, run: dict[int, Kept]) -> None:
        for image, whole in run.items():
            if whole.bytes <= self._left:
                self._left -= whole.bytes
                self._known[image] = whole


def _hollow(record: Record) -> Record:
    """The same with maps that have shapes, and no values."""

    def hollow(tensor: Tensor) -> Tensor:
        return tensor.new_zeros(()).expand(tensor.shape)

    maps = {name: hollow(map_) for name, map_ in record.maps.items()}
    return Record(hollow(record.images), maps, record.switches, hollow(record.logits))
