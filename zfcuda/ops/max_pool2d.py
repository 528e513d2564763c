"""Max-pooling that records switches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zfcuda import core
from zfcuda.ops._common import check_tensor, memory_format, pair, require

__all__ = ["max_pool2d"]
