"""torchvision, imported so that it works beside the CPU build of torch too."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

__all__ = ["load"]

#: Operators that `import torchvision` describes to torch whether or not its compiled library could be loaded.
SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[torch.library.Library] = []  # a Library's operators vanish with it


def load() -> ModuleType:
    """The package ``torchvision``.

    PyPI's torchvision is built for torch's CUDA build. Beside the CPU build its compiled operators (non-maximum
    suppression, for detection) cannot be loaded, and its import fails when it describes them: ``operator
    torchvision::nms does not exist``. The networks need none of them, so here the missing names are declared and
    the import is tried again; calling such an operator still raises torchvision's own error.

    Raises
    ------
    ImportError
        If torchvision is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
        raise ImportError(
            "torchvision is not installed; beside a CPU build of torch: pip install --no-deps torchvision"
        ) from error
    except RuntimeError as error:
        if "torchvision::nms" not in str(error) or _declared:
            raise
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in SCHEMAS:
        library.define(schema)
    _declared.append(library)
    return importlib.import_module("torchvision")
