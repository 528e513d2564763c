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

from zfcuda.bench import report

__all__ = ["Done", "Step", "archive", "report_of", "run_steps", "steps"]

SUMMARY = "summary.json"
SANITIZERS = ("memcheck", "racecheck")
#: Of a sanitizer: it slows kernels down a hundred times, so it sees the operators' own tests alone.
SANITIZED = {
    *("test_conv2d_relu", "test_conv2d_relu_max_pool2d", "test_conv2d_relu_max_pool2d_maximum"),
    *("test_conv2d_relu_max_pool2d_norm", "test_deconv2d", "test_unpool_relu_deconv2d"),
    *("test_max_pool2d", "test_relu_max_pool2d", "test_max_unpool2d", "test_switch_gather", "test_local_response_norm"),
    *("test_window_deconv2d", "test_crop_windows", "test_map_maximum", "test_renormalize_filters"),
}
#: A group of cases, like a file of tests, is a process: a kernel that fails spoils all that follows it in its own.
GROUPS = ("operators", "calls", "layers", "grouped", "nets", "training", "mining", "projection")
TESTED = (0, 5)  # 5: no test of the file needs a GPU
HOUR = 3600.0
#: A source build needs nvcc; where the machine has none, pip brings it.
FETCH_NVCC = "import sys; sys.path.insert(0, 'csrc'); import build; build.fetch_nvcc(); print(build.find_toolkit())"
LEFT_OUT = ("*.pt", "*.safetensors")  # of the archive: a trained network, of many megabytes


@dataclass(frozen=True)
class Step:
    """A command whose output goes to ``<name>.log``; ``limit`` is the seconds after which it is stopped."""

    name: str
    command: Sequence[str]
    env: tuple[tuple[str, str], ...] = ()
    accepted: tuple[int, ...] = (0,)
    limit: float = 2 * HOUR


@dataclass(frozen=True)
class Done:
    """What became of a step: its exit code (None: not started, or stopped), seconds, and its last line."""

    name: str
    command: Sequence[str]
    code: int | None
    seconds: float
    said: str
    good: bool


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
    files = sorted((source / "tests").glob("test_*.py"))
    found = [
        Step("nvcc", [python, "-c", FETCH_NVCC]),
        Step("build", [python, "setup.py", "build_ext", "--inplace"], (("ZFCUDA_CUDA", "on" if gpu else "auto"),)),
        Step("nvidia-smi", ["nvidia-smi", "-q"]),
        Step("info", [python, "-m", "zfcuda", "info", "--json"]),
        Step("packages", [python, "-m", "pip", "freeze"]),
    ]

    def test(path: Path) -> list[str]:
        return [python, "-m", "pytest", "-n", "0", *marked, f"tests/{path.name}"]

    for path in files:
        results = f"--junitxml={folder / 'tests' / path.stem}.xml"
        found.append(Step(f"tests/{path.stem}", [*test(path), results], accepted=TESTED))
    for tool in SANITIZERS if sanitize else ():
        checked = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        # torch's caching allocator hides what is beyond the end of a tensor.
        env = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
        for path in files:
            if path.stem in SANITIZED:
                found.append(Step(f"{tool}/{path.stem}", [*checked, *test(path)], env, TESTED, 8 * HOUR))
    for group in GROUPS:
        options = ["-k", f"{group}/", "--device", device, "--output", str(folder / "bench" / group)]
        quickly = ["--quick"] if quick else []
        found.append(Step(f"bench/{group}", [python, "-m", "zfcuda", "bench", *options, *quickly]))
    return [*found, Step("nvidia-smi-after", ["nvidia-smi", "-q", "-d", "CLOCK,PERFORMANCE"])]


def run_steps(todo: Sequence[Step], folder: Path, source: Path, tell: Callable[[str], None]) -> list[Done]:
    """Run all of them, whatever becomes of each; the summary is written after every one."""
    folder.mkdir(parents=True, exist_ok=True)
    done: list[Done] = []
    for step in todo:
        tell(f"{step.name}: {' '.join(step.command)}")
        done.append(_run(step, folder, source))
        last = done[-1]
        tell(f"  {'done' if last.good else f'FAILED, exit code {last.code}'}, {last.seconds:.0f} s: {last.said}")
        summary = json.dumps([asdict(d) for d in done], indent=1)
        (folder / SUMMARY).write_text(summary, encoding="utf-8")
    return done


def _run(step: Step, folder: Path, source: Path) -> Done:
    log, start = folder / f"{step.name}.log", time.perf_counter()
    log.parent.mkdir(parents=True, exist_ok=True)
    code, problem = None, ""
    paths = os.pathsep.join(filter(None, (str(source.resolve()), os.environ.get("PYTHONPATH"))))
    env = os.environ | {"PYTHONPATH": paths} | dict(step.env)
    with log.open("wb") as out:
        try:
            code = subprocess.run(
                step.command, cwd=source, env=env, stdout=out, stderr=subprocess.STDOUT, timeout=step.limit
            ).returncode
        except OSError as error:
            problem = str(error)
        except subprocess.TimeoutExpired:
            problem = f"stopped after {step.limit:.0f} s"
    lines = log.read_text(errors="replace").strip().splitlines() or [""]
    seconds, said = time.perf_counter() - start, problem or lines[-1]
    return Done(step.name, list(step.command), code, seconds, said, code in step.accepted)


def report_of(folder: Path, done: Sequence[Done]) -> None:
    """Write ``README.txt``, what a reader should look at first."""
    lines = ["zfcuda gpu-report", ""]
    for step in done:
        state = "ok    " if step.good else "FAILED"
        lines.append(f"{state} {step.name:<36} {step.seconds:8.0f} s  {step.said[:150]}")
    pages = [str(page.relative_to(folder)) for page in sorted(folder.glob(f"bench/*/{report.PAGE}"))]
    lines += ["", *(pages or ["No times were taken."])]
    (folder / "README.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def archive(folder: Path) -> Path:
    """The folder as a ZIP file beside it, without trained networks."""
    path = folder.with_name(f"{folder.name}.zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for part in sorted(folder.rglob("*")):
            if part.is_file() and not any(part.match(pattern) for pattern in LEFT_OUT):
                file.write(part, Path(folder.name) / part.relative_to(folder))
    return path
