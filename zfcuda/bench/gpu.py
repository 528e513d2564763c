"""``zfcuda gpu-report``: everything that a machine with a GPU can tell, in one folder to attach to an issue.

Each step is a command with a log of its own. One that fails, or that cannot be started, is recorded, and the next ones
go on: whoever lends a GPU should not be asked twice.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from zfcuda.bench import RECORD, report

__all__ = ["Done", "Step", "archive", "report_of", "run_steps", "steps"]

SUMMARY = "summary.json"
SANITIZERS = ("memcheck", "racecheck")
#: Of a sanitizer: it slows kernels down a hundred times, so it sees the operators' own tests alone.
SANITIZED = ("tests/test_conv2d_relu.py", "tests/test_conv2d_relu_max_pool2d.py", "tests/test_deconv2d.py",
             "tests/test_unpool_relu_deconv2d.py", "tests/test_max_pool2d.py", "tests/test_relu_max_pool2d.py",
             "tests/test_max_unpool2d.py", "tests/test_switch_gather.py", "tests/test_local_response_norm.py",
             "tests/test_window_deconv2d.py", "tests/test_crop_windows.py", "tests/test_map_maximum.py",
             "tests/test_renormalize_filters.py")  # fmt: skip
#: A source build needs nvcc; where the machine has none, pip brings it.
FETCH_NVCC = "import sys; sys.path.insert(0, 'csrc'); import build; build.fetch_nvcc(); print(build.find_toolkit())"
LEFT_OUT = ("*.pt", "*.safetensors")  # of the archive: a trained network, of many megabytes


@dataclass(frozen=True)
class Step:
    """A command whose output goes to ``<name>.log``."""

    name: str
    command: Sequence[str]
    env: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Done:
    """What became of a step: its exit code (None: it could not be started), seconds, and its last line."""

    name: str
    command: Sequence[str]
    code: int | None
    seconds: float
    said: str

    @property
    def good(self) -> bool:
        return self.code == 0


def steps(folder: Path, source: Path, device: str, quick: bool, sanitize: bool) -> list[Step]:
    """The steps, in order.

    Parameters
    ----------
    folder
        Of the report.
    source
        A clone of the repository: the tests are in it, and the core is built there for the GPUs that are present.
    device
        "cuda"; "cpu" rehearses the same steps on a machine without a GPU.
    quick
        The quick benchmarks.
    sanitize
        Run the operators' tests under compute-sanitizer, too: hours.
    """
    python, folder = sys.executable, folder.resolve()
    gpu = device.startswith("cuda")
    marked = ["-m", "gpu"] if gpu else ["-k", "not simt"]
    test = [python, "-m", "pytest", "-n", "0", *marked]
    found = [
        Step("nvcc", [python, "-c", FETCH_NVCC]),
        Step("build", [python, "setup.py", "build_ext", "--inplace"], (("ZFCUDA_CUDA", "on" if gpu else "auto"),)),
        Step("nvidia-smi", ["nvidia-smi", "-q"]),
        Step("info", [python, "-m", "zfcuda", "info", "--json"]),
        Step("packages", [python, "-m", "pip", "freeze"]),
        Step("tests", [*test, f"--junitxml={folder / 'tests.xml'}"]),
    ]
    if sanitize:
        present = [path for path in SANITIZED if (source / path).is_file()]
        for tool in SANITIZERS:
            checked = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *test, *present]
            # torch's caching allocator hides what is beyond the end of a tensor.
            found.append(Step(tool, checked, (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)))
    options = ["--quick"] if quick else []
    benchmark = [python, "-m", "zfcuda", "bench", "--device", device, "--output", str(folder / "bench"), *options]
    return [*found, Step("bench", benchmark), Step("nvidia-smi-after", ["nvidia-smi", "-q", "-d", "CLOCK,PERFORMANCE"])]


def run_steps(todo: Sequence[Step], folder: Path, source: Path, tell: Callable[[str], None]) -> list[Done]:
    """Run all of them, whatever becomes of each; the summary is written after every one."""
    folder.mkdir(parents=True, exist_ok=True)
    done: list[Done] = []
    for step in todo:
        tell(f"{step.name}: {' '.join(step.command)}")
        done.append(_run(step, folder, source))
        last = done[-1]
        code = "could not be started" if last.code is None else f"exit code {last.code}"
        tell(f"  {'done' if last.good else code}, {last.seconds:.0f} s: {last.said}")
        summary = json.dumps([asdict(d) for d in done], indent=1)
        (folder / SUMMARY).write_text(summary, encoding="utf-8")
    return done


def _run(step: Step, folder: Path, source: Path) -> Done:
    log, start = folder / f"{step.name}.log", time.perf_counter()
    paths = os.pathsep.join(filter(None, (str(source.resolve()), os.environ.get("PYTHONPATH"))))
    env = os.environ | {"PYTHONPATH": paths} | dict(step.env)
    with log.open("wb") as out:
        try:
            code = subprocess.run(step.command, cwd=source, env=env, stdout=out, stderr=subprocess.STDOUT).returncode
        except OSError as error:
            out.write(str(error).encode())
            code = None
    lines = log.read_text(errors="replace").strip().splitlines()
    return Done(step.name, list(step.command), code, time.perf_counter() - start, lines[-1] if lines else "")


def report_of(folder: Path, done: Sequence[Done]) -> None:
    """Write ``README.txt``, what a reader should look at first."""
    lines = ["zfcuda gpu-report", ""]
    for step in done:
        state = "ok    " if step.good else "FAILED"
        lines.append(f"{state} {step.name:<18} {step.seconds:8.0f} s  {step.said[:150]}")
    record = folder / "bench" / RECORD
    lines += ["", f"Times: bench/{report.PAGE}, bench/{RECORD}" if record.is_file() else "No times were taken."]
    (folder / "README.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def archive(folder: Path) -> Path:
    """The folder as a ZIP file beside it, without trained networks."""
    path = folder.with_name(f"{folder.name}.zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for part in sorted(folder.rglob("*")):
            if part.is_file() and not any(part.match(pattern) for pattern in LEFT_OUT):
                file.write(part, Path(folder.name) / part.relative_to(folder))
    return path
