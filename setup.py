"""Builds the compiled core: chooses between CPU and CUDA and says which; the rest is csrc/build.py."""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent.resolve()
sys.path.insert(0, str(HERE / "csrc"))
import build  # noqa: E402  (csrc/build.py)


def say(message):
    """Print, and past pip, which hides a build's output, to the terminal."""
    print(message, flush=True)
    try:
        if not sys.stdout.isatty():
            Path("/dev/tty").write_text(f"\n  {message}\n")
    except OSError:
        pass  # no terminal


class NinjaBuild(build_ext):
    """Builds the modules of csrc/build.py instead of the placeholder that makes the wheel a platform's."""

    def run(self):
        if sys.platform != "linux":
            sys.exit(f"zfcuda: supports Linux, not {sys.platform}")
        toolkit, modules = build.choose_toolkit(), build.cpu_modules()
        if toolkit:
            archs = build.choose_archs(toolkit)
            modules.insert(0, build.cuda_module(toolkit, archs))  # its files take longest: they begin first
            major, minor = toolkit.version()
            say(f"zfcuda: building for the CPU and CUDA {major}.{minor}, sm_{' sm_'.join(map(str, archs))}")
        else:
            say("zfcuda: building for the CPU only, without CUDA kernels (ZFCUDA_CUDA=on asks for them)")
        out = (HERE if self.inplace else Path(self.build_lib).resolve()) / "zfcuda/core"
        out.mkdir(parents=True, exist_ok=True)
        build.ninja(modules, out, HERE / "build/ninja", toolkit)
        self.built = [str(out / Path(self.get_ext_filename(module.name)).name) for module in modules]
        for module in out.glob("_*.so"):
            if str(module) not in self.built:  # of an earlier build with other choices
                module.unlink()

    def get_outputs(self):
        return self.built

    def get_output_mapping(self):
        return {}  # an editable installation finds the modules in the source tree, where they were built


setup(ext_modules=[Extension("zfcuda.core._core", [])], cmdclass={"build_ext": NinjaBuild})
