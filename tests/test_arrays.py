"""Arrays in, arrays of the same kind out: NumPy's, and any that speak DLPack."""

from __future__ import annotations

import contextlib
import types

import numpy as np
import pytest
import torch
from oracles import normal, whole_numbers

from zfcuda import ops

IMAGE = normal(2, 4, 9, 8).float()
POOLED, SWITCHES = ops.max_pool2d(IMAGE, 2)
WEIGHT, BIAS = normal(6, 4, 3, 3).float(), normal(6).float()

#: A call of every operator: positional arguments, the others.
CALLS = {
    "conv2d_relu": ((IMAGE, WEIGHT, BIAS), {"stride": 2, "padding": 1}),
    "conv2d_relu_max_pool2d": ((IMAGE, WEIGHT, BIAS), {"padding": 1, "pool_kernel_size": 2}),
    "conv2d_relu_max_pool2d_maximum": ((IMAGE, WEIGHT, BIAS), {"padding": 1, "pool_kernel_size": 2}),
    "conv2d_relu_max_pool2d_norm": ((IMAGE, WEIGHT, BIAS), {"padding": 1, "pool_kernel_size": 2, "norm_size": 3}),
    "crop_windows": ((IMAGE, torch.tensor([0, 1]), torch.tensor([[0, 1], [-1, 2]]), 3), {}),
    "deconv2d": ((normal(2, 6, 4, 4).float(), WEIGHT), {"gate": "backprop", "forward": normal(2, 6, 4, 4).float()}),
    "indices_to_switches": ((ops.switches_to_indices(SWITCHES, (9, 8), 2), (9, 8), 2), {}),
    "local_response_norm": ((IMAGE, 3), {"k": 2.0}),
    "map_maximum": ((IMAGE,), {"pooled": POOLED, "switches": SWITCHES, "kernel_size": 2}),
    "max_pool2d": ((IMAGE, 2), {}),
    "max_unpool2d": ((POOLED, SWITCHES, 2), {"output_size": (9, 8)}),
    "relu_max_pool2d": ((IMAGE, 2), {}),
    "renormalize_filters_": ((WEIGHT.clone(), 0.5), {}),
    "switch_gather": ((IMAGE, SWITCHES, 2), {}),
    "switches_to_indices": ((SWITCHES, (9, 8), 2), {}),
    "unpool_relu_deconv2d": (
        (normal(2, 6, 4, 4).float(), torch.zeros(2, 6, 4, 4, dtype=torch.uint8), WEIGHT),
        {"pool_kernel_size": 2},
    ),
    "window_deconv2d": (
        (normal(3, 2, 2, 6).float(), WEIGHT, whole_numbers(3, 2).long(), (9, 8)),
        {"switches": torch.zeros(3, 2, 2, 6, dtype=torch.uint8), "pool": (2, 2, 1)},
    ),
}


class Array:
    """What CuPy's arrays are to DLPack, but on the CPU, where there is no stream."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack__(self, **options):
        assert options.get("stream") is None
        return self.tensor.__dlpack__()

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


class StandardArray(Array):
    """One that follows the array API standard."""

    def __array_namespace__(self):
        return types.SimpleNamespace(from_dlpack=lambda tensor: StandardArray(torch.from_dlpack(tensor)))


def from_dlpack(tensor):
    """This module's, as ``cupy.from_dlpack`` is that of the package that CuPy's arrays are of."""
    return Array(torch.from_dlpack(tensor))


KINDS = {
    "numpy": (np.ndarray, torch.Tensor.numpy, torch.from_numpy),
    "package": (Array, Array, lambda array: array.tensor),
    "standard": (StandardArray, StandardArray, lambda array: array.tensor),
}


def test_every_operator_is_here():
    functions = {name for name in ops.__all__ if not isinstance(getattr(ops, name), type)}
    assert functions == set(CALLS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_arrays_give_what_tensors_give(name, kind, dtype):
    cls, make, read = KINDS[kind]

    def of_dtype(value):
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(dtype) if floating else value

    def arrays(value):
        return make(value) if isinstance(value, torch.Tensor) else value

    args, kwargs = CALLS[name]
    args, kwargs = [of_dtype(a) for a in args], {k: of_dtype(v) for k, v in kwargs.items()}
    expected = getattr(ops, name)(*args, **kwargs)
    actual = getattr(ops, name)(*map(arrays, args), **{k: arrays(v) for k, v in kwargs.items()})
    assert isinstance(actual, tuple) == isinstance(expected, tuple)
    for a, e in zip(
        actual if isinstance(actual, tuple) else [actual],
        expected if isinstance(expected, tuple) else [expected],
        strict=True,
    ):
        assert type(a) is cls and torch.equal(read(a), e)


class Streams:
    """``cupy.cuda``, and what torch is told of it: streams by their addresses, 7 where torch is on its own."""

    def __init__(self, monkeypatch):
        self.theirs, self.ours = 0, 7
        monkeypatch.setattr(torch.cuda, "ExternalStream", lambda pointer, device: self.external(pointer, device))
        monkeypatch.setattr(torch.cuda, "default_stream", lambda device: 0)
        monkeypatch.setattr(torch.cuda, "stream", self.on)

    def external(self, pointer, device):
        assert pointer and device == torch.device("cuda", 1)
        return pointer

    def get_current_stream(self):
        return types.SimpleNamespace(ptr=self.theirs)

    @contextlib.contextmanager
    def on(self, stream):
        self.ours, before = stream, self.ours
        yield
        self.ours = before


class DeviceArray(Array):
    """One of a library with streams."""

    device = (2, 1)

    def __dlpack_device__(self):
        return self.device


@pytest.mark.parametrize("pointer", [0, 2, 1 << 40], ids=["legacy default", "default of the thread", "own"])
def test_work_goes_to_the_stream_of_the_array_s_library(monkeypatch, pointer):
    streams = Streams(monkeypatch)
    streams.theirs = pointer
    monkeypatch.setitem(globals(), "cuda", streams)
    seen = []
    monkeypatch.setattr(torch, "from_dlpack", lambda array: seen.append(streams.ours) or array.tensor)
    monkeypatch.setitem(globals(), "from_dlpack", lambda tensor: seen.append(streams.ours))
    ops._arrays.on_arrays(lambda x: seen.append(streams.ours) or x, (DeviceArray(IMAGE),), {})
    assert seen == [pointer] * 3  # in, the operator, out
    assert streams.ours == 7

    monkeypatch.setattr(DeviceArray, "device", (1, 0))
    seen.clear()
    ops._arrays.on_arrays(lambda x: seen.append(streams.ours) or x, (DeviceArray(IMAGE),), {})
    assert seen == [7] * 3  # arrays on the CPU have no stream


@pytest.mark.gpu
def test_cupy_on_its_own_stream():
    """Right without a wait, while the stream that feeds the operator is far behind."""
    cupy = pytest.importorskip("cupy")
    with cupy.cuda.Stream(non_blocking=True) as stream:
        source, weight, bias = (cupy.asarray(t.numpy()) for t in (IMAGE, WEIGHT, BIAS))
        slow = cupy.ones((4096, 4096), cupy.float32)
        for _ in range(8):
            slow = slow @ slow / 4096
        image = source * slow[0, 0]  # times one
        maps = ops.conv2d_relu(image, weight, bias, padding=1)
        assert isinstance(maps, cupy.ndarray) and not stream.done
        total = maps.sum()
    expected = ops.conv2d_relu(IMAGE, WEIGHT, BIAS, padding=1)
    assert abs(float(total) - float(expected.sum())) <= 1e-4 * float(expected.sum())


def test_by_name():
    assert np.array_equal(ops.max_pool2d(input=IMAGE.numpy(), kernel_size=2)[0], POOLED)


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a[..., ::-1],
        lambda a: a[::-1, ::2],
        lambda a: a.astype(">f4"),
        lambda a: np.asfortranarray(a),
        lambda a: a.transpose(0, 1, 3, 2),
        lambda a: a[:0],
        lambda a: np.lib.stride_tricks.as_strided(a, writeable=False),
    ],
    ids=["mirrored", "sliced", "byte order", "Fortran", "transposed", "empty", "read-only"],
)
def test_any_numpy_array(change):
    array = change(IMAGE.numpy())
    output, _ = ops.max_pool2d(array, 2)
    expected = torch.nn.functional.max_pool2d(torch.from_numpy(array.astype("<f4").copy()), 2)
    assert np.array_equal(output, expected)
    assert output.flags.writeable


def test_nothing_is_copied():
    """Neither on the way in nor on the way out."""
    seen = []
    function = ops._arrays.on_arrays

    def spy(x):
        seen.append(x)
        return x

    array = IMAGE.numpy()
    result = function(spy, (array,), {})
    assert seen[0].data_ptr() == array.ctypes.data == result.ctypes.data


def test_arrays_are_written_into():
    weight, output = WEIGHT.numpy().copy(), POOLED.numpy().copy()
    assert ops.renormalize_filters_(weight, 0.5).ctypes.data == weight.ctypes.data
    assert np.array_equal(weight, ops.renormalize_filters_(WEIGHT.clone(), 0.5))
    switches = SWITCHES.numpy().copy()
    results = ops.relu_max_pool2d(IMAGE.numpy(), 2, out=(output, switches))
    assert [r.ctypes.data for r in results] == [output.ctypes.data, switches.ctypes.data]
    assert np.array_equal(output, ops.relu_max_pool2d(IMAGE, 2)[0])


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "weight is a ndarray; it must be a torch.Tensor", lambda: ops.conv2d_relu(IMAGE, WEIGHT.numpy())),
        (TypeError, "input is a ndarray; it must be a torch.Tensor", lambda: ops.conv2d_relu(IMAGE.numpy(), WEIGHT)),
        (TypeError, "Array, another a numpy.ndarray", lambda: ops.conv2d_relu(IMAGE.numpy(), Array(WEIGHT))),
        (TypeError, "input is a list", lambda: ops.max_pool2d([1.0], 2)),
        (TypeError, "input is a float32", lambda: ops.max_pool2d(np.float32(1), 2)),
        (TypeError, "longdouble|float128", lambda: ops.max_pool2d(np.zeros((1, 1, 2, 2), np.longdouble), 2)),
        (TypeError, "written into, but it has negative", lambda: ops.renormalize_filters_(WEIGHT.numpy()[::-1], 0.5)),
        (RuntimeError, "input has dtype torch.int64", lambda: ops.max_pool2d(np.zeros((1, 1, 2, 2), int), 2)),
        (RuntimeError, "input has shape", lambda: ops.max_pool2d(np.zeros((2, 2)), 2)),
    ],
)
def test_refuses(error, message, call):
    with pytest.raises(error, match=message):
        call()
