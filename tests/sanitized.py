"""Every sample of every operator, and the fuzz, on a core compiled with ASan and UBSan: ``sanitized.py MODULE``.

A process of its own, with the sanitizers' libraries loaded first: see ``test_fuzz.py``.
"""

from __future__ import annotations

import importlib.util
import sys

import torch

from zfcuda import core

spec = importlib.util.spec_from_file_location("_cpu_baseline", sys.argv[1])
assert spec and spec.loader
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
core.cpu = core.BACKENDS["cpu"] = lambda: module  # before the operators are imported: their memos are its, too

from hypothesis import HealthCheck, given, settings  # noqa: E402
from operators import OPERATORS  # noqa: E402
from oracles import evaluate  # noqa: E402
from test_fuzz import calls, check  # noqa: E402


def fuzz(declared):
    @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
    @given(calls(declared))
    def run(arguments):
        check(declared, arguments)

    run()


for declared in OPERATORS:
    for sample in declared.samples():
        for dtype in (torch.float32, torch.float64):
            for layout in ("contiguous", "channels_last"):
                evaluate(declared.call, sample.on(torch.device("cpu"), dtype, layout))
                with torch.no_grad():
                    for _ in range(2):
                        sample.on(torch.device("cpu"), dtype, layout).call(declared.call)

    fuzz(declared)
    print(declared.name, "is clean")
