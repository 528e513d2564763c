"""The paper's constraint on the filters of a convolution."""

from __future__ import annotations

import torch
from torch import Tensor

from zfcuda import core
from zfcuda.ops._common import check_tensor, number, tensor
from zfcuda.ops._register import NoResult, entry, operator

__all__ = ["renormalize_filters_"]


@entry()
def renormalize_filters_(weight: Tensor, max_rms: float) -> Tensor:
    r"""Scale every filter whose root mean square exceeds ``max_rms`` back to it, in place.

    .. math:: w_o \leftarrow w_o \cdot \min\Big(1,\; \frac{m}{\mathrm{rms}(w_o)}\Big),
        \quad \mathrm{rms}(w_o) = \sqrt{\tfrac{1}{n} \textstyle\sum_{i,y,x} w_{o,i,y,x}^2}

    The paper does this after every step of training, with 0.1, and calls it crucial above all in layer 1
    (section 3).

    Parameters
    ----------
    weight
        (out_channels, in_channels / groups, kernel_h, kernel_w), floating point, any strides; a filter is an
        output channel. Changed in place, not recorded by autograd, as an optimiser's step is.
    max_rms
        The largest root mean square that a filter may have, at least 0.

    Returns
    -------
    Tensor
        ``weight`` itself.

    Raises
    ------
    TypeError
        If an argument has the wrong Python type.
    RuntimeError
        If the tensor or the number is impossible; the message names the argument and its value.

    Notes
    -----
    A filter that holds NaN or infinities is left as it is.
    """
    tensor("weight", weight)
    with torch.no_grad():
        _renormalize_filters(weight, number("max_rms", max_rms))
    return weight


@operator("renormalize_filters_", mutates=("weight",))
def _renormalize_filters(weight: Tensor, max_rms: float) -> NoResult:
    check_tensor("weight", weight)
    if not max_rms >= 0:
        raise RuntimeError(f"max_rms is {max_rms}; it must be a number of at least 0")
    yield
    if not weight.numel():
        return
    formats = torch.contiguous_format, torch.channels_last  # in both a filter's numbers are neighbours
    in_place = any(weight.is_contiguous(memory_format=layout) for layout in formats)
    filters = weight if in_place else weight.contiguous()
    size = weight[0].numel()
    core.run("renormalize_filters", weight, len(weight), size, core.DTYPES[weight.dtype], max_rms, filters)
    if not in_place:
        weight.copy_(filters)
