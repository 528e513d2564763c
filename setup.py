"""Builds the compiled core: chooses between CPU and CUDA and says which; the rest is csrc/build.py."""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent / "csrc"))
import build  # noqa: E402  (csrc/build.py)


def choose_toolkit():
    """The CUDA toolkit to build with, or None for a CPU-only build, by ZFCUDA_CUDA=auto|on|off."""
    choice = os.environ.get("ZFCUDA_CUDA", "auto")
    if choice not in ("auto", "on", "off"):
        sys.exit(f"zfcuda: ZFCUDA_CUDA is {choice!r}; it must be auto, on or off")
    toolkit = build.find_toolkit() if choice != "off" else None
    if choice == "on" and toolkit is None:
        sys.exit("zfcuda: ZFCUDA_CUDA=on, but there is no nvcc in CUDA_HOME, on the PATH or from pip")
    print(f"zfcuda: building for the CPU{f' and CUDA with {toolkit.nvcc}' if toolkit else ' only'}")
    return toolkit


class NinjaBuild(build_ext):
    def run(self):
        toolkit = choose_toolkit()
        modules = build.cpu_modules()
        if toolkit:
            archs = os.environ.get("ZFCUDA_CUDA_ARCHS")
            modules.append(build.cuda_module(toolkit, map(int, archs.split()) if archs else build.DEFAULT_ARCHS))
        here = Path(__file__).parent.resolve()
        out = here if self.inplace else Path(self.build_lib).resolve()
        (out / "zfcuda/core").mkdir(parents=True, exist_ok=True)
        build.ninja(modules, out / "zfcuda/core", here / "build/ninja", toolkit)


setup(ext_modules=[Extension("zfcuda.core._core", [])], cmdclass={"build_ext": NinjaBuild})
