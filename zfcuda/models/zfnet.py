"""ZFNet: the network of Zeiler & Fergus (2014), Fig. 3, and the variants of its Table 3.

One table describes a network, a row a layer; every option is an edit of that table, and one loop
turns the table into modules.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from zfcuda import nn

__all__ = ["ZFNet", "zfnet"]


@dataclass(frozen=True)
class Conv:
    """A row of the table: convolution and ReLU, then perhaps a pool of stride 2 and normalisation."""

    width: int
    kernel: int
    stride: int = 1
    padding: int = 0
    groups: int = 1
    pool: int = 0  # size of its window; 0 for none
    norm: bool = False


@dataclass(frozen=True)
class Full:
    """A row of the table: fully connected layer, ReLU and dropout."""

    width: int


Table = dict[int, Conv | Full]

_FULL: Table = {6: Full(4096), 7: Full(4096)}

ZEILER_FERGUS: Table = {
    1: Conv(96, kernel=7, stride=2, padding=1, pool=3, norm=True),
    2: Conv(256, kernel=5, stride=2, pool=3, norm=True),
    3: Conv(384, kernel=3, padding=1),
    4: Conv(384, kernel=3, padding=1),
    5: Conv(256, kernel=3, padding=1, pool=3),
    **_FULL,
}

KRIZHEVSKY: Table = {
    1: Conv(96, kernel=11, stride=4, padding=2, pool=3, norm=True),
    2: Conv(256, kernel=5, padding=2, groups=2, pool=3, norm=True),
    3: Conv(384, kernel=3, padding=1),
    4: Conv(384, kernel=3, padding=1, groups=2),
    5: Conv(256, kernel=3, padding=1, groups=2, pool=3),
    **_FULL,
}

TABLES = {"zfnet": ZEILER_FERGUS, "krizhevsky": KRIZHEVSKY}
WIDTHS_B = (96, 256, 512, 1024, 512)
REMOVABLE = (3, 4, 6, 7)
POOL_STRIDE = 2


class ZFNet(torch.nn.Sequential):
    """A chain of named layers (``conv1``, ``pool1``, ``norm1``, …, ``fc8``), as `zfnet` builds it.

    Attributes
    ----------
    in_channels : int
        Channels of the images that the network takes.
    input_size : tuple of int
        Height and width of those images.
    """

    # Set by zfnet(), not by a constructor of its own: slices (net[:5]) are made by torch.nn.Sequential's.
    in_channels: int
    input_size: tuple[int, int]


def zfnet(
    num_classes: int = 1000,
    *,
    base: Literal["zfnet", "krizhevsky"] = "zfnet",
    widths: Literal["b"] | Sequence[int] | None = None,
    fc_width: int = 4096,
    remove: Collection[int] = (),
    norm: Literal["after", "before"] = "after",
    dropout: float = 0.5,
    in_channels: int = 3,
    input_size: int | tuple[int, int] = 224,
) -> ZFNet:
    """ZFNet exactly as in the paper, or one of its variants (section 3, Fig. 3 and Table 3).

    The defaults give 62 357 608 parameters and, from 3x224x224, maps of 110, 55 (pool1), 26, 13
    (pool2), 13, 13, 13 and 6 (pool5) pixels. Weights are drawn from N(0, 0.01²), biases are 0.

    Parameters
    ----------
    num_classes : int
        Outputs of the last layer.
    base : {"zfnet", "krizhevsky"}
        The paper's network, or its replication of Krizhevsky et al. (2012): 11x11 filters of stride 4 in
        layer 1, stride 1 in layer 2, and two groups in layers 2, 4 and 5.
    widths : "b", five ints or None
        Maps of layers 1 to 5; ``"b"`` is the paper's variant with 512, 1024, 512 in layers 3 to 5.
    fc_width : int
        Units of layers 6 and 7 (the paper also tries 2048 and 8192).
    remove : collection of int
        Layers to leave out, of 3, 4, 6 and 7 (the paper: 3, 4 | 7 | 6, 7 | 3, 4, 6, 7).
    norm : {"after", "before"}
        Contrast normalisation after pooling, as in the paper, or before it, as in Krizhevsky et al.
    dropout : float
        Probability of dropout in layers 6 and 7.
    in_channels : int
        Channels of the images.
    input_size : int or (int, int)
        Height and width of the images; sets the inputs of the first fully connected layer.

    Returns
    -------
    ZFNet
        Takes (N, in_channels, height, width), returns logits (N, num_classes).

    Raises
    ------
    ValueError
        For an unknown ``base`` or ``norm``, widths that are not five positive ints, a layer that cannot be
        removed, or an input too small for the layers.
    """
    if norm not in ("after", "before"):
        raise ValueError(f"norm is {norm!r}; it must be 'after' or 'before' (the pooling)")
    table = _edit(base, widths, fc_width, remove)
    return build(table, num_classes, norm, dropout, in_channels, input_size)


def build(
    table: Table,
    num_classes: int,
    norm: str,
    dropout: float,
    in_channels: int,
    input_size: int | tuple[int, int],
    ceil_mode: bool = True,
) -> ZFNet:
    """The table as modules; ``ceil_mode`` is that of the pools."""
    size = (input_size, input_size) if isinstance(input_size, int) else input_size
    net = ZFNet()
    net.in_channels, net.input_size = in_channels, size
    channels = in_channels
    for number, row in table.items():
        if isinstance(row, Conv):
            size = _add_conv(net, number, row, channels, size, norm, ceil_mode)
            channels = row.width
    net.add_module("flatten", torch.nn.Flatten())
    features = channels * size[0] * size[1]
    for number, row in table.items():
        if isinstance(row, Full):
            net.add_module(f"fc{number}", torch.nn.Linear(features, row.width))
            net.add_module(f"relu{number}", torch.nn.ReLU())
            net.add_module(f"drop{number}", torch.nn.Dropout(dropout))
            features = row.width
    net.add_module("fc8", torch.nn.Linear(features, num_classes))
    _initialise(net)
    return net


def _edit(base: str, widths: str | Sequence[int] | None, fc_width: int, remove: Collection[int]) -> Table:
    """The table of ``base`` with the options applied."""
    if base not in TABLES:
        raise ValueError(f"base is {base!r}; it must be 'zfnet' or 'krizhevsky'")
    if widths == "b":
        widths = WIDTHS_B
    if widths is not None and (isinstance(widths, str) or len(widths) != 5 or min(widths) < 1):
        raise ValueError(f"widths is {widths!r}; it must be 'b' or five positive numbers of maps, for layers 1 to 5")
    wrong = sorted(set(remove) - set(REMOVABLE))
    if wrong:
        raise ValueError(f"remove names layer {wrong[0]}; only layers 3, 4, 6 and 7 can be removed")
    new = dict(enumerate(widths or (), start=1)) | {6: fc_width, 7: fc_width}
    return {n: replace(row, width=new.get(n, row.width)) for n, row in TABLES[base].items() if n not in remove}


def _add_conv(
    net: ZFNet, number: int, row: Conv, channels: int, size: tuple[int, ...], norm: str, ceil_mode: bool
) -> tuple[int, int]:
    """Append one convolutional row; returns the size of its maps."""
    conv = nn.ConvReLU2d(channels, row.width, row.kernel, row.stride, row.padding, groups=row.groups)
    net.add_module(f"conv{number}", conv)
    size = tuple((s + 2 * row.padding - row.kernel) // row.stride + 1 for s in size)
    if min(size) < max(row.pool, 1):
        raise ValueError(f"input_size is {net.input_size}; layer {number} would have maps of {size}: use larger images")
    after: dict[str, torch.nn.Module] = {}
    if row.pool:
        after["pool"] = nn.MaxPool2d(row.pool, POOL_STRIDE, ceil_mode=ceil_mode)
    if row.norm:
        # Krizhevsky's constants; torch divides alpha by the size, so 1e-4 becomes 5e-4.
        after["norm"] = nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2)
    for name in after if norm == "after" else reversed(after):
        net.add_module(f"{name}{number}", after[name])
    if row.pool:
        over = POOL_STRIDE - 1 if ceil_mode else 0
        size = tuple((s - row.pool + over) // POOL_STRIDE + 1 for s in size)
    return size[0], size[1]


def _initialise(net: torch.nn.Module) -> None:
    """Weights from N(0, 0.01²), biases 0 (section 3, "Training Details")."""
    for name, parameter in net.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
        else:
            torch.nn.init.normal_(parameter, std=0.01)
