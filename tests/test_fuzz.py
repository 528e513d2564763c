"""Any one argument replaced by any value: a result like that of the fake, or an error that names an argument."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operators import OPERATORS
from oracles import LAYOUTS, NATIVE
from torch import Tensor

from simt.build import build
from zfcuda import core

INTEGERS = st.sampled_from([0, 1, 2, 3, 5, -1, -7, 255, 256, 257, 2**31, 2**40, 2**62, 2**63, -(2**63)])
OTHERS = st.sampled_from([None, True, 1.0, float("nan"), "x", "", "same", "guided", "overwrite", b"1", [], (), {}])
NUMBERS = INTEGERS | st.floats() | st.lists(INTEGERS | OTHERS, max_size=5) | st.tuples(INTEGERS, INTEGERS)


@st.composite
def tensors(draw, like: Tensor | None):
    """Of another size, dtype or layout than ``like``, or of its own."""
    shape = list((3, 2, 5, 4) if like is None else like.shape)
    for _ in range(draw(st.integers(0, 2))):
        change = draw(st.sampled_from(["size", "drop", "add"]))
        if change == "add" or not shape:
            shape.insert(draw(st.integers(0, len(shape))), draw(st.integers(0, 3)))
        elif change == "drop":
            shape.pop(draw(st.integers(0, len(shape) - 1)))
        else:
            shape[draw(st.integers(0, len(shape) - 1))] = draw(st.integers(0, 9))
    dtypes = [*core.DTYPES, torch.uint8, torch.int64, torch.bool, torch.complex64]
    dtype = draw(st.sampled_from(([] if like is None else [like.dtype] * 6) + dtypes))
    values = draw(st.sampled_from([0, 1, 3, -1, 2**40, float("nan"), float("inf")]))
    tensor = torch.full(shape, values, dtype=torch.float64).to(dtype)
    if draw(st.booleans()) and tensor.dim():
        tensor = tensor[:1].expand(shape) if shape[0] else tensor
    if tensor.dim() == 4:
        tensor = LAYOUTS[draw(st.sampled_from(list(LAYOUTS)))](tensor)
    return draw(st.sampled_from([tensor] * 9 + [tensor.to("meta")]))


@st.composite
def calls(draw, declared):
    """Keyword arguments of a sample's call, one or two of them replaced."""
    sample = draw(st.sampled_from(declared.samples()))
    placed = sample.on(torch.device("cpu"), draw(st.sampled_from(list(core.DTYPES))))
    names = list(inspect.signature(declared.call).parameters)
    arguments = dict(zip(names, [None if t is None else t.detach() for t in placed.tensors], strict=False))
    arguments |= placed.options
    for name in draw(st.lists(st.sampled_from(names), min_size=1, max_size=2)):
        old = arguments.get(name)
        strange = NUMBERS | OTHERS
        arguments[name] = draw(tensors(old) | strange if old is None or isinstance(old, Tensor) else strange)
    return arguments


def check(declared, arguments) -> None:
    names = list(inspect.signature(declared.call).parameters)
    try:
        result = declared.call(**arguments)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        assert any(name in str(error) for name in names), error
        return
    again = declared.call(**arguments)  # perhaps repeated
    on_meta = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in arguments.items()}
    outcomes = (r if isinstance(r, tuple) else (r,) for r in (result, again, declared.call(**on_meta)))
    for one, other, fake in zip(*outcomes, strict=True):
        assert one.is_meta or torch.equal(one.nan_to_num(), other.nan_to_num())
        assert (one.shape, one.dtype, one.stride()) == (fake.shape, fake.dtype, fake.stride())


@NATIVE
@pytest.mark.parametrize("declared", OPERATORS, ids=lambda d: d.name)
def test_a_result_or_an_error_that_names_an_argument(backend, declared):
    @settings(max_examples=150, suppress_health_check=list(HealthCheck))
    @given(calls(declared))
    def run(arguments):
        check(declared, arguments)

    run()


@pytest.mark.slow
def test_under_address_and_undefined_behaviour_sanitizers(tmp_path, monkeypatch):
    """The CPU core, memos and binding included: no access out of bounds, no overflow."""
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1"
    compiler = os.environ.get("CXX", "g++").split()[0]
    monkeypatch.setenv("CXX", f"{compiler} {flags}")
    build.ninja(build.cpu_modules()[:1], tmp_path, tmp_path / "work")
    (module,) = tmp_path.glob("_cpu_baseline*.so")
    found = [
        subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(run.stdout.strip() for run in found),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "OMP_NUM_THREADS": "2",
    }
    script = Path(__file__).with_name("sanitized.py")
    run = subprocess.run([sys.executable, script, module], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-8000:]
    assert run.stdout.count("is clean") == len(OPERATORS)
