"""The values that switches point to, the transpose of unpooling."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from zfcuda.ops._common import tensor
from zfcuda.ops._pool import window_of
from zfcuda.ops._register import entry
from zfcuda.ops.max_unpool2d import gather

__all__ = ["switch_gather"]


@entry(images=("input", "switches"))
def switch_gather(
    input: Tensor,
    switches: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    *,
    out: Tensor | None = None,
) -> Tensor:
    r"""From each window the value at the position that its switch points to.

    .. math:: y_{oy,ox} = x_{oy \, s_h - p_h + i \, d_h,\; ox \, s_w - p_w + j \, d_w},
        \quad i \, k_w + j = \mathrm{switch}_{oy,ox}

    The transpose of :func:`max_unpool2d` with ``overlap="sum"`` (section 2.1 of the paper): of what was pooled it
    gives the pooled values, of anything else, a second map or a tangent, what the pool would have let pass.

    Parameters
    ----------
    input
        (batch, channels, height, width), or one image without the batch; floating point, any strides.
    switches
        uint8, as :func:`max_pool2d` gives them for an input of this shape.
    kernel_size, stride, padding, dilation
        Those of the pool; ``stride=None`` is ``kernel_size``.
    out
        Where to write the result: a tensor as it would be returned, dense in the input's memory format. Not
        differentiable.

    Returns
    -------
    Tensor
        Of the shape of ``switches``, in the input's memory format.

    Raises
    ------
    TypeError
        If an argument has the wrong Python type.
    RuntimeError
        If a tensor or a size is impossible, a switch points out of its window or out of the input, or ``out``
        does not fit or meets a tensor that requires grad; the message names the argument and its value.

    Notes
    -----
    Differentiable any number of times with respect to ``input``. The check of the switches' values reads one
    number back, which on CUDA waits for the device; while a CUDA graph is being captured it is left out.
    """
    window = window_of(kernel_size, stride, padding, dilation)
    arguments = tensor("input", input), tensor("switches", switches), window
    return gather(*arguments, False, True) if out is None else gather.into(out, *arguments)
