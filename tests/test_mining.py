"""Mining against brute force: every positive activation of every image, sorted.

Nets and images are of small integers, so that sums are exact, ties are many, and results must be equal bit for bit.
"""

import contextlib
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_mined import same
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

import zfcuda
from zfcuda import ops
from zfcuda.deconv import Mined, mine, mining, mining_memory
from zfcuda.deconv.collector import strongest_positions
from zfcuda.deconv.graph import Graph
from zfcuda.deconv.ranking import ExactSums, Ranking

LAYERS = ["0", "3", "6"]


def small_net(seed=0, dead=True):
    """A floor pool with a border, a pool with gaps, a convolution without ReLU, a dead map, fully connected units."""
    net = nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2, 3),
        nn.Conv2d(5, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(4, 3, 2), nn.Flatten(), nn.Linear(3, 4), nn.ReLU(),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.data = torch.randint(-1, 2, parameter.shape, generator=generator).float()
    if dead:
        net[0].weight.data[1] = 0
        net[0].bias.data[1] = -1
        net[3].bias.data[0] = -12  # few
    return net.eval()


def images_of(count, seed=0, size=(19, 17)):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, (count, 2, *size), generator=generator).float()


class Listed(Dataset):
    """Images with indices; ``broken`` ones cannot be read; ``signals`` happen before an index is read."""

    def __init__(self, images, broken=(), happens=None):
        self.images, self.broken, self.happens = images, broken, happens or {}

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        if index in self.happens:
            self.happens[index]()
        if index in self.broken:
            raise OSError(f"file {index} is truncated")
        return self.images[index], index % 3


class Arriving(IterableDataset):
    def __init__(self, images):
        self.images = images

    def __iter__(self):
        return iter(self.images)


def maps_of(net, images):
    """By torch alone: the maps of every layer, rectified where a ReLU follows."""
    maps = {}
    x = images.double()
    modules = list(net)
    for i, module in enumerate(modules):
        x = module.double()(x)
        joined = isinstance(module, nn.ReLU) and isinstance(modules[i - 1], (nn.Conv2d, nn.Linear))
        maps[str(i - joined)] = x
    net.float()
    return maps


def brute_force(maps, top, per_image=1, skip=()):
    """(values, images, positions) of one layer, all as lists over maps."""
    maps = maps.flatten(2) if maps.dim() > 2 else maps[..., None]
    lists = []
    for k in range(maps.shape[1]):
        entries = []
        for i in range(len(maps)):
            if i in skip:
                continue
            plane = sorted((-v, i, p) for p, v in enumerate(maps[i, k].tolist()) if v > 0)
            entries += plane[:per_image]
        lists.append(sorted(entries)[:top])
    return lists


def check(mined, net, images, top, per_image=1, skip=()):
    """The lists and statistics of every layer."""
    maps = maps_of(net, images)
    for name, layer in mined.items():
        expected = brute_force(maps[name], top, per_image, skip)
        spatial = maps[name].dim() == 4
        assert layer.count.tolist() == [len(entries) for entries in expected]
        for k, entries in enumerate(expected):
            missing = top - len(entries)
            assert layer.values[k].tolist() == [-v for v, _, _ in entries] + [0] * missing
            assert layer.images[k].tolist() == [i for _, i, _ in entries] + [-1] * missing
            if spatial:
                width = maps[name].shape[3]
                where = [list(divmod(p, width)) for _, _, p in entries] + [[-1, -1]] * missing
                assert layer.positions[k].tolist() == where
            else:
                assert layer.positions is None
                assert layer.patches is None
        used = [i for i in range(len(images)) if i not in skip]
        flat = maps[name][used].flatten(2) if spatial else maps[name][used][..., None]
        assert torch.equal(layer.mean, flat.amax(2).mean(0).float())
        assert torch.equal(layer.sparsity, (flat <= 0).all(2).double().mean(0).float())
        if spatial:
            check_patches(layer, images)
    assert mined.images_seen == len(images) - len(skip)


def check_patches(layer, images):
    (h, w), (jy, jx), (sy, sx) = layer.layer.receptive_field, layer.layer.jump, layer.layer.start
    padded = nn.functional.pad(images, (64,) * 4)
    for k, r in itertools.product(*map(range, layer.images.shape)):
        if layer.images[k, r] < 0:
            assert not layer.patches[k, r].any()
            continue
        y, x = layer.positions[k, r].tolist()
        top, left = 64 + sy + y * jy, 64 + sx + x * jx
        expected = padded[layer.images[k, r], :, top : top + h, left : left + w]
        assert torch.equal(layer.patches[k, r], expected.half())


@pytest.mark.parametrize("per_image", [1, 2, None])
@pytest.mark.parametrize("batch_size", [1, 3, 8, 30])
def test_brute_force(per_image, batch_size):
    net, images = small_net(), images_of(23)
    layers = [*LAYERS, "8"]
    mined = mine(net, Listed(images), layers, top=5, per_image=per_image, batch_size=batch_size, progress=False)
    check(mined, net, images, 5, per_image)
    assert list(mined) == layers


@settings(max_examples=25)
@given(
    seed=st.integers(0, 99),
    count=st.integers(1, 12),
    top=st.integers(1, 6),
    per_image=st.none() | st.integers(1, 4),
    batch_size=st.integers(1, 5),
    broken=st.sets(st.integers(0, 11)),
    size=st.tuples(st.integers(14, 18), st.integers(14, 18)),
)
def test_any_data(seed, count, top, per_image, batch_size, broken, size):
    net, images = small_net(seed, dead=False), images_of(count, seed, size)
    dataset = Listed(images, {b for b in broken if b < count})
    arguments = dict(layers=LAYERS, top=top, per_image=per_image, batch_size=batch_size, progress=False)
    if len(dataset.broken) == count:
        with pytest.raises(RuntimeError, match=r"none could be read.*image 0: OSError: file 0 is truncated"):
            mine(net, dataset, **arguments)
        return
    mined = mine(net, dataset, **arguments)
    check(mined, net, images, top, per_image, dataset.broken)
    assert [s.index for s in mined.skipped] == sorted(dataset.broken)


def tiny_zfnet():
    """The paper's layers up to the third, of few maps, some of them dead, others tied."""
    net = nn.Sequential(
        nn.Conv2d(2, 6, 7, 2, 1), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True), nn.LocalResponseNorm(5, 5e-4, k=2),
        nn.Conv2d(6, 7, 5, 2), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True), nn.LocalResponseNorm(5, 5e-4, k=2),
        nn.Conv2d(7, 5, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    for convolution in net[::4]:
        for parameter in convolution.parameters():
            parameter.data.normal_(generator=generator)
        convolution.weight.data[0], convolution.bias.data[0] = 0, -1
        convolution.weight.data[1], convolution.bias.data[1] = 0, 1
    return net.eval()


@pytest.mark.parametrize("gates", [("deconvnet",), ("deconvnet", "guided")], ids=["switches", "masks too"])
@pytest.mark.parametrize(
    ("net", "size", "layers"),
    [(small_net, (19, 17), LAYERS), (small_net, (19, 17), ["6"]), (tiny_zfnet, (71, 64), ["0", "4", "8"])],
    ids=["small", "its last layer", "ZFNet"],
)
def test_layers_with_a_pool_run_as_one(backend, request, monkeypatch, net, size, layers, gates):
    """… unless a projection needs their maps; the lists, their switches and the means are the same bits as apart."""
    if backend.name == "cuda":
        pytest.skip("a GPU may split the sums of a convolution by itself, and these have other bits then")
    if backend.name == "simt":
        monkeypatch.setattr(request.getfixturevalue("emulator"), "processors", 1)  # it never splits
    net, images = net(), images_of(7, size=size)
    images[4] = images[2]  # ties
    called, function = [], ops.conv2d_relu_max_pool2d_maximum
    monkeypatch.setattr(
        ops, "conv2d_relu_max_pool2d_maximum", lambda *a, **options: (called.append(a), function(*a, **options))[1]
    )
    arguments = {"layers": layers, "top": 3, "batch_size": 3, "gates": gates, "progress": False}
    fused = mine(net, Listed(images), **arguments)
    pools = sum(isinstance(module, nn.MaxPool2d) for module in net)
    assert len(called) == (3 * pools if gates == ("deconvnet",) else 0)
    monkeypatch.setattr(Graph, "pooled", {})
    called.clear()
    assert same(mine(net, Listed(images), **arguments), fused) and not called
    first = fused[layers[0]]
    assert layers[0] != "0" or ((first.count == 0).any() and (first.count > 0).any())


def test_what_is_kept_projects_as_the_images_do():
    """From the switches and masks in the lists as from the images themselves, by the dense path."""
    model = small_net()
    net, images = zfcuda.DeconvNet(model, (19, 17)), images_of(9)
    mined = mine(net, Listed(images), LAYERS, top=4, gates=("deconvnet", "guided", "backprop"), progress=False)
    for layer, gate in itertools.product(LAYERS, ("deconvnet", "guided", "backprop")):
        found = mined[layer]
        crops = net.project_mined(mined, layer, gate=gate)
        for pixels, unit, rank, box in zip(crops.pixels, crops.units, crops.ranks, crops.boxes, strict=True):
            image = images[found.images[unit, rank]][None]
            where = tuple(found.positions[unit, rank].tolist())
            expected = net.project(image, layer, int(unit), where, gate=gate, dense=True)[0]
            top, left, bottom, right = box.clip(min=-64).tolist()
            expected = nn.functional.pad(expected, (64,) * 4)[:, top + 64 : bottom + 64, left + 64 : right + 64]
            assert torch.equal(pixels, expected)


def test_units_are_projected_in_the_order_in_which_they_are_asked_for():
    net, images = zfcuda.DeconvNet(small_net(), (19, 17)), images_of(9)
    mined = mine(net, Listed(images), LAYERS, top=3, progress=False)
    for layer in LAYERS:
        units = [unit for unit, count in enumerate(mined[layer].count.tolist()) if count][::-1]
        parts = [net.project_mined(mined, layer, [unit]) for unit in units]
        together = net.project_mined(mined, layer, units)
        assert together.units.unique_consecutive().tolist() == units
        assert torch.equal(together.pixels, torch.cat([part.pixels for part in parts]))


def test_a_second_mining_neither_sees_nor_changes_the_first():
    net = zfcuda.DeconvNet(small_net())
    images, others = images_of(18), images_of(23, seed=1)
    first = mine(net, Listed(images), top=4, progress=False)
    check(mine(net, Listed(others), top=4, progress=False), net.model, others, 4)
    check(first, net.model, images, 4)
    assert same(mine(net, Listed(images), top=4, progress=False), first)


def test_default_layers_are_the_convolutions():
    net = small_net()
    assert list(mine(net, Listed(images_of(3)), progress=False)) == LAYERS
    assert list(mine(net, Listed(images_of(3)), "1", progress=False)) == ["0"]  # an alias


def test_a_residual_net_without_windows():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(2, 3, 3, padding=1)
            self.second = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            x = self.first(x).relu()
            return (x + self.second(x)).relu()

    net = Residual().eval()
    for parameter in net.parameters():
        parameter.data = torch.randint(-1, 2, parameter.shape, generator=torch.Generator().manual_seed(1)).float()
    images = images_of(7)
    add = [layer.name for layer in zfcuda.DeconvNet(net).layers][-1]
    mined = mine(net, Listed(images), ["first", add], top=3, progress=False)[add]
    maps = net(images)
    for k, entries in enumerate(brute_force(maps, 3)):
        assert mined.values[k].tolist() == [-v for v, _, _ in entries]
        assert mined.images[k].tolist() == [i for _, i, _ in entries]
    assert mined.switches == {}
    check_patches(mined, images)


def test_images_that_give_nan_are_left_out_and_listed(caplog):
    net, images = small_net(), images_of(10)
    images[4, 0, 3, 3] = torch.nan
    images[7, 1, 0, 0] = torch.inf
    mined = mine(net, Listed(images), LAYERS, top=9, batch_size=4, progress=False)
    assert [(s.index, s.reason) for s in mined.skipped] == [
        (4, "its maps are not finite (NaN or infinity)"),
        (7, "its maps are not finite (NaN or infinity)"),
    ]
    assert "skipped image 4 (image 4)" in caplog.text
    check(mined, net, images, 9, skip={4, 7})


# The lists themselves


@given(st.data())
def test_ranking_in_any_order(data):
    """However candidates are dealt out to calls, the lists are the sorted ones, and slots stay with their entries."""
    top = data.draw(st.integers(1, 4))
    entry = st.tuples(st.integers(0, 2), st.integers(1, 3), st.integers(0, 9), st.integers(0, 9))
    entries = data.draw(st.lists(entry, unique_by=lambda e: (e[0], e[2], e[3])))
    ranking, store = Ranking(3, top), {}
    while_left = list(entries)
    while while_left:
        n = data.draw(st.integers(1, len(while_left)))
        chunk, while_left = while_left[:n], while_left[n:]
        maps, values, images, positions = (np.array(column) for column in zip(*chunk, strict=True))
        entered = ranking.insert(maps, values.astype(np.float32), images, positions)
        for candidate, map_, slot in zip(*map(np.ndarray.tolist, entered), strict=True):
            store[map_, slot] = chunk[candidate]
    for k in range(3):
        expected = sorted((e for e in entries if e[0] == k), key=lambda e: (-e[1], *e[2:]))[:top]
        assert [store[k, s] for s in ranking.slots[k].tolist()[: len(expected)]] == expected
        assert ranking.values[k].tolist() == [e[1] for e in expected] + [0] * (top - len(expected))
        assert sorted(ranking.slots[k].tolist()) == list(range(top))


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1), st.randoms(), st.integers(1, 5)
)
def test_sums_are_exact_in_any_order(numbers, random, chunk):
    from fractions import Fraction

    exact = np.float32(float(sum(map(Fraction, numbers)) / len(numbers)))
    random.shuffle(numbers)
    sums = ExactSums(1)
    for start in range(0, len(numbers), chunk):
        sums.add(np.array(numbers[start : start + chunk], np.float32)[:, None])
    assert sums.mean(len(numbers))[0] == exact


@given(st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=5), st.integers(1, 6))
def test_strongest_positions(planes, count):
    rows, positions = strongest_positions(torch.tensor(planes).float(), count)
    for i, plane in enumerate(planes):
        expected = sorted(range(6), key=lambda p: (-plane[p], p))[:count]
        assert positions[rows == i].tolist() == sorted(expected)


# Data sets


def arguments(**changes):
    return dict(layers=LAYERS, top=4, batch_size=4, progress=False) | changes


@pytest.fixture(scope="module")
def reference():
    return mine(small_net(), Listed(images_of(18), broken={5, 17}), **arguments())


def equal(a, b):
    """All that does not depend on what kind of data set it was."""
    for name in a:
        same(a[name], b[name])
    assert a.images_seen == b.images_seen
    return True


@pytest.mark.parametrize("workers", [0, 2])
def test_workers(reference, workers):
    mined = mine(small_net(), Listed(images_of(18), broken={5, 17}), **arguments(num_workers=workers))
    assert same(mined, reference)
    assert mined.skipped[0].reason == "OSError: file 5 is truncated"
    assert {s.label for s in mined.sources.values()} <= {0, 1, 2}
    assert all(s.label == i % 3 for i, s in mined.sources.items())


@pytest.mark.parametrize("workers", [0, 1])
def test_iterable(workers):
    images = images_of(18)
    expected = mine(small_net(), Listed(images), **arguments())
    assert equal(mine(small_net(), Arriving(images), **arguments(num_workers=workers)), expected)
    assert equal(mine(small_net(), DataLoader(Arriving(images), 7), **arguments()), expected)
    loader = DataLoader(Arriving(images), 4, num_workers=workers)
    assert equal(mine(small_net(), loader, **arguments(batch_size=None)), expected)
    assert equal(mine(small_net(), (image for image in images), **arguments()), expected)


@pytest.mark.parametrize("batch_size", [1, 7, 40])
def test_across_batch_sizes_only_near_ties_may_swap(batch_size):
    """Real numbers, each image twice with a difference of about a rounding, so that there is something to swap."""
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 40, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(40, 20, 3), nn.ReLU()).eval()
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    images = torch.randn(20, 2, 19, 17, generator=generator)
    images = torch.cat((images, images * (1 + 1e-7 * torch.randn(images.shape, generator=generator))))
    ours, other = (mine(net, Listed(images), top=4, batch_size=n, progress=False) for n in (4, batch_size))
    for name, layer in ours.items():
        tolerance = 1e-5 * float(layer.values.max())
        torch.testing.assert_close(other[name].values, layer.values, rtol=0, atol=tolerance)
        for k in range(len(layer.values)):
            own, theirs = (entries_of(mined[name], k) for mined in (ours, other))
            for entry, value in own.items():
                assert abs(value - theirs.get(entry, min(theirs.values()))) <= tolerance


def entries_of(layer, k):
    """Of a map without missing entries: the value of each image and position."""
    places = zip(layer.images[k].tolist(), map(tuple, layer.positions[k].tolist()), strict=True)
    return dict(zip(places, layer.values[k].tolist(), strict=True))


def test_progress_has_images_a_second_and_the_time_left(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    mine(small_net(), Listed(images_of(18)), **arguments(progress=True))
    last = re.sub("\x1b\\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err).splitlines()[-1]
    assert re.search(r"Mining .* 18/18 +[0-9.]+ images/s 0:00:00", last), last
    mine(small_net(), Listed(images_of(18)), **arguments(progress=False))
    assert capsys.readouterr().err == ""


def test_loader_gives_its_batch_size_and_collation_but_not_its_order(reference):
    def collate(items):
        return {"pixels": torch.stack([image for image, _ in items]) / 2, "label": [label for _, label in items]}

    images = images_of(18)
    loader = DataLoader(Listed(images * 2, broken={5, 17}), 4, shuffle=True, collate_fn=collate)
    net = small_net()
    before = torch.get_rng_state()
    assert same(mine(net, loader, **arguments(batch_size=None)), reference)
    assert torch.equal(before, torch.get_rng_state())


def test_items_of_many_kinds(reference):
    class Wrapped(Listed):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            kinds = [image, (image, label), {"meta": "x", "image": image, "label": label}, [np.int64(3), image, "cat"]]
            return kinds[index % 4]

    mined = mine(small_net(), Wrapped(images_of(18), broken={5, 17}), **arguments())
    assert equal(mined, reference)
    labels = {i: source.label for i, source in mined.sources.items()}
    assert all(label == [None, i % 3, i % 3, "cat"][i % 4] for i, label in labels.items())


def test_a_subset_keeps_its_own_indices():
    images = images_of(18)
    mined = mine(small_net(), Subset(Listed(images), [3, 1, 17]), **arguments())
    assert equal(mined, mine(small_net(), Listed(images[[3, 1, 17]]), **arguments()))


def write_images(folder, count=6):
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / ("cat" if i % 2 else "dog") / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(path)


def test_a_folder_with_files_that_are_no_images(tmp_path, caplog):
    write_images(tmp_path)
    whole = (tmp_path / "cat" / "1.png").read_bytes()
    (tmp_path / "cat" / "half.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "dog" / "words.jpg").write_text("no picture")
    net = zfcuda.models.zfnet(5, widths=(4, 4, 4, 4, 4), fc_width=4, input_size=64)
    mined = mine(net, tmp_path, ["conv1", "conv2"], top=3, progress=False)
    assert [(s.index, s.name) for s in mined.skipped] == [(3, "cat/half.png"), (7, "dog/words.jpg")]
    assert "skipped image 3 (cat/half.png): " in caplog.text
    assert "skipped image 7 (dog/words.jpg): UnidentifiedImageError" in caplog.text
    assert mined.classes == ["cat", "dog"]
    assert mined.images_seen == 6
    assert all(mined.sources[i].label == (i > 3) and mined.sources[i].size == (30, 40) for i in mined.sources)
    mined.save(tmp_path / "out")
    assert same(Mined.load(tmp_path / "out"), mined)


@pytest.mark.parametrize(
    ("dataset", "changes", "error", "message"),
    [
        (3, {}, TypeError, "dataset is a int; it must be a folder"),
        ([], {}, RuntimeError, "dataset has 0 images"),
        (
            [torch.zeros(2, 9, 9, dtype=torch.uint8)],
            {},
            RuntimeError,
            r"item 0 of dataset holds torch.uint8 \(2, 9, 9\)",
        ),
        ([torch.zeros(2, 19, 17), torch.zeros(2, 19, 18)], {}, RuntimeError, "item 1 of dataset has an image of shape"),
        ([torch.zeros(2, 19, 17), torch.zeros(2, 19, 18)], dict(batch_size=1), RuntimeError, "images of shapes"),
        (Arriving(images_of(3)), dict(num_workers=2), ValueError, "num_workers is 2; an iterable data set"),
        (["a.jpg"], {}, ValueError, "does not say which size of images"),
        (images_of(3), dict(top=0), ValueError, "top is 0; it must be at least 1"),
        (images_of(3), dict(per_image=0), ValueError, "per_image is 0"),
        (images_of(3), dict(top=2.5), TypeError, "top is 2.5; it must be an int"),
        (images_of(3), dict(layers=["9"]), ValueError, None),
        (images_of(3), dict(layers=["conv9"]), ValueError, "layer is 'conv9'; it must be one of 0"),
        (images_of(3), dict(layers=[]), ValueError, "layers is empty"),
        (images_of(3), dict(gates=("relu",)), ValueError, "gates has 'relu'; it must be of 'deconvnet'"),
    ],
)
def test_refusals(dataset, changes, error, message):
    if message is None:
        mine(small_net(), dataset, **arguments(**changes))  # the name of the last ReLU
        return
    with pytest.raises(error, match=message):
        mine(small_net(), dataset, **arguments(**changes))


def test_an_error_of_an_iterable_is_fatal():
    def stream():
        yield from images_of(3)
        raise OSError("truncated")

    with pytest.raises(
        RuntimeError, match=r"failed after 3 images \(OSError: truncated\); an iterable data set cannot go on"
    ):
        mine(small_net(), stream(), **arguments())


# Memory


def test_memory_is_what_is_allocated():
    net, images = small_net(), images_of(6)
    gates = ("deconvnet", "guided")
    mined = mine(net, Listed(images), gates=gates, progress=False)
    for name, sizes in mining_memory(net, (19, 17), gates=gates).items():
        layer = mined[name]
        kept = {"patches": layer.patches} | {f"switches.{n}": t for n, t in layer.switches.items()}
        kept |= {f"positive.{n}": t for n, t in layer.positive.items()}
        assert {n: t.nbytes for n, t in kept.items()} == {n: b for n, b in sizes.items() if n != "lists"}


def test_what_does_not_fit_is_not_kept():
    net, images = small_net(), images_of(6)
    whole = mine(net, Listed(images), progress=False)
    for memory in (0, 3000, 20000, 10**9):
        sizes = mining_memory(net, (19, 17), memory=memory)
        assert sum(b for parts in sizes.values() for n, b in parts.items() if n != "lists") <= memory
        mined = mine(net, Listed(images), memory=memory, progress=False)
        for name, layer in mined.items():
            assert torch.equal(layer.values, whole[name].values)
            assert (layer.patches is not None) == ("patches" in sizes[name])
            if layer.patches is not None:
                assert torch.equal(layer.patches, whole[name].patches)
            assert not layer.switches or layer.switches.keys() == whole[name].switches.keys()


# Interruptions


def interrupt():
    raise KeyboardInterrupt


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(("how", "workers"), [(interrupt, 0), (ctrl_c, 0), (ctrl_c, 2)])
@pytest.mark.parametrize("at", range(0, 18, 4))
def test_interrupted_in_any_batch(reference, tmp_path, how, workers, at):
    images = images_of(18)
    if workers:  # in the main process, after the batch of this image
        stopping, look = Listed(images, {5, 17}), mining.Collector.absorb

        def absorb(self, batch):
            if batch.number == at // 4:
                how()
            return look(self, batch)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(mining.Collector, "absorb", absorb)
            mine(small_net(), stopping, **arguments(folder=tmp_path, num_workers=workers))
    else:
        with pytest.raises(KeyboardInterrupt):
            mine(small_net(), Listed(images, {5, 17}, {at: how}), **arguments(folder=tmp_path))
    with pytest.raises(FileNotFoundError):
        Mined.load(tmp_path)
    read = []
    rest = Listed(images, {5, 17}, {i: lambda i=i: read.append(i) for i in range(18)})
    assert same(mine(small_net(), rest, **arguments(folder=tmp_path)), reference)
    assert read == list(range(at if how is interrupt else at + 4, 18))  # nothing is read twice
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", *[".safetensors"] * 3]
    again = Listed(images, {5, 17}, {i: lambda: pytest.fail("read again") for i in range(18)})
    assert same(mine(small_net(), again, **arguments(folder=tmp_path)), reference)


def test_interrupted_at_every_batch(reference, tmp_path):
    images, stops = images_of(18), {0, 3, 8, 9, 13, 16}

    def stop(i):
        if i in stops:
            stops.remove(i)
            raise KeyboardInterrupt

    dataset = Listed(images, {5, 17}, {i: lambda i=i: stop(i) for i in range(18)})
    while stops:
        with pytest.raises(KeyboardInterrupt):
            mine(small_net(), dataset, **arguments(folder=tmp_path))
    assert same(mine(small_net(), dataset, **arguments(folder=tmp_path)), reference)


def test_interrupted_while_it_is_saved_all_is_saved(reference, tmp_path, monkeypatch):
    save = Mined.save
    monkeypatch.setattr(Mined, "save", lambda self, folder: ctrl_c() or save(self, folder))
    with pytest.raises(KeyboardInterrupt):
        mine(small_net(), Listed(images_of(18), {5, 17}), **arguments(folder=tmp_path))
    assert same(Mined.load(tmp_path), reference)


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda number, frame: None])
def test_an_interruption_that_has_no_effect_elsewhere(reference, tmp_path, handler):
    """Ignored, it stays so; of a handler that returns nothing is known, so that what has been done is kept."""
    dataset = Listed(images_of(18), {5, 17}, {6: ctrl_c})
    before = signal.signal(signal.SIGINT, handler)
    try:
        if handler is not signal.SIG_IGN:
            with pytest.raises(KeyboardInterrupt):
                mine(small_net(), dataset, **arguments(folder=tmp_path))
            dataset = Listed(images_of(18), {5, 17}, {i: lambda: pytest.fail("read again") for i in range(8)})
        assert same(mine(small_net(), dataset, **arguments(folder=tmp_path)), reference)
    finally:
        signal.signal(signal.SIGINT, before)


SCRIPT = """
import os, signal, sys
sys.path[:0] = sys.argv[1:2]
from test_mining import *
"""


def python(program, *args, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    script = SCRIPT + textwrap.dedent(program)
    return subprocess.Popen([sys.executable, "-c", script, os.path.dirname(__file__), *map(str, args)], env=environment)


@pytest.mark.parametrize("share", [1e-9, 1e9])
def test_killed(reference, tmp_path, share):
    """kill -9 with no save, and after the save of every batch."""
    program = """
        from zfcuda.deconv import resume
        resume.SAVE_SHARE = float(sys.argv[3])
        dataset = Listed(images_of(18), {5, 17}, {10: lambda: os.kill(os.getpid(), signal.SIGKILL)})
        mine(small_net(), dataset, **arguments(folder=sys.argv[2]))
    """
    assert python(program, tmp_path, share).wait() == -signal.SIGKILL
    read = []
    rest = Listed(images_of(18), {5, 17}, {i: lambda i=i: read.append(i) for i in range(18)})
    assert same(mine(small_net(), rest, **arguments(folder=tmp_path)), reference)
    assert read[0] == (8 if share > 1 else 0)


def test_sigterm_saves_and_ends(reference, tmp_path):
    program = """
        dataset = Listed(images_of(18), {5, 17}, {10: lambda: os.kill(os.getpid(), signal.SIGTERM)})
        mine(small_net(), dataset, **arguments(folder=sys.argv[2]))
    """
    assert python(program, tmp_path).wait() == -signal.SIGTERM
    read = []
    rest = Listed(images_of(18), {5, 17}, {i: lambda i=i: read.append(i) for i in range(18)})
    assert same(mine(small_net(), rest, **arguments(folder=tmp_path)), reference)
    assert read[0] == 12


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("net", "dataset", "changes", "message"),
    [
        (small_net(1), None, {}, r"another model \(its weights differ\)"),
        (small_net(), Listed(images_of(19)), {}, r"another dataset \(images: 18, now 19\)"),
        (small_net(), None, dict(top=3), r"another top \(4, now 3\)"),
        (small_net(), None, dict(batch_size=5), r"another batch_size \(4, now 5\)"),
        (small_net(), None, dict(per_image=2), r"another per_image \(1, now 2\)"),
        (small_net(), None, dict(layers=["0"]), r"another layers \(\['0', '3', '6'\], now \['0'\]\)"),
        (small_net(), None, dict(gates=("guided",)), "another gates"),
        (small_net(), Arriving(images_of(18)), {}, "an iterable data set can neither be continued nor recognised"),
    ],
)
def test_another_mining_is_not_continued(tmp_path, finished, net, dataset, changes, message):
    first = Listed(images_of(18), happens={} if finished else {9: interrupt})
    try:
        mine(small_net(), first, **arguments(folder=tmp_path))
    except KeyboardInterrupt:
        assert not finished
    before = sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*"))
    with pytest.raises(RuntimeError, match=message):
        mine(net, dataset or Listed(images_of(18)), **arguments(folder=tmp_path) | changes)
    assert sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*")) == before


# Several processes

RANKS = """
    import torch.distributed as dist
    out, stop, second_port = sys.argv[2], int(sys.argv[3]), sys.argv[4]
    dataset = Listed(images_of(18), {5, 17}, {stop: interrupt})
    mined = mine(small_net(), dataset, **arguments(folder=out))  # as torchrun starts it
    mined.save(out + "/rank" + os.environ["RANK"])
    os.environ["MASTER_PORT"] = second_port  # rank 1 might find the first store before it has closed
    dist.init_process_group("gloo")
    mined = mine(small_net(), Arriving(images_of(18)), **arguments())
    mined.save(out + "/stream" + os.environ["RANK"])
    dist.destroy_process_group()
"""


def run_ranks(tmp_path, stop=-1):
    ports = free_ports(2)
    where = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=ports[0], GLOO_SOCKET_IFNAME="lo")
    processes = [python(RANKS, tmp_path, stop, ports[1], RANK=str(rank), **where) for rank in range(2)]
    try:
        return [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()


def free_ports(count):
    with contextlib.ExitStack() as open_:
        sockets = [open_.enter_context(socket.socket()) for _ in range(count)]
        for found in sockets:
            found.bind(("127.0.0.1", 0))
        return [str(found.getsockname()[1]) for found in sockets]


def test_two_ranks_are_as_one(reference, tmp_path):
    assert run_ranks(tmp_path) == [0, 0]
    stream = mine(small_net(), Arriving(images_of(18)), **arguments())
    for folder in ("", "rank0", "rank1"):
        assert same(Mined.load(tmp_path / folder), reference)
    for folder in ("stream0", "stream1"):
        assert same(Mined.load(tmp_path / folder), stream)
    assert not list(tmp_path.glob("part-*"))


def test_interrupted_ranks_go_on(reference, tmp_path):
    """Rank 0 is interrupted in its second batch, and rank 1, which has run all of its own, then fails to merge."""
    assert run_ranks(tmp_path, stop=9) != [0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part-0-of-2", "part-1-of-2"]
    with pytest.raises(RuntimeError, match="was begun by 2 processes, and these are 1: go on with as many"):
        mine(small_net(), Listed(images_of(18), {5, 17}), **arguments(folder=tmp_path))
    assert run_ranks(tmp_path) == [0, 0]
    assert same(Mined.load(tmp_path), reference)
