"""What the tests share: the backends that an operator is tested on, and hypothesis' settings."""

from __future__ import annotations

import importlib
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import hypothesis
import pytest
import torch

import zfcuda
from simt import build, coverage
from simt.backend import Emulator
from zfcuda import core
from zfcuda.ops import _register

# `backend` holds no state between examples, and the emulator's first call compiles it.
hypothesis.settings.register_profile(
    "zfcuda", deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
hypothesis.settings.load_profile("zfcuda")

# A shell that runs the tests in its background has them ignore Ctrl-C, which some of them are about.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass(frozen=True)
class Backend:
    """Where a test puts its tensors (``device``) and which core then runs (``name``)."""

    name: str  # "cpu", "simt" or "cuda"
    device: torch.device


@pytest.fixture(autouse=True, scope="session")
def ieee() -> Iterator[None]:
    """Errors are compared with those of torch's float32: a test asks for another numeric mode where it is about it."""
    with zfcuda.set_fp32_precision("ieee"):
        yield


_CPU_LEVELS = [pytest.param(f"cpu_{level}", marks=pytest.mark.slow) for level in ("baseline", "v3", "v4")]


@pytest.fixture(params=["cpu", *_CPU_LEVELS, "simt", pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """Each backend in turn: ``def test_x(backend): t = t.to(backend.device)``.

    "cpu" is the module that this machine would choose; its other instruction-set levels run with ``-m slow``.
    "simt" is the CUDA kernels on the emulator of ``tests/simt``, in the place of the CPU module; a test that asks for
    "simt_fast" gets it without the checks.
    """
    name, _, level = request.param.partition("_")
    if name == "simt" or level:
        # No call is plain: memos know the core that this machine would choose.
        _register.GUARDS.append(lambda: True)
        request.addfinalizer(_register.GUARDS.pop)
    if name == "simt":
        emulator: Emulator = request.getfixturevalue("fast_emulator" if level else "emulator")
        monkeypatch.setitem(core.BACKENDS, "cpu", lambda: emulator)
        monkeypatch.setattr(core, "_address", emulator.address)
        monkeypatch.setattr(core, "_exec", lambda device: (0, 0, 1, core.cuda_precision()))
    elif level:
        if level != "baseline" and level > _cpu_level():
            pytest.skip(f"this machine does not run x86-64-{level}")
        monkeypatch.setitem(core.BACKENDS, "cpu", lambda: importlib.import_module(f"zfcuda.core._cpu_{level}"))
    elif name == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU: torch.cuda.is_available() is False")
    yield Backend(name, torch.device("cuda", 0) if name == "cuda" else torch.device("cpu"))


def _cpu_level() -> str:
    return core.cpu().__name__.rpartition("_")[2]


@pytest.fixture(scope="session")
def emulator(request: pytest.FixtureRequest) -> Iterator[Emulator]:
    """The CUDA kernels on the checking emulator, compiled at first use."""
    if request.config.option.simt_coverage is None:
        yield Emulator(build.backend())
        return
    counting = Emulator(build.backend(coverage=True), orders=("forward",))
    yield counting
    counting.controls.zf_simt_dump_coverage()


@pytest.fixture(scope="session")
def fast_emulator() -> Emulator:
    """The same without the checks, for real layers."""
    return Emulator(build.backend(fast=True), orders=("forward",))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """``threads(2)`` sets the number of threads for the rest of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--simt-coverage",
        metavar="PERCENT",
        type=float,
        help="run 'simt' without checks, count what the tests cover of csrc/cuda, and fail below PERCENT of its lines",
    )


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        return
    build.fetch_nvcc()
    if config.option.simt_coverage is not None:
        build.forget_coverage()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    least = session.config.option.simt_coverage
    if least is not None and not hasattr(session.config, "workerinput"):
        functions = coverage.read(build.COUNTS, build.ROOT / "csrc/cuda")
        (build.ROOT / "build/coverage.md").write_text(coverage.page(functions))
        covered = coverage.shares(functions)
        print("\nOf csrc/cuda, each instantiation by itself: {:.1f} % of lines, {:.1f} % of branches".format(*covered))
        if covered[0] < least and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
