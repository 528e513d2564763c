"""A whole forward pass, and a batch of projections, as CUDA graphs: nothing on the way waits for the host.

Without a GPU a stand-in takes the part of the graph. It cannot record, but it fails at every call that a capture
forbids: reading a value back, results whose size depends on values, and tensors made of the host's numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import zfcuda
from zfcuda import core

Function = Callable[..., tuple[Tensor, ...]]


class Forbidden(TorchDispatchMode):
    """Fails at what cannot be captured."""

    NAMES = frozenset(
        f"aten.{name}"
        for name in (
            "_local_scalar_dense.default",
            "is_nonzero.default",
            "nonzero.default",
            "masked_select.default",
            "_unique2.default",
            "unique_dim.default",
            "unique_consecutive.default",
            "lift_fresh.default",
        )
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = func is torch.ops.aten.index.Tensor and any(t is not None and t.dtype == torch.bool for t in args[1])
        assert not masks and str(func) not in self.NAMES, f"{func} would wait for the device"
        return func(*args, **(kwargs or {}))


class Rehearsal:
    """The stand-in: the same function on the same tensors, under the rules of a capture."""

    device = torch.device("cpu")

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    def record(self, function: Function, inputs: tuple[Tensor, ...]) -> Callable[[], tuple[Tensor, ...]]:
        def replay() -> tuple[Tensor, ...]:
            with self.monkeypatch.context() as patch:
                patch.setattr(core, "capturing", lambda like: True)
                for name in (
                    "item",
                    "tolist",
                    "__int__",
                    "__float__",
                    "__bool__",
                    "__index__",
                ):  # within operators, too
                    patch.setattr(Tensor, name, lambda *_: pytest.fail("a value is read back from the device"))
                with Forbidden():
                    return function(*inputs)

        replay()
        return replay


class Graph:
    """A CUDA graph."""

    device = torch.device("cuda", 0)

    def record(self, function: Function, inputs: tuple[Tensor, ...]) -> Callable[[], tuple[Tensor, ...]]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function(*inputs)  # loads the kernels
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = function(*inputs)

        def replay() -> tuple[Tensor, ...]:
            graph.replay()
            return outputs

        return replay


@pytest.fixture(params=["rehearsal", pytest.param("cuda", marks=pytest.mark.gpu)])
def recorder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Rehearsal | Graph:
    if request.param == "rehearsal":
        return Rehearsal(monkeypatch)
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU: torch.cuda.is_available() is False")
    return Graph()


def check(recorder: Rehearsal | Graph, function: Function, first: tuple[Tensor, ...], then: tuple[Tensor, ...]) -> None:
    """What was recorded with the first inputs gives for others what a plain call gives."""
    inputs = tuple(t.to(recorder.device, copy=True) for t in first)
    replay = recorder.record(function, inputs)
    for values in (first, then):
        for into, value in zip(inputs, values, strict=True):
            into.copy_(value)
        replayed = replay()
        for got, wanted in zip(replayed, function(*inputs), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max() + 1))
            assert wanted.ne(0).any()


@functools.lru_cache
def net(device: torch.device) -> zfcuda.models.ZFNet:
    torch.manual_seed(0)
    widths = (8, 12, 16, 16, 8)
    return zfcuda.models.zfnet(10, widths=widths, fc_width=16, input_size=224).eval().to(device)


IMAGES = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
OTHERS = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
@pytest.mark.parametrize("prepare", [lambda model: model, zfcuda.optimize], ids=["as it is", "optimised"])
def test_forward(recorder: Rehearsal | Graph, prepare: Callable[[torch.nn.Module], torch.nn.Module]) -> None:
    model = prepare(net(recorder.device))
    check(recorder, lambda images: (model(images),), (IMAGES,), (OTHERS,))


@pytest.mark.parametrize("gate", ["deconvnet", "backprop", "guided"])
@pytest.mark.parametrize("layer", ["conv1", "conv2", "conv3", "conv5", "fc7"])
@pytest.mark.parametrize("dense", [False, True], ids=["local", "dense"])
def test_projections(recorder: Rehearsal | Graph, layer: str, gate: str, dense: bool) -> None:
    """Images, forward pass and projections in one graph, of units that are asked for anew each time."""
    deconvnet = zfcuda.DeconvNet(net(recorder.device))

    def project(images: Tensor, units: Tensor) -> tuple[Tensor, ...]:
        crops = deconvnet.project(images, layer, units, gate=gate, dense=dense, crop=True)
        return crops.pixels, crops.boxes, deconvnet.project(images, layer, units[:, 0], gate=gate, dense=dense)

    units = torch.tensor([[0, 3, 5], [2, 2, 7]])
    check(recorder, project, (IMAGES, units), (OTHERS, units.flip(0, 1)))


def test_places_and_starts_that_are_given(recorder: Rehearsal | Graph) -> None:
    deconvnet = zfcuda.DeconvNet(net(recorder.device))

    def project(images: Tensor, units: Tensor, position: Tensor, start: Tensor) -> tuple[Tensor, ...]:
        return (deconvnet.project(images, "conv4", units, position, start),)

    units, starts = torch.tensor([[1, 4], [0, 9]]), torch.tensor([[1.0, 2.0], [0.5, -1.0]])
    places = torch.tensor([[[0, 0], [6, 12]], [[12, 12], [3, 4]]])
    check(recorder, project, (IMAGES, units, places, starts), (OTHERS, units, places.flip(0), starts * 2))
