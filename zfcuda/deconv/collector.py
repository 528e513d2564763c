"""What mining does with a batch: forward pass, maxima, lists, windows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zfcuda import ops
from zfcuda.deconv.batches import Batch, Label
from zfcuda.deconv.deconvnet import DeconvNet
from zfcuda.deconv.graph import Maxima
from zfcuda.deconv.layers import describe
from zfcuda.deconv.mined import Mined, MinedLayer, Skipped, Tensors
from zfcuda.deconv.ranking import Entered, ExactSums, Ranking
from zfcuda.deconv.ranks import Ranks
from zfcuda.deconv.receptive_field import Layer
from zfcuda.deconv.windows import NOWHERE, Kept, Path, pack_bits
from zfcuda.report.notebook import bytes_text

__all__ = ["Collector", "Settings"]

#: Windows that are cut together, and planes that are searched together.
PART_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Settings:
    """The arguments of `zfcuda.deconv.mine` that say what is kept; layers by the names of their nodes."""

    layers: tuple[str, ...]
    top: int
    per_image: int | None
    gates: tuple[str, ...]
    memory: int


@dataclass
class Target:
    """A layer that is mined: its node, its rows among the maps of all layers, and what is kept of its entries."""

    layer: Layer
    node: int
    maps: slice
    path: Path | None
    pooled_by: int | None
    #: Shape and dtype of what belongs to one entry: "patches", "switches.<pool>", "positive.<layer>".
    windows: dict[str, tuple[tuple[int, ...], torch.dtype]] = field(default_factory=dict)
    #: (maps * top, …) by the same names.
    store: dict[str, Tensor] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return self.maps.stop - self.maps.start

    @property
    def last(self) -> int:
        """The node that is run for it last."""
        return self.node if self.pooled_by is None else self.pooled_by

    def bytes(self, name: str) -> int:
        """Of one entry."""
        shape, dtype = self.windows[name]
        return prod(shape) * dtype.itemsize


@dataclass
class Seen:
    """What a forward pass shows of a batch: maxima, perhaps several candidates of a map, and switches.

    It stays where the network is, but for the candidates. The maxima's values go to the host, all of them, for their
    means are kept too; of their positions only those of the candidates.
    """

    #: By node, values and positions (N, maps).
    maxima: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    candidates: list[tuple[NDArray[Any], ...]] = field(default_factory=list)
    switches: dict[str, Tensor] = field(default_factory=dict)
    positive: dict[str, Tensor] = field(default_factory=dict)
    #: Images (N,) whose last map is finite.
    finite: NDArray[np.bool_] = field(default_factory=lambda: np.ones((), np.bool_))

    def values(self, targets: Sequence[Target]) -> NDArray[np.float32]:
        """Of all their maps, on the host."""
        return torch.cat([self.maxima[t.node][0].float() for t in targets], 1).cpu().numpy()

    def positions(self, targets: Sequence[Target], rows: NDArray[np.int64], maps: NDArray[np.int64]) -> NDArray[Any]:
        """Of some of their maps in some images, on the host."""
        every = torch.cat([self.maxima[t.node][1] for t in targets], 1)
        return every[tuple(torch.from_numpy(i).to(every.device) for i in (rows, maps))].cpu().numpy()


class Collector:
    """The lists of all layers, as far as the batches have gone.

    Parameters
    ----------
    net : DeconvNet
    settings : Settings
    image_shape : (int, int, int)
        Channels, height and width of the images.
    name : callable
        Of an image, for people, by its index.
    allocate : bool
        False: only to ask for `bytes`.

    Attributes
    ----------
    images_seen : int
    next_batch : int
        No batch before it is to be run again.
    busy : bool
        A batch is in: the lists are not whole.
    labels : dict of int to label
        Of images that have entered a list.
    """

    def __init__(
        self,
        net: DeconvNet,
        settings: Settings,
        image_shape: tuple[int, int, int],
        name: Callable[[int], str] = "image {}".format,
        *,
        allocate: bool = True,
    ) -> None:
        self.name = name
        self.net, self.settings, self.image_shape = net, settings, image_shape
        self.targets = _targets(net, settings, image_shape)
        self._choose()
        self.images_seen = self.next_batch = 0
        self.skipped: list[Skipped] = []
        self.labels: dict[int, Label] = {}
        self.busy = False
        if allocate:
            self._allocate()

    def _choose(self) -> None:
        """Keep windows from the smallest on, as long as there is memory."""
        left = self.settings.memory
        for target, name in self._smallest_first():
            needed = self._all_bytes(target, name)
            if needed <= left:
                left -= needed
            else:
                left = 0
                del target.windows[name]
        for target in self.targets:  # a projection needs all of its windows or none
            every = [n for n in _window_names(target.path, self.settings.gates) if n not in target.windows]
            if every:
                target.windows = {n: w for n, w in target.windows.items() if n == "patches"}

    def _smallest_first(self) -> list[tuple[Target, str]]:
        parts = [(target, name) for target in self.targets for name in target.windows]
        return sorted(parts, key=lambda part: self._all_bytes(*part))

    def _all_bytes(self, target: Target, name: str) -> int:
        return target.count * self.settings.top * target.bytes(name)

    def bytes(self) -> dict[str, dict[str, int]]:
        """By layer and by name: what the lists and the windows take."""
        lists = sum(8 if f != "values" else 4 for f in Ranking.FIELDS) * self.settings.top + 8 * (ExactSums.BINS + 1)
        return {
            t.layer.name: {"lists": t.count * lists} | {name: self._all_bytes(t, name) for name in t.windows}
            for t in self.targets
        }

    @property
    def total_bytes(self) -> int:
        """All of `bytes`."""
        return sum(sum(parts.values()) for parts in self.bytes().values())

    def describe_memory(self) -> str:
        """A sentence."""
        lacking = [t.layer.name for t in self.targets if t.path and not t.windows.keys() - {"patches"} and t.path.pools]
        rest = f"; no switches of {', '.join(lacking)}: projecting them reads the images again" if lacking else ""
        maps = self.targets[-1].maps.stop
        taken = f"{bytes_text(self.total_bytes)} of lists, patches and switches"
        return f"{len(self.targets)} layers, {maps} maps, {taken}{rest}"

    def _allocate(self) -> None:
        count, top = self.targets[-1].maps.stop, self.settings.top
        self.ranking = Ranking(count, top)
        self.sums, self.zeros = ExactSums(count), np.zeros(count, np.int64)
        for target in self.targets:
            rows = target.count * top
            target.store = {n: torch.empty(rows, *shape, dtype=dtype) for n, (shape, dtype) in target.windows.items()}

    # A batch

    def absorb(self, batch: Batch) -> list[Skipped]:
        """Run a batch, and let what is strong enough enter the lists; returns the images that could not be used."""
        self.busy = True
        skipped = list(batch.skipped)
        if batch.images is not None:
            parameter = next(self.net.model.parameters(), torch.empty(0))
            self._check_shape(batch.images)
            images = batch.images.to(parameter.device, parameter.dtype)
            seen = self._look(images)
            first = batch.number * len(images)
            strongest = seen.values(self.targets)
            finite = np.isfinite(strongest).all(1) & seen.finite
            valid = batch.valid.numpy() & finite
            skipped += self._not_finite(first + np.nonzero(batch.valid.numpy() & ~finite)[0])
            self._count(strongest[valid])
            maps, rows, values, positions = self._candidates(seen, strongest, valid)
            if len(maps):
                entered = self.ranking.insert(maps, values, first + rows, positions)
                self._keep(images, seen, entered, rows, positions)
                self.labels |= {first + int(row): batch.labels[row] for row in np.unique(rows[entered.candidates])}
        self.skipped += skipped
        self.next_batch = batch.number + 1
        self.busy = False
        return skipped

    def _check_shape(self, images: Tensor) -> None:
        if tuple(images.shape[1:]) != self.image_shape:
            raise RuntimeError(
                f"dataset has images of shapes {self.image_shape} and {tuple(images.shape[1:])}; a network needs "
                "images of one size: resize and crop them in the data set"
            )

    def _look(self, images: Tensor) -> Seen:
        """The forward pass, up to the last layer that is needed."""
        seen = Seen()
        wanted = {name for target in self.targets for name in target.windows}
        last = max(target.last for target in self.targets)
        maxima = self._of_pools(seen, wanted, last)
        searched = [target for target in self.targets if target.node not in maxima]
        at: dict[int, list[Target]] = {}
        for target in searched:
            at.setdefault(target.last, []).append(target)
        holding = {target.node for target in searched if target.pooled_by is not None}
        held: dict[int, Tensor] = {}

        def visit(i: int, output: Tensor, switches: Tensor | None) -> None:
            node = self.net.graph.nodes[i]
            if f"positive.{node.name}" in wanted:
                seen.positive[node.name] = pack_bits(output)
            if switches is not None and f"switches.{node.name}" in wanted:
                seen.switches[node.name] = switches
            if i in holding:
                held[i] = output
            for target in at.get(i, ()):
                if target.pooled_by is None:
                    self._maxima(seen, target, output)
                else:
                    window = node.window_on(held[target.node].shape[2:])
                    pool = (output, switches, window.kernel, window.stride, window.padding, window.dilation)
                    self._maxima(seen, target, held.pop(target.node), *pool)
            if i == last:
                seen.finite = output.flatten(1).isfinite().all(1).cpu().numpy()

        self.net.graph.run(images, visit, last, maxima)
        return seen

    def _of_pools(self, seen: Seen, wanted: set[str], last: int) -> dict[int, Maxima]:
        """The convolutions of whose maps nobody needs more than the maxima, and where these go."""
        several = {target.node for target in self.targets if self.settings.per_image != 1}
        return {
            node: lambda *found, node=node: seen.maxima.update({node: found})
            for node, pool in self.net.graph.pooled.items()
            if pool <= last and node not in several and f"positive.{self.net.graph.nodes[node].name}" not in wanted
        }

    def _maxima(self, seen: Seen, target: Target, map_: Tensor, *pool: Any) -> None:
        if map_.dim() == 2:  # a unit is a map of one position
            map_ = map_[:, :, None, None]
        seen.maxima[target.node] = ops.map_maximum(map_, *pool)
        if self.settings.per_image != 1:
            seen.candidates += self._several(seen, target, map_)

    def _several(self, seen: Seen, target: Target, map_: Tensor) -> Iterator[tuple[NDArray[Any], ...]]:
        """Of every map that has an entry the strongest positions that may enter: maps, rows, values, positions."""
        top = self.settings.top
        weakest = self.ranking.weakest[target.maps]
        rows, maps = np.nonzero(seen.values([target]) > weakest)
        count = min(self.settings.per_image or top, top, map_[0, 0].numel())
        part = max(PART_BYTES // (map_[0, 0].numel() * map_.element_size()), 1)
        for start in range(0, len(rows), part):
            row, unit = rows[start : start + part], maps[start : start + part]
            planes = map_[torch.from_numpy(row), torch.from_numpy(unit)].flatten(1)
            planes = planes.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
            where, position = (i.cpu() for i in strongest_positions(planes, count))
            values = planes[where, position].float().cpu().numpy()
            entries = values > weakest[unit[where.numpy()]]
            where_, position_ = where.numpy()[entries], position.numpy()[entries]
            yield unit[where_] + target.maps.start, row[where_], values[entries], position_

    def _not_finite(self, images: NDArray[np.int64]) -> list[Skipped]:
        reason = "its maps are not finite (NaN or infinity)"
        return [Skipped(i, self.name(i), reason) for i in images.tolist()]

    def _count(self, values: NDArray[np.float32]) -> None:
        self.images_seen += len(values)
        self.sums.add(values)
        self.zeros += (values <= 0).sum(0)

    def _candidates(
        self, seen: Seen, strongest: NDArray[np.float32], valid: NDArray[np.bool_]
    ) -> tuple[NDArray[Any], ...]:
        """Maps, rows, values and positions of what exceeds the weakest entry of its list."""
        if self.settings.per_image == 1:
            rows, maps = np.nonzero((strongest > self.ranking.weakest) & valid[:, None])
            return maps, rows, strongest[rows, maps], seen.positions(self.targets, rows, maps)
        if not seen.candidates:
            return (np.empty(0, np.int64),) * 4
        table = [np.concatenate(column) for column in zip(*seen.candidates, strict=True)]
        return tuple(column[valid[table[1]]] for column in table)

    def _keep(
        self, images: Tensor, seen: Seen, entered: Entered, rows: NDArray[np.int64], positions: NDArray[np.int64]
    ) -> None:
        """Cut what belongs to the entries that have entered."""
        planes = images.to(torch.float16).flatten(0, 1).unsqueeze(-1)
        for target in self.targets:
            if not target.windows:
                continue
            of = (entered.maps >= target.maps.start) & (entered.maps < target.maps.stop)
            which = entered.candidates[of]
            slots = (entered.maps[of] - target.maps.start) * self.settings.top + entered.slots[of]
            part = max(PART_BYTES // max(sum(map(target.bytes, target.windows)), 1), 1)
            for start in range(0, len(which), part):
                some = which[start : start + part]
                assert target.layer.size is not None
                at = np.stack(np.divmod(positions[some], target.layer.size[1]), 1)
                where = torch.from_numpy(at).to(images.device)
                row = torch.from_numpy(rows[some]).to(images.device)
                cut = _cut(target, planes, seen, row, where)
                for name, windows in cut.items():
                    # NumPy copies whole rows; torch's index_copy_ goes byte by byte.
                    target.store[name].numpy()[slots[start : start + part]] = windows.cpu().numpy()

    # To disk and back

    def document(self) -> dict[str, Any]:
        """What is not a tensor."""
        listed = set(np.unique(self.ranking.images).tolist())
        self.labels = {image: label for image, label in self.labels.items() if image in listed}
        return {
            "next_batch": self.next_batch,
            "images_seen": self.images_seen,
            "image_shape": list(self.image_shape),
            "skipped": [[s.index, s.name, s.reason] for s in self.skipped],
            "labels": {str(i): label for i, label in self.labels.items()},
            "layers": [{"name": target.layer.name} for target in self.targets],
        }

    def tensors(self) -> Tensors:
        """Those of every layer; the lists and sums share their memory with these."""
        arrays = {name: getattr(self.ranking, name) for name in Ranking.FIELDS}
        arrays |= {"sums": self.sums.bins, "zeros": self.zeros}
        return {
            t.layer.name: {n: torch.from_numpy(a[t.maps]) for n, a in arrays.items()} | t.store for t in self.targets
        }

    def restore(self, document: Mapping[str, Any], tensors: Tensors) -> None:
        """Go on from what `document` and `tensors` gave."""
        self.next_batch, self.images_seen = document["next_batch"], document["images_seen"]
        self.skipped = [Skipped(*entry) for entry in document["skipped"]]
        self.labels = {int(i): label for i, label in document["labels"].items()}
        for layer, mine in self.tensors().items():
            for name, tensor in mine.items():
                tensor.copy_(tensors[layer][name])

    # The end

    def finish(self, ranks: Ranks, batch_size: int) -> Mined:
        """Merge the lists of all ranks, put everything in order, and give it away."""
        fields = {name: getattr(self.ranking, name) for name in Ranking.FIELDS}
        merged = Ranking(*self.ranking.values.shape)
        everyone = ranks.gather((fields, self.sums.bins, self.zeros, self.images_seen, self.skipped))
        for lists, _, _, _, _ in everyone:
            maps, places = np.nonzero(lists["images"] >= 0)
            if len(maps):
                merged.insert(maps, *(lists[name][maps, places] for name in ("values", "images", "positions")))
        self.sums.bins = sum(other[1] for other in everyone)
        self.zeros = sum(other[2] for other in everyone)
        self.images_seen = sum(other[3] for other in everyone)
        self.skipped = sorted((s for other in everyone for s in other[4]), key=lambda s: s.index)
        own = (merged.images >= 0) & (merged.images // batch_size % ranks.size == ranks.rank)
        self._arrange(own, merged.images < 0, ranks)
        self.ranking = merged
        settings = self.settings
        layers = {target.layer.name: self._layer(target) for target in self.targets}
        mined = Mined(
            layers, self.images_seen, settings.top, settings.per_image, batch_size, self.image_shape[1:], settings.gates
        )
        mined.skipped = self.skipped
        return mined

    def _arrange(self, own: NDArray[np.bool_], missing: NDArray[np.bool_], ranks: Ranks) -> None:
        """Put windows where their entries are.

        Of a rank's own list of a map, those that stay are the first ones, in their order.
        """
        for target in self.targets:
            for name, flat in target.store.items():
                tensor = flat.unflatten(0, (target.count, -1))
                for map_, windows in zip(range(target.maps.start, target.maps.stop), tensor, strict=True):
                    mine = torch.from_numpy(own[map_])
                    slots = torch.from_numpy(self.ranking.slots[map_, : int(mine.sum())])
                    windows[mine] = windows[slots]
                    windows[~mine] = 0
                # As bytes, for adding zero to a float is not always nothing.
                ranks.sum(flat.view(torch.uint8))
                tensor[torch.from_numpy(missing[target.maps])] = NOWHERE if name.startswith("switches") else 0

    def _layer(self, target: Target) -> MinedLayer:
        lists, top = self.ranking, self.settings.top
        positions = None
        if target.layer.size is not None:
            flat = torch.from_numpy(lists.positions[target.maps])
            width = target.layer.size[1]
            positions = torch.stack((flat // width, flat % width), -1).masked_fill((flat < 0)[..., None], -1)
        store = {name: tensor.unflatten(0, (target.count, top)) for name, tensor in target.store.items()}
        of = {
            kind: {n.removeprefix(f"{kind}."): t for n, t in store.items() if n.startswith(f"{kind}.")}
            for kind in ("switches", "positive")
        }
        means = ExactSums(0)
        means.bins = self.sums.bins[target.maps]
        return MinedLayer(
            target.layer,
            torch.from_numpy(lists.values[target.maps].copy()),
            torch.from_numpy(lists.images[target.maps].copy()),
            positions,
            store.get("patches"),
            torch.from_numpy(means.mean(self.images_seen)),
            torch.from_numpy((self.zeros[target.maps] / max(self.images_seen, 1)).astype(np.float32)),
            **of,
        )


def strongest_positions(planes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest of each plane (n, positions), the first ones of equal values: rows and positions."""
    weakest = planes.topk(count).values[:, -1:]
    above, equal = planes > weakest, planes == weakest
    room = count - above.sum(1, keepdim=True)
    rows, positions = (above | (equal & (equal.cumsum(1) <= room))).nonzero(as_tuple=True)
    return rows, positions


def _targets(net: DeconvNet, settings: Settings, image_shape: tuple[int, int, int]) -> list[Target]:
    channels, *size = image_shape
    graph = net.graph
    lines = describe(graph, (size[0], size[1]), 4)
    targets: list[Target] = []
    for name in settings.layers:
        node = graph.find(name)
        layer = lines[node]
        if layer.channels is None:
            raise RuntimeError(f"layers has {name!r}, whose number of maps is not known from images of {tuple(size)}")
        start = targets[-1].maps.stop if targets else 0
        path = net.path(name, (size[0], size[1]))
        pool = next((i for i, n in enumerate(graph.nodes) if n.kind == "pool" and n.inputs == (node,)), None)
        target = Target(layer, node, slice(start, start + layer.channels), path, pool)
        if layer.size is not None and layer.receptive_field is not None:
            target.windows["patches"] = ((channels, *layer.receptive_field), torch.float16)
        if path:
            by_name = {line.name: line.channels or 0 for line in lines}
            for full in _window_names(path, settings.gates):
                kind, _, of = full.partition(".")
                level = path.pools[of] if kind == "switches" else path.rectified[of]
                deep = by_name[of] if kind == "switches" else -(-by_name[of] // 8)
                target.windows[full] = ((*level.size, deep), torch.uint8)
        targets.append(target)
    return targets


def _window_names(path: Path | None, gates: tuple[str, ...]) -> list[str]:
    """What a projection of a layer needs."""
    if path is None:
        return []
    masks = [f"positive.{name}" for name in path.rectified] if set(gates) - {"deconvnet"} else []
    return [f"switches.{name}" for name in path.pools] + masks


def _cut(target: Target, planes: Tensor, seen: Seen, rows: Tensor, positions: Tensor) -> dict[str, Tensor]:
    """What belongs to entries of a layer, given by their rows in the batch and positions (n, 2)."""
    cut: dict[str, Tensor] = {}
    if "patches" in target.windows:
        (channels, *size), _ = target.windows["patches"]
        layer = target.layer
        origins = positions * positions.new_tensor(layer.jump) + positions.new_tensor(layer.start)
        each = (rows[:, None] * channels + torch.arange(channels, device=rows.device)).flatten()
        windows = ops.crop_windows(planes, each, origins.repeat_interleave(channels, 0), size)
        cut["patches"] = windows.view(-1, channels, *size)
    if target.path and target.windows.keys() - {"patches"}:
        kept: Kept = target.path.cut(seen.switches, rows, positions, seen.positive)
        cut |= {f"switches.{name}": windows for name, windows in kept.switches.items()}
        cut |= {f"positive.{name}": windows for name, windows in kept.positive.items()}
    return {name: cut[name] for name in target.windows}
