"""Where a benchmark ran: processor, memory, GPU, versions, clocks."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

import zfcuda
from zfcuda import core

CUPY = ("cupy", "cupy-cuda12x", "cupy-cuda13x")  # one library by three names
PACKAGES = ("torch", "torchvision", "captum", "onnx", "onnxruntime", "openvino", "triton", "numpy")
CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw,clocks_event_reasons.active"


def describe(device: torch.device) -> dict[str, Any]:
    """The machine as plain facts."""
    cpuinfo = _read("/proc/cpuinfo")
    memory = re.search(r"MemTotal:\s+(\d+)", _read("/proc/meminfo"))
    facts: dict[str, Any] = {
        "processor": _field(cpuinfo, "model name") or platform.processor() or platform.machine(),
        "processors": os.cpu_count(),
        "caches": _caches(),
        "memory_bytes": 1024 * int(memory[1]) if memory else None,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "virtual": "hypervisor" in _field(cpuinfo, "flags").split(),
        "zfcuda_level": core.cpu().target(),
        "torch_level": torch.backends.cpu.get_cpu_capability(),
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        facts["gpu"] = {
            "name": gpu.name,
            "arch": f"sm_{gpu.major}{gpu.minor}",
            "multiprocessors": gpu.multi_processor_count,
            "memory_bytes": gpu.total_memory,
            "l2_bytes": gpu.L2_cache_size,
        }
    return facts


def versions() -> dict[str, str | None]:
    """Of all that takes part; None for what is not installed."""
    found: dict[str, str | None] = {"zfcuda": zfcuda.__version__, "python": platform.python_version()}
    found |= {package: _version(package) for package in PACKAGES}
    found["cupy"] = next(filter(None, map(_version, CUPY)), None)
    if torch.version.cuda:
        found |= {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def clocks(kind: str) -> dict[str, str]:
    """What may slow the machine down now: its clocks, its load, a GPU's temperature and reasons to throttle."""
    if kind == "cpu":
        megahertz = re.findall(r"cpu MHz\s*:\s*([\d.]+)", _read("/proc/cpuinfo"))
        return {"cpu MHz": " ".join(megahertz), "load": _read("/proc/loadavg").split(" ")[0]}
    if shutil.which("nvidia-smi") is None:
        return {"nvidia-smi": "not found"}
    query = ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True)
    if done.returncode:
        return {"nvidia-smi": (done.stdout + done.stderr).strip()}
    return dict(zip(CLOCKS.split(","), done.stdout.splitlines()[0].split(", "), strict=False))


def _caches() -> dict[str, int]:
    sizes = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_read(index / name).strip() for name in ("level", "type", "size"))
        if kind != "Instruction" and size.endswith("K"):
            sizes[f"L{level}"] = 1024 * int(size[:-1])
    return sizes


def _field(text: str, name: str) -> str:
    found = re.search(rf"^{name}\s*:\s*(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else ""


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
