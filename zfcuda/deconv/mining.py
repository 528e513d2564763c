"""Mining: the strongest activations of every map over a data set, in one pass.

A pass costs little more than the forward passes. The maximum of a map comes from the pool above it where there is
one, and where nothing else needs the map, the operator that computes both gives it; one comparison of all maxima with
the weakest entries of all lists finds the few that enter; only of these the patch and the windows of switches are
cut. After ``n`` images a map's list has changed about ``top · (1 + ln(n / top))`` times, so that the later images
cost almost nothing.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path as FilePath
from typing import Any

import torch

from zfcuda.deconv.asked import GATES
from zfcuda.deconv.batches import Batch, Batches, attribute, source
from zfcuda.deconv.collector import Collector, Settings
from zfcuda.deconv.deconvnet import DeconvNet
from zfcuda.deconv.mined import Mined, Preprocessing, Skipped
from zfcuda.deconv.progress import Meter
from zfcuda.deconv.ranks import Ranks
from zfcuda.deconv.receptive_field import Pair
from zfcuda.deconv.resume import Interruptions, Parts
from zfcuda.images import ImageFiles

__all__ = ["mine", "mining_memory"]

log = logging.getLogger("zfcuda")

#: Of an image: channels, height, width.
Shape = tuple[int, int, int]

#: The default of ``memory``: the five layers of ZFNet with all their windows take 1.2 GiB.
MEMORY = 2 * 2**30


def mine(
    model: torch.nn.Module | DeconvNet,
    dataset: Any,
    layers: str | Sequence[str] | None = None,
    top: int = 9,
    *,
    per_image: int | None = 1,
    batch_size: int | None = None,
    num_workers: int | None = None,
    gates: Sequence[str] = ("deconvnet",),
    folder: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
    memory: int = MEMORY,
    progress: bool = True,
) -> Mined:
    """The strongest activations of every map over a data set, with all that their projections need.

    An entry is a positive value at a position of a map in an image. Entries are ordered by value downwards, then by the
    image's index, then by position, row by row. A map with fewer positive ones has fewer entries; a dead map none.

    Parameters
    ----------
    model : torch.nn.Module or DeconvNet
        Anything that `DeconvNet` accepts; run in evaluation mode.
    dataset
        A folder of images or a list of files (`zfcuda.images.ImageFiles` with the model's ``input_size``); a data set
        with ``__getitem__`` and ``__len__``; an iterable one; or a `torch.utils.data.DataLoader`. The image of an item
        is its first floating-point tensor (C, H, W), preprocessed for the model; its label the first integer or string
        after it. See *Notes*.
    layers : names, optional
        As in ``DeconvNet(model).layers``; default all convolutions.
    top : int
        Entries of each map.
    per_image : int or None
        Entries that one image may have in a map; None: no limit. The paper's figures have one.
    batch_size, num_workers : int, optional
        Default: those of the DataLoader, else 32 and 0.
    gates : sequence of {"deconvnet", "backprop", "guided"}
        What the projections will be made with: the last two need the forward masks too.
    folder : path, optional
        Where the result is saved, by rank 0; until then, what is needed to go on after an interruption. Called again
        with the same arguments, mining goes on where it was, and returns what it saved if it had finished.
    device : torch.device, optional
        Default: where the model is; elsewhere a copy of it is run.
    memory : int
        Bytes that patches and windows may take, 2 GiB by default. Of the smallest layers on, all that fit are kept;
        what the others miss is read from the data set again when it is needed. Logged before the start
        (`mining_memory`).
    progress : bool
        A bar with images a second and the time left, if a terminal or a notebook watches.

    Returns
    -------
    Mined
        On every rank.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        For a model, layers or a data set that cannot be mined; where ``folder`` holds something else; if no image could
        be read.

    Notes
    -----
    *Images that cannot be read*: an exception of ``__getitem__`` is logged as a warning with the image's index and
    name, and listed in `Mined.skipped`; so is an image whose maps are not finite.

    *Determinism*: for one batch size, results do not depend on workers, ranks or interruptions, bit for bit, where
    the data set gives the same image for the same index, and the device the same sums for the same batch (the
    CPU does). Another batch size may swap entries whose values differ by rounding.

    *DataLoader*: of one over a data set with indices the data set, batch size, workers and ``collate_fn`` (applied to
    single items) are used, in the order of the indices; samplers and shuffling are not.

    *Iterable data sets*: an image's index is its place in the order of arrival. They are read by at most one worker;
    an error of theirs cannot be skipped; mining one cannot be resumed, for nothing tells where it should go on.

    *Several processes*: within an initialised `torch.distributed`, or under ``torchrun``, rank r of W runs the batches
    r, r + W, … and the lists are merged; ``folder`` must be the same for all. Every rank goes through the whole of an
    iterable data set, which must be the same on all ranks.
    """
    net = model if isinstance(model, DeconvNet) else DeconvNet(model)
    settings = _settings(net, layers, top, per_image, gates, memory)
    net = _on_device(net, device)
    with Ranks() as ranks:
        batches = Batches(_as_dataset(net, dataset), batch_size, num_workers, ranks.rank, ranks.size)
        about = {
            "layers": list(settings.layers),
            "top": top,
            "per_image": per_image,
            "batch_size": batches.batch_size,
            "gates": list(settings.gates),
            "memory": memory,
            "model": fingerprint(net.model),
            "dataset": batches.identity(),
        }
        parts = None
        if folder is not None:
            parts = Parts(FilePath(folder), about, ranks, batches.iterable)
            if parts.finished:
                return Mined.load(folder)
        return _run(net, settings, batches, about, ranks, parts, progress)


def mining_memory(
    model: torch.nn.Module | DeconvNet,
    input_size: Pair,
    layers: str | Sequence[str] | None = None,
    top: int = 9,
    *,
    gates: Sequence[str] = ("deconvnet",),
    memory: int = MEMORY,
) -> dict[str, dict[str, int]]:
    """What `mine` will keep: for each layer, the bytes of its lists, its patches and each window of switches or masks.

    Parameters as of `mine`; ``input_size`` is the height and width of the images.
    """
    net = model if isinstance(model, DeconvNet) else DeconvNet(model)
    collector = Collector(
        net, _settings(net, layers, top, 1, gates, memory), (net.graph.image_channels, *input_size), allocate=False
    )
    return collector.bytes()


def fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 of the model's state dict: names, shapes, dtypes and values."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _run(
    net: DeconvNet,
    settings: Settings,
    batches: Batches,
    about: dict[str, Any],
    ranks: Ranks,
    parts: Parts | None,
    progress: bool,
) -> Mined:
    with Interruptions(enabled=parts is not None and not batches.iterable) as interruptions:
        collector, stream = _start(net, settings, batches, ranks, parts)
        total = None if batches.iterable else len(batches)
        with Meter(total, collector.images_seen * ranks.size, progress and ranks.rank == 0) as meter:
            try:
                for batch in stream:
                    _warn(collector.absorb(batch))
                    meter.advance(len(batch.labels) * ranks.size)
                    if interruptions.pending:
                        raise KeyboardInterrupt
                    if parts and parts.due():
                        parts.save(collector)
            except BaseException:
                # Reading failed, or was interrupted: between two batches all is whole.
                if parts and not collector.busy:
                    parts.save(collector)
                raise
        return _finish(collector, batches, about, ranks, parts)  # to the end, even if interrupted: it is saved then


def _finish(collector: Collector, batches: Batches, about: dict[str, Any], ranks: Ranks, parts: Parts | None) -> Mined:
    """Merge the lists, and save the result."""
    if parts and ranks.size > 1:  # another rank may fail before the lists are merged
        parts.save(collector)
    mined = collector.finish(ranks, batches.batch_size)
    if not mined.images_seen:
        raise RuntimeError(_nothing(len(mined.skipped), mined.skipped))
    _add_sources(mined, batches, collector, about, ranks)
    if parts:
        parts.finish(mined)
    return mined


def _start(
    net: DeconvNet, settings: Settings, batches: Batches, ranks: Ranks, parts: Parts | None
) -> tuple[Collector, Iterator[Batch]]:
    """The lists, as they were where mining goes on, and the batches to come."""
    state = parts.document if parts else None
    stream = batches.after(state["next_batch"] if state else 0)
    shape: Shape | None = None
    if state:
        channels, height, width = state["image_shape"]
        shape = channels, height, width
    else:
        stream, seen = _peek(stream)
        for other in ranks.gather(seen):
            shape = shape or other
        if shape is None:
            skipped = [s for batch in stream for s in batch.skipped]
            raise RuntimeError(_nothing(len(skipped), skipped))
    collector = Collector(net, settings, shape, batches.name)
    if ranks.rank == 0:
        log.info("mining %s", collector.describe_memory())
    if parts:
        parts.expect(collector.total_bytes)
        if state:
            collector.restore(state, parts.tensors())
    return collector, stream


def _peek(stream: Iterator[Batch]) -> tuple[Iterator[Batch], Shape | None]:
    """The shape of the first image, and the stream as it was."""
    held = []
    for batch in stream:
        held.append(batch)
        if batch.images is not None:
            channels, height, width = batch.images.shape[1:]
            return chain(held, stream), (channels, height, width)
    return iter(held), None


def _warn(skipped: Sequence[Skipped]) -> None:
    for image in skipped:
        log.warning("skipped image %d (%s): %s", image.index, image.name, image.reason)


def _nothing(count: int, skipped: Sequence[Skipped]) -> str:
    first = f"; of the first one: {skipped[0].name}: {skipped[0].reason}" if skipped else ""
    return f"dataset has {count} images, of which none could be read{first}"


def _settings(
    net: DeconvNet,
    layers: str | Sequence[str] | None,
    top: int,
    per_image: int | None,
    gates: Sequence[str],
    memory: int,
) -> Settings:
    for name, number in (("top", top), ("per_image", 1 if per_image is None else per_image)):
        if not isinstance(number, int) or isinstance(number, bool):
            raise TypeError(f"{name} is {number!r}; it must be an int")
        if number < 1:
            raise ValueError(f"{name} is {number}; it must be at least 1")
    gates = (gates,) if isinstance(gates, str) else tuple(gates)
    for gate in gates:
        if gate not in GATES:
            raise ValueError(f"gates has {gate!r}; it must be of {', '.join(map(repr, GATES))}")
    if layers is None:
        layers = [node.name for node in net.graph.nodes if node.kind == "conv"]
    names = [net.graph.nodes[net.graph.find(n)].name for n in ([layers] if isinstance(layers, str) else layers)]
    if not names:
        raise ValueError("layers is empty; it must name one at least, and None means all convolutions")
    return Settings(tuple(dict.fromkeys(names)), top, per_image, gates, memory)


def _on_device(net: DeconvNet, device: torch.device | str | None) -> DeconvNet:
    here = next(net.model.parameters(), torch.empty(0)).device
    if device is None or torch.empty(0, device=device).device == here:
        return net
    return DeconvNet(copy.deepcopy(net.model).to(device), net.input_size)


def _as_dataset(net: DeconvNet, dataset: Any) -> Any:
    is_path = isinstance(dataset, (str, os.PathLike))
    if not is_path and not (
        isinstance(dataset, (list, tuple)) and dataset and isinstance(dataset[0], (str, os.PathLike))
    ):
        return dataset
    if net.input_size is None:
        raise ValueError(
            "dataset is given as files, but the model does not say which size of images it takes: give "
            "zfcuda.images.ImageFiles(files, input_size, mean, std)"
        )
    return ImageFiles(dataset, net.input_size, channels=net.graph.image_channels)


def _add_sources(mined: Mined, batches: Batches, collector: Collector, about: dict[str, Any], ranks: Ranks) -> None:
    """Each rank looks up the images that it has run."""
    listed = {int(i) for m in mined.values() for i in m.images.unique().tolist() if i >= 0}
    own = {i: source(batches.dataset, i, collector.labels[i]) for i in sorted(listed) if i in collector.labels}
    for sources in ranks.gather(own):
        mined.sources |= sources
    mined.model, mined.dataset = about["model"], about["dataset"]
    preprocessing = attribute(batches.dataset, "preprocessing")
    mined.preprocessing = preprocessing if isinstance(preprocessing, Preprocessing) else None
    classes = attribute(batches.dataset, "classes")
    if isinstance(classes, (list, tuple)) and all(isinstance(c, str) for c in classes):
        mined.classes = list(classes)
