"""Any data set as numbered batches, the same ones whatever the workers, ranks and interruptions.

Image ``i`` is place ``i % batch_size`` of batch ``i // batch_size``. A place whose image cannot be read, or that lies
behind the last one, is filled with a copy of another image of the batch, which is then ignored: no image's neighbours
depend on anything but its index. Rank ``r`` of ``W`` runs the batches ``r``, ``r + W``, ``r + 2 W``, ….
"""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, default_collate, get_worker_info

from zfcuda.deconv.mined import Skipped, Source

__all__ = ["Batch", "Batches", "image_of", "say", "source"]

Label = int | str | None
Collate = Callable[[list[Any]], Any]


@dataclass
class Batch:
    """Images (N, C, H, W), None where none could be read, and which of them count."""

    number: int
    images: Tensor | None
    valid: Tensor
    labels: list[Label]
    skipped: list[Skipped] = field(default_factory=list)
    #: What is wrong with the data set, rather than with an image of it.
    problem: str | None = None


class Batches:
    """The batches of a rank.

    Parameters
    ----------
    dataset : map-style or iterable data set, or DataLoader
        See `zfcuda.deconv.mine`.
    batch_size, num_workers : int or None
        None: those of the DataLoader, else 32 and 0.
    rank, ranks : int
    """

    def __init__(self, dataset: Any, batch_size: int | None, num_workers: int | None, rank: int, ranks: int) -> None:
        loader = dataset if isinstance(dataset, DataLoader) else None
        self.dataset: Any = dataset if loader is None else loader.dataset
        self.iterable = isinstance(self.dataset, IterableDataset) or not hasattr(self.dataset, "__getitem__")
        if not hasattr(self.dataset, "__iter__" if self.iterable else "__len__"):
            raise TypeError(
                f"dataset is a {type(dataset).__name__}; it must be a folder, a list of files, a data set with "
                "__getitem__ and __len__, one with __iter__, or a DataLoader"
            )
        self.batch_size: int = batch_size or getattr(loader, "batch_size", None) or 32
        self.rank, self.ranks = rank, ranks
        workers = getattr(loader, "num_workers", 0) if num_workers is None else num_workers
        self._options: dict[str, Any] = {"num_workers": workers}
        self._init: Callable[[int], None] | None = None
        self._read: Dataset[Batch]
        if self.iterable:
            if loader is not None:  # it has its own workers, and only delivers
                self._options["num_workers"] = 0
            elif workers > 1:
                raise ValueError(
                    f"num_workers is {workers}; an iterable data set is read in its order, by one worker: use 0 or 1"
                )
            self._read = _Arriving(dataset, self.batch_size, rank, ranks)
        else:
            self._read = _Indexed(self.dataset, self.batch_size, self._adopt(loader))

    def _adopt(self, loader: DataLoader[Any] | None) -> Collate | None:
        """Take over what a DataLoader says on how to read; returns its own collation, if it has one."""
        if loader is None:
            return None
        self._init = loader.worker_init_fn
        names = ["pin_memory"]
        if self._options["num_workers"] and loader.num_workers:
            names += ["prefetch_factor", "multiprocessing_context", "timeout"]
        self._options |= {name: getattr(loader, name) for name in names}
        return None if loader.collate_fn is default_collate else loader.collate_fn

    def __len__(self) -> int:
        """Images of all ranks; of a data set with indices."""
        return len(self.dataset)

    def after(self, batch: int) -> Iterator[Batch]:
        """From the first batch of this rank that is not before ``batch``; of a data set with indices."""
        options = dict(self._options)
        if not self.iterable:
            total = -(-len(self.dataset) // self.batch_size)
            first = batch + (self.rank - batch) % self.ranks
            options["sampler"] = range(first, total, self.ranks)
        if options["num_workers"]:
            options["worker_init_fn"] = partial(_start_worker, self._init)
        # A generator of its own: mining must not move the caller's random numbers on.
        for found in DataLoader(self._read, batch_size=None, generator=torch.Generator(), **options):
            if found.problem:
                raise RuntimeError(found.problem)
            yield found

    def name(self, index: int) -> str:
        """Of an image, for people."""
        return source(self.dataset, index, head=False).name

    def identity(self) -> dict[str, Any]:
        """What tells this data set from another: its length, a digest of its names, its preprocessing."""
        names = None
        if getattr(self.dataset, "paths", None) or getattr(self.dataset, "samples", None):
            digest = hashlib.sha256()
            for index in range(len(self)):
                digest.update(self.name(index).encode(errors="surrogateescape") + b"\0")
            names = digest.hexdigest()
        preprocessing = [str(getattr(self.dataset, n, None)) for n in ("preprocessing", "input_size", "short_side")]
        return {"images": None if self.iterable else len(self), "names": names, "preprocessing": preprocessing}


class _Indexed(Dataset[Batch]):
    """Batches by number of a data set with indices."""

    def __init__(self, dataset: Any, batch_size: int, collate: Collate | None) -> None:
        self.dataset, self.batch_size, self.collate = dataset, batch_size, collate

    def __getitem__(self, number: int) -> Batch:
        first = number * self.batch_size
        last = min(first + self.batch_size, len(self.dataset))
        return _batch(number, self.batch_size, [self.image(index) for index in range(first, last)], first)

    def image(self, index: int) -> tuple[Tensor, Label] | Skipped | str:
        """An image and its label, or why there is none."""
        try:
            item = self.dataset[index]
            if self.collate:
                item = _first_of_batch(self.collate([item]))
        except MemoryError:
            raise
        except Exception as error:
            return Skipped(index, source(self.dataset, index, head=False).name, say(error))
        return image_and_label(item) or _no_image(index, item)


class _Arriving(IterableDataset[Batch]):
    """Batches in the order of arrival. Every rank goes through the whole stream, and keeps its own batches."""

    def __init__(self, stream: Iterable[Any], batch_size: int, rank: int, ranks: int) -> None:
        self.stream, self.batch_size, self.rank, self.ranks = stream, batch_size, rank, ranks

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        assert worker is None or worker.num_workers == 1
        items = self._items()
        number = 0
        while chunk := list(islice(items, self.batch_size)):
            if number % self.ranks == self.rank:
                first = number * self.batch_size
                found = [image_and_label(item) or _no_image(first + i, item) for i, item in enumerate(chunk)]
                yield _batch(number, self.batch_size, found, first)
            number += 1

    def _items(self) -> Iterator[Any]:
        if isinstance(self.stream, DataLoader):
            for batch in self.stream:
                yield from _items_of_batch(batch)
            return
        items = iter(self.stream)
        index = 0
        while True:
            try:
                item = next(items)
            except StopIteration:
                return
            except Exception as error:
                raise RuntimeError(
                    f"dataset failed after {index} images ({say(error)}); an iterable data set cannot go on after an "
                    "error: leave out images that cannot be read inside it"
                ) from error
            yield item
            index += 1


def source(dataset: Any, index: int, label: Label = None, head: bool = True) -> Source:
    """Where an image came from, as far as the data set tells: `ImageFiles`, torchvision's folders, subsets of them.

    ``head=False`` does not look into the file.
    """
    if isinstance(dataset, Subset):
        return source(dataset.dataset, dataset.indices[index], label, head)
    if hasattr(dataset, "source"):
        return dataset.source(index) if head else Source(dataset.name(index))
    samples = getattr(dataset, "samples", None)
    if isinstance(samples, list) and samples and isinstance(samples[index], tuple):
        path, of = samples[index]
        root = getattr(dataset, "root", None)
        return Source(os.path.relpath(path, root) if root else str(path), of, str(path))
    return Source(f"image {index}", label)


def attribute(dataset: Any, name: str) -> Any:
    """An attribute of a data set, or of the one that it is a subset of; None where there is none."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return getattr(dataset, name, None)


def _batch(number: int, size: int, found: Sequence[tuple[Tensor, Label] | Skipped | str], first: int) -> Batch:
    valid = torch.zeros(size, dtype=torch.bool)
    labels: list[Label] = [None] * size
    skipped = [f for f in found if isinstance(f, Skipped)]
    good = {place: f for place, f in enumerate(found) if isinstance(f, tuple)}
    problem = next((f for f in found if isinstance(f, str)), None)
    if not good or problem:
        return Batch(number, None, valid, labels, skipped, problem)
    padding = next(iter(good.values()))[0]
    images = padding.new_empty(size, *padding.shape)
    for place in range(size):
        image, labels[place] = good.get(place, (padding, None))
        if image.shape != padding.shape:
            problem = (
                f"item {first + place} of dataset has an image of shape {tuple(image.shape)}, and another one of its "
                f"batch {tuple(padding.shape)}; a network needs images of one size: resize and crop them in the dataset"
            )
            return Batch(number, None, valid, labels, skipped, problem)
        images[place] = image
        valid[place] = place in good
    return Batch(number, images, valid, labels, skipped)


def _leaves(item: Any) -> Iterator[Any]:
    if isinstance(item, Mapping):
        item = item.values()
    elif not isinstance(item, (tuple, list)):
        yield item
        return
    for part in item:
        yield from _leaves(part)


def image_and_label(item: Any) -> tuple[Tensor, Label] | None:
    """The image is the first tensor (C, H, W) of floats; the label the first integer, string or () tensor after it."""
    leaves = _leaves(item)
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.dim() == 3 and leaf.is_floating_point():
            return leaf.detach(), next((label for rest in leaves if (label := _label(rest)) is not None), None)
    return None


def image_of(dataset: Any, index: int) -> Tensor:
    """An image (C, H, W) of a map-style data set, found in its item as mining finds it.

    Raises
    ------
    TypeError
        If there is none.
    """
    item = image_and_label(dataset[index])
    if item is None:
        raise TypeError(f"dataset has no image at index {index}; it must be the data set that was mined")
    return item[0]


def _label(leaf: Any) -> Label:
    if isinstance(leaf, str):
        return leaf
    if isinstance(leaf, Tensor):
        return int(leaf) if leaf.dim() == 0 and not leaf.is_floating_point() else None
    return int(leaf) if hasattr(leaf, "__index__") and not isinstance(leaf, bool) else None


def _no_image(index: int, item: Any) -> str:
    kinds = [
        f"{leaf.dtype} {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else type(leaf).__name__
        for leaf in _leaves(item)
    ]
    return (
        f"item {index} of dataset holds {', '.join(kinds) or 'nothing'}; it must hold a floating-point tensor "
        "(C, H, W), the network's input: add a transform to the data set"
    )


def _items_of_batch(batch: Any) -> Iterator[Any]:
    """The items of what a DataLoader delivers: of its first tensor (N, C, H, W), and of all as long after it."""
    several = batch.values() if isinstance(batch, Mapping) else batch
    parts = [batch] if isinstance(batch, Tensor) else list(several)
    place = next((i for i, part in enumerate(parts) if isinstance(part, Tensor) and part.dim() == 4), None)
    if place is None:
        yield batch
        return
    images = parts[place]
    rest = [part for part in parts[place + 1 :] if hasattr(part, "__len__") and len(part) == len(images)]
    yield from zip(images, *rest, strict=True)


def _first_of_batch(batch: Any) -> Any:
    return next(_items_of_batch(batch))


def say(error: Exception) -> str:
    """Its kind and its message."""
    return f"{type(error).__name__}: {error}".strip(": ")


def _start_worker(init: Callable[[int], None] | None, worker: int) -> None:
    """Ctrl-C reaches all processes of a terminal; the main one decides."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if init:
        init(worker)
