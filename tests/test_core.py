"""What all operators share below torch: offsets beyond 31 bits, forked children, devices, compilation."""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from oracles import normal
from torch.utils.data import DataLoader, Dataset

from zfcuda import core, ops
from zfcuda.ops import _conv

CSRC = Path(__file__).resolve().parent.parent / "csrc"


def test_offsets_do_not_overflow(tmp_path):
    """Layout of csrc/shapes.h on tensors of up to 2^62 elements, against Python's integers."""
    source = tmp_path / "offset.cpp"
    source.write_text(
        '#include "shapes.h"\n'
        'extern "C" std::int64_t offset(std::int64_t c, std::int64_t h, std::int64_t w, bool last, std::int64_t n,\n'
        "                               std::int64_t i, std::int64_t y, std::int64_t x) {\n"
        "    return zfcuda::Layout{c, h, w, last}.offset(n, i, y, x);\n"
        "}\n"
    )
    library = tmp_path / "offset.so"
    compiler = os.environ.get("CXX") or shutil.which("g++")
    subprocess.run([compiler, "-std=c++17", "-shared", "-fPIC", f"-I{CSRC}", source, "-o", library], check=True)
    offset = ctypes.CDLL(str(library)).offset
    offset.restype = ctypes.c_int64
    offset.argtypes = [ctypes.c_int64] * 3 + [ctypes.c_bool] + [ctypes.c_int64] * 4
    draw = random.Random(0)
    for _ in range(500):
        batch, c, h, w = (draw.randint(1, 1 << 15) for _ in range(4))
        n, i, y, x = (draw.randrange(size) for size in (batch, c, h, w))
        assert offset(c, h, w, False, n, i, y, x) == ((n * c + i) * h + y) * w + x
        assert offset(c, h, w, True, n, i, y, x) == ((n * h + y) * w + x) * c + i


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_more_elements_than_31_bits(backend):
    """A plane of 2^31 + 2^16 pixels, sampled by a stride of 256: pool, unpool, convolution down and up."""
    side, stride = (1 << 15) + 256, 256
    height = (1 << 16) + 512
    free = torch.cuda.mem_get_info()[0] if backend.name == "cuda" else _free_memory()
    if free < 10 << 30:
        pytest.skip("needs 10 GiB of memory")
    x = torch.zeros(1, 1, height, side, device=backend.device)
    assert x.numel() > 1 << 31
    samples = torch.arange(1.0, 1 + (height // stride) * (side // stride), device=backend.device)
    samples = samples.view(1, 1, height // stride, side // stride)
    x[:, :, ::stride, ::stride] = samples
    one = torch.ones(1, 1, 1, 1, device=backend.device)
    output, switches = ops.max_pool2d(x, 2, stride)
    assert torch.equal(output, samples) and not switches.any()
    assert torch.equal(ops.conv2d_relu(x, one, stride=stride), samples)
    del x  # there is room for one
    for way in (
        lambda: ops.max_unpool2d(samples, switches, 2, stride, output_size=(height, side)),
        lambda: ops.deconv2d(samples, one, stride=stride, output_padding=stride - 1),
    ):
        y = way()
        assert y.shape == (1, 1, height, side) and torch.equal(y[:, :, ::stride, ::stride], samples)
        assert int(y.count_nonzero()) == samples.numel()
        del y


def _free_memory() -> int:
    """Bytes that Linux could give, its caches included."""
    available = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return int(available.split()[1]) << 10


def _every_operator(x):
    y = ops.conv2d_relu(x, x.new_ones(3, 3, 3, 3), padding=1)
    pooled, switches = ops.max_pool2d(y, 2)
    y = ops.max_unpool2d(ops.local_response_norm(pooled, 3), switches, 2, output_size=y.shape)
    return ops.deconv2d(y, x.new_ones(3, 3, 3, 3), padding=1)


class _Loaded(Dataset):
    """Items that a worker computes with every operator."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return _every_operator(normal(1, 3, 32, 32, seed=index).float())


def test_a_forked_child_computes(threads):
    """A worker forked from a process whose threads have run does not hang, and gets the same bits."""
    threads(2)
    expected = [_Loaded()[i] for i in range(2)]
    loader = DataLoader(_Loaded(), batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=60)
    for actual, wanted in zip(loader, expected, strict=True):
        assert torch.equal(actual, wanted)


def test_a_device_without_kernels_is_named(monkeypatch):
    monkeypatch.delitem(core.BACKENDS, "cpu")
    never_called = torch.ones(1, 1, 13, 37)  # what was called before is repeated without a look at the device's core
    with pytest.raises(RuntimeError, match="runs on cuda tensors, not on cpu"):
        ops.max_pool2d(never_called, (11, 7))


@pytest.mark.slow
def test_inductor(threads):
    """All operators in one graph of torch's default compiler, forward and backward."""
    threads(2)
    x = normal(1, 3, 16, 16).float().contiguous(memory_format=torch.channels_last)
    results = []
    for function in (_every_operator, torch.compile(_every_operator, fullgraph=True)):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        output = function(leaf.sin())
        results.append((output.detach(), torch.autograd.grad(output.square().sum(), leaf)[0]))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("name", ["conv2d_relu", "deconv2d"])
def test_ctrl_c_between_parts_of_a_long_call(monkeypatch, name):
    """A long call is made in parts, with the same results; an interrupt ends it before the next."""
    x, weight = normal(5, 3, 6, 6).float(), normal(3, 3, 3, 3, seed=1).float().requires_grad_()
    operator, core_run = getattr(ops, name), core.run
    expected = operator(x, weight)
    monkeypatch.setattr(_conv, "MOST_AT_A_TIME", 1)
    made = []

    def run(*arguments):
        made.append(arguments)
        if len(made) == 7:
            signal.raise_signal(signal.SIGINT)
        core_run(*arguments)

    monkeypatch.setattr(core, "run", run)
    assert torch.equal(operator(x, weight), expected) and len(made) == 5  # an image each
    with pytest.raises(KeyboardInterrupt):
        operator(x, weight)
    assert len(made) == 7
