"""The PEP 517 backend: setuptools, which also asks pip for nvcc where a build needs it.

A machine that has a CUDA toolkit, or builds for the CPU only, downloads nothing more.
"""

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (every hook that is not named here)

from build import missing_nvcc_packages  # csrc/build.py


def get_requires_for_build_wheel(config_settings=None):
    return [*build_meta.get_requires_for_build_wheel(config_settings), *missing_nvcc_packages()]


def get_requires_for_build_editable(config_settings=None):
    return [*build_meta.get_requires_for_build_editable(config_settings), *missing_nvcc_packages()]
