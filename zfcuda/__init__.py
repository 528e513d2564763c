"""See what a convolutional network has learned: Zeiler & Fergus (2013) for PyTorch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zfcuda import attr, deconv, jobs, models, nn, ops
    from zfcuda.deconv import DeconvNet, show
    from zfcuda.precision import set_fp32_precision
    from zfcuda.rewrite.optimize import optimize

__version__ = "0.1.0"
__all__ = [
    "DeconvNet",
    "__version__",
    "attr",
    "deconv",
    "jobs",
    "models",
    "nn",
    "ops",
    "optimize",
    "set_fp32_precision",
    "show",
]

#: Names of this package that live in a module of it.
FROM = {
    "DeconvNet": "zfcuda.deconv",
    "optimize": "zfcuda.rewrite.optimize",
    "set_fp32_precision": "zfcuda.precision",
    "show": "zfcuda.deconv",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is: the command answers ``--help`` without loading torch."""
    if name not in __all__:
        raise AttributeError(f"module 'zfcuda' has no attribute {name!r}")
    if name in FROM:
        return getattr(importlib.import_module(FROM[name]), name)
    return importlib.import_module(f"zfcuda.{name}")


def __dir__() -> list[str]:
    return __all__
