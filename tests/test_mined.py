"""The container of mined activations: what is saved comes back, and a crash never leaves half of it."""

import dataclasses
import itertools
import json
import os
import re

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from zfcuda.deconv import Layer, Mined, MinedLayer, Preprocessing, Skipped, Source
from zfcuda.deconv import mined as module

CONV = Layer("features.conv", "conv", ("features.relu",), 4, (6, 5), (7, 9), (2, 1), (-1, 0), 480, 90)
FULL = Layer("fc", "linear", (), 3, None, None, None, None, 12, None)


def mined_layer(layer, maps, top, seed):
    generator = torch.Generator().manual_seed(seed)

    def bytes_(*shape):
        return torch.randint(256, (maps, top, *shape), dtype=torch.uint8, generator=generator)

    count = torch.randint(top + 1, (maps, 1), generator=generator)
    missing = torch.arange(top) >= count
    spatial = layer.size is not None
    return MinedLayer(
        layer,
        torch.rand(maps, top, generator=generator).sort(descending=True).values.masked_fill(missing, 0),
        torch.randint(50, (maps, top), generator=generator).masked_fill(missing, -1),
        torch.randint(5, (maps, top, 2), generator=generator).masked_fill(missing[..., None], -1) if spatial else None,
        torch.randn(maps, top, 3, 7, 9, generator=generator).half() if spatial else None,
        torch.rand(maps, generator=generator),
        torch.rand(maps, generator=generator),
        {"pool.a": bytes_(4, 3, 8), "pool": bytes_(2, 2, 3)} if spatial else {},
        {"features.conv": bytes_(3, 3, 1)} if spatial else {},
    )


def example(seed=0, **changes):
    layers = {"features.conv": mined_layer(CONV, 4, 3, seed), "fc": mined_layer(FULL, 3, 3, seed + 1)}
    fields = dict(
        images_seen=40, top=3, per_image=None, batch_size=8, input_size=(20, 30), gates=("deconvnet", "guided"),
        model="abc", skipped=[Skipped(7, "b/x.jpg", "truncated")],
        sources={3: Source("a.png", 1, "/data/a.png", (40, 60), (0, 1, 40, 59)), 12: Source("image 12", "cat")},
        preprocessing=Preprocessing((1.5, 2.0, 0.1), (1.0, 1.0, 3.0)), classes=["dog", "cat"],
    )  # fmt: skip
    return Mined(layers, **{**fields, **changes})


def same(a, b):
    for field in dataclasses.fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if field.name == "layers":
            assert list(x) == list(y)
            assert all(same(x[name], y[name]) for name in x)
        elif isinstance(x, torch.Tensor):
            assert x.dtype == y.dtype
            assert torch.equal(x, y), field.name
        elif field.name in ("switches", "positive"):
            assert x.keys() == y.keys()
            assert all(torch.equal(x[name], y[name]) for name in x)
        else:
            assert x == y, field.name
    return True


def files(folder):
    return sorted(path.name for path in folder.iterdir())


names = st.text(min_size=1, max_size=8)
sizes = st.none() | st.tuples(st.integers(1, 9), st.integers(1, 9))


@given(
    name=names,
    skipped=st.lists(st.builds(Skipped, st.integers(0, 99), names, names), max_size=2),
    sources=st.dictionaries(
        st.integers(0, 2**40),
        st.builds(
            Source, names, st.none() | st.integers(0, 9) | names, st.none() | names, sizes,
            st.none() | st.tuples(*[st.integers(-9, 9)] * 4),
        ),
        max_size=2,
    ),
    preprocessing=st.none()
    | st.floats(-300, 300, width=64).map(lambda x: Preprocessing((x, 0.1), (1.0, x))),
    classes=st.none() | st.lists(names, max_size=2),
    per_image=st.none() | st.integers(1, 9),
)  # fmt: skip
def test_what_is_saved_is_loaded(tmp_path_factory, name, **changes):
    folder = tmp_path_factory.mktemp("mined")
    mined = example(**changes)
    # torch gives modules any name without a dot.
    layer = dataclasses.replace(mined["fc"], layer=dataclasses.replace(FULL, name=name))
    mined.layers[name] = layer
    mined.save(folder)
    assert same(mined, Mined.load(folder))


def test_layers_are_found_by_name_and_alias():
    mined = example()
    assert list(mined) == ["features.conv", "fc"]
    assert mined["features.relu"] is mined["features.conv"]
    with pytest.raises(KeyError, match=r"'conv9' was not mined; there are features\.conv, fc"):
        mined["conv9"]


def test_counts_and_words():
    mined = example()
    layer = mined["features.conv"]
    layer.images = torch.tensor([[4, 2, 1], [3, -1, -1], [-1, -1, -1], [1, 2, 3]])
    assert layer.count.tolist() == [3, 1, 0, 3]
    assert "features.conv: 4 maps of (6, 5); 1 dead, 1 with few entries" in repr(mined)
    assert "1 skipped" in repr(mined)
    assert "1 dead" in repr(layer)


def test_a_second_save_leaves_nothing_of_the_first(tmp_path):
    (tmp_path / "mine.txt").write_text("a user's own file")
    example(0).save(tmp_path)
    first = set(files(tmp_path))
    example(5, images_seen=41).save(tmp_path)
    second = set(files(tmp_path))
    assert first & second == {"mine.txt", "mined.json"}
    assert len(second) == 4
    assert same(Mined.load(tmp_path), example(5, images_seen=41))


class Crash(BaseException):
    """Nothing in a save catches it or cleans up after it, so the disk looks as it does after kill -9."""


CALLS = {"save_file": safetensors.torch, "fsync": os, "replace": os}


def crash_at(monkeypatch, step):
    """The step-th call that touches the disk does not happen, nor do those after it."""
    calls = itertools.count()

    def dying(call):
        def die_or_call(*args, **kwargs):
            if next(calls) == step:
                raise Crash
            return call(*args, **kwargs)

        return die_or_call

    for name, owner in CALLS.items():
        monkeypatch.setattr(owner, name, dying(getattr(owner, name)))


@pytest.mark.parametrize("step", range(8))
@pytest.mark.parametrize("first", [True, False])
def test_a_crash_at_any_step_of_a_save_leaves_the_former_one(tmp_path, monkeypatch, step, first):
    old, new = example(0), example(5, images_seen=41)
    if not first:
        old.save(tmp_path)
    with monkeypatch.context() as patch:
        crash_at(patch, step)
        with pytest.raises(Crash):
            new.save(tmp_path)
    if first:
        with pytest.raises(FileNotFoundError, match=r"holds no mined\.json"):
            Mined.load(tmp_path)
    else:
        assert same(Mined.load(tmp_path), old)
    new.save(tmp_path)
    assert same(Mined.load(tmp_path), new)
    assert len(files(tmp_path)) == 3  # nothing is left of the save that died


def test_a_crash_after_the_last_step_leaves_the_new_one(tmp_path, monkeypatch):
    example(0).save(tmp_path)
    with monkeypatch.context() as patch:
        crash_at(patch, 8)
        example(5, images_seen=41).save(tmp_path)  # two layers and the document: 2 * 3 + 2 calls
    assert same(Mined.load(tmp_path), example(5, images_seen=41))


def spoil(folder, change):
    path = folder / "mined.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_damage_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="must be a folder that mining has finished"):
        Mined.load(tmp_path)
    example().save(tmp_path)
    tensors = tmp_path / "fc.1.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-5])
    with pytest.raises(RuntimeError, match=r"fc\.1\.safetensors is damaged"):
        Mined.load(tmp_path)
    tensors.unlink()
    with pytest.raises(FileNotFoundError, match=r"names fc\.1\.safetensors, which is missing"):
        Mined.load(tmp_path)
    tensors.write_bytes(whole)
    spoil(tmp_path, lambda document: document.update(schema=99))
    with pytest.raises(RuntimeError, match="has schema 99; this version of zfcuda reads 1"):
        Mined.load(tmp_path)
    spoil(tmp_path, lambda document: (document.update(schema=1), document.pop("gates")))
    with pytest.raises(RuntimeError, match=r"mined\.json is damaged \('gates'\)"):
        Mined.load(tmp_path)
    (tmp_path / "mined.json").write_text("{")
    with pytest.raises(RuntimeError, match=r"mined\.json is damaged"):
        Mined.load(tmp_path)


def test_the_document_is_what_the_module_says(tmp_path):
    """Every key of the schema in the module's docstring is written, and no other."""
    example().save(tmp_path)
    document = json.loads((tmp_path / "mined.json").read_text())
    keys = set(document) | set(document["layers"][0]) | set(document["sources"]["3"]) | set(document["skipped"][0])
    keys |= set(document["preprocessing"])
    assert keys == set(re.findall(r'"(\w+)":', module.__doc__)) - {"42"}
    stored = safetensors.torch.load_file(tmp_path / "features.conv.1.safetensors")
    assert {"values", "images", "positions", "patches", "switches.pool.a", "positive.features.conv"} < set(stored)
