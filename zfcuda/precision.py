"""How CUDA's float32 convolutions multiply."""

from __future__ import annotations

from types import TracebackType

from zfcuda import core
from zfcuda.ops._common import option

__all__ = ["set_fp32_precision"]


class set_fp32_precision:
    """Set the numeric mode of float32 convolutions on CUDA; as a context manager, until its end.

    ``"ieee"``
        float32.
    ``"3xtf32"``
        float32 as sums of two TF32: three products on the tensor cores, with an error close to that of ``"ieee"``; a
        sum that an infinity enters is NaN.
    ``"tf32"``
        10 bits of fraction: the weights rounded, the activations truncated (in weight gradients the signal rounded, the
        image truncated); sums are float32.
    None
        As torch allows cuDNN: ``torch.backends.cudnn.allow_tf32``, or since torch 2.9
        ``torch.backends.cudnn.conv.fp32_precision``; TF32 by default.

    Parameters
    ----------
    mode
        One of them. At first it is None.

    Raises
    ------
    ValueError
        For another mode.

    Notes
    -----
    It holds for the whole process, as torch's own setting does. A mode allows an error and asks for none: the CPU
    and what the tensor cores do not serve (contiguous layout, channels that are no multiple of four, architectures
    before sm_80) are always ``"ieee"``, and so is float64.

    Examples
    --------
    >>> with zfcuda.set_fp32_precision("3xtf32"):
    ...     maps = zfcuda.ops.conv2d_relu(torch.ones(1, 4, 8, 8), torch.ones(4, 4, 3, 3))
    """

    def __init__(self, mode: str | None) -> None:
        if mode is not None:
            option("mode", mode, [*core.PRECISIONS])
        self.before = core.set_precision(mode)

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        core.set_precision(self.before)
