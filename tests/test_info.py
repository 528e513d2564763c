"""``zfcuda info``: what it says of this machine, and the remedy it names for each thing that can be missing."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import zfcuda
from zfcuda import core
from zfcuda.cli import main
from zfcuda.info import Cpu, Cuda, Facts, Gpu, collect

H100 = Gpu("NVIDIA H100", 90, 80 * 2**30)
TARGETS = ["sm_75", "sm_80", "sm_90", "sm_120", "compute_120"]
COMPLETE = Facts(
    zfcuda="0.1.0",
    torch="2.13.0",
    torch_cuda="13.0",
    python="3.11.7",
    system="Linux x86_64",
    cpu=Cpu(["x86-64"], "x86-64", "x86-64", 2, ["/torch/lib/libgomp.so.1"]),
    cuda=Cuda((13, 0), TARGETS, (13, 0), [H100]),
    present=[H100],
    display_driver="580.65.06",
)


def with_cuda(**changes) -> Facts:
    return dataclasses.replace(COMPLETE, cuda=dataclasses.replace(COMPLETE.cuda, **changes))


def test_nothing_is_missing_on_a_complete_machine() -> None:
    assert COMPLETE.missing == []


@pytest.mark.parametrize(
    "facts, what, remedy",
    [
        (dataclasses.replace(COMPLETE, cuda=None), "built for the CPU only", "ZFCUDA_CUDA=on pip install"),
        (dataclasses.replace(with_cuda(driver=(0, 0), gpus=[]), present=[]), "no NVIDIA GPU", "at least 580"),
        (with_cuda(driver=(12, 4), gpus=[]), "serves CUDA 12.4", "at least 580"),
        (with_cuda(driver=(12, 4), gpus=[]), "built with 13.0", "CUDA_HOME=/usr/local/cuda-12.4 pip install"),
        (with_cuda(gpus=[]), "sees no GPU", "CUDA_VISIBLE_DEVICES"),
        (with_cuda(gpus=[Gpu("V100", 70)]), "no kernel was compiled", "ZFCUDA_CUDA_ARCHS=70"),
        (with_cuda(gpus=[Gpu("next", 130)]), "from PTX", "ZFCUDA_CUDA_ARCHS=130"),
        (with_cuda(gpus=[Gpu("B200", 100)]), "no kernel was compiled", "ZFCUDA_CUDA_ARCHS=100"),
        (dataclasses.replace(COMPLETE, torch_cuda=None), "has no CUDA", "pip install --force-reinstall torch"),
        (
            dataclasses.replace(COMPLETE, cpu=dataclasses.replace(COMPLETE.cpu, openmp=["a.so", "b.so"])),
            "two OpenMP runtimes",
            "libgomp.so.1",
        ),
    ],
)
def test_each_lack_names_its_remedy(facts: Facts, what: str, remedy: str) -> None:
    [(said, named)] = facts.missing
    assert what in said
    assert remedy in named


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 120, 121])
def test_a_binary_serves_later_minor_versions(arch: int) -> None:
    assert with_cuda(gpus=[Gpu("GPU", arch)]).missing == []


def test_facts_of_this_process() -> None:
    facts = collect()
    assert facts.torch == torch.__version__
    assert facts.cpu.in_use == core.cpu().target()
    assert facts.cpu.in_use in facts.cpu.built
    assert (facts.cuda is None) == (not any(Path(path).glob("_cuda.*.so") for path in core.__path__))


def test_the_command_prints_versions_levels_and_every_remedy() -> None:
    out = CliRunner().invoke(main, ["info"], env={"COLUMNS": "200"})
    assert out.exit_code == 0, out.output
    for fact in (zfcuda.__version__, torch.__version__, core.cpu().target()):
        assert fact in out.output


def test_json_is_one_object_with_the_same_remedies() -> None:
    out = CliRunner().invoke(main, ["info", "--json"])
    told = json.loads(out.output)
    assert told["zfcuda"] == zfcuda.__version__
    assert [(entry["what"], entry["remedy"]) for entry in told["missing"]] == collect().missing


def test_one_openmp_runtime_in_a_process() -> None:
    """After a parallel call, torch and the core share one libgomp, where torch brings it under its own name."""
    if not list(Path(torch.__file__).parent.glob("lib/libgomp.so.1")):
        pytest.skip(f"torch {torch.__version__} does not bring libgomp.so.1")
    script = (
        "import torch, zfcuda, zfcuda.info; torch.set_num_threads(2); x = torch.randn(8, 8, 32, 32);"
        "torch.relu(x); zfcuda.ops.max_pool2d(x, 2); print(len(zfcuda.info.collect().cpu.openmp))"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert out.stdout.strip() == "1", out.stderr
