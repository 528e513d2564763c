"""Unpooling by switches, the transpose of max-pooling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from zfcuda import core
from zfcuda.ops._common import check_tensor, dense, integers, memory_format, option, tensor
from zfcuda.ops._out import Result
from zfcuda.ops._pool import Window, check_switches, window_of
from zfcuda.ops._register import OneResult, entry, operator

__all__ = ["max_unpool2d"]

OVERLAPS = ("sum", "overwrite")


@entry(images=("input", "switches"), whole="output_size")
def max_unpool2d(
    input: Tensor,
    switches: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    output_size: Sequence[int] | None = None,
    overlap: str = "sum",
) -> Tensor:
    """Put each value back where its window's switch points; zero elsewhere (section 2.1 of the paper).

    Parameters
    ----------
    input
        Pooled values (batch, channels, height, width), or of one image without the batch; floating point, any
        strides.
    switches
        As :func:`max_pool2d` gives them: uint8, of the input's shape.
    kernel_size, stride, padding, dilation
        Those of the pool; ``stride=None`` is ``kernel_size``.
    output_size
        Height and width (or the whole shape) of what was pooled. By default the smallest size whose pool
        without ``ceil_mode`` has the input's size.
    overlap
        Where the switches of several windows meet: ``"sum"`` adds them, exactly the transpose of pooling;
        ``"overwrite"`` keeps the last window in row-major order, even if its value is zero, as torch does on
        the CPU with one thread.

    Returns
    -------
    Tensor
        (batch, channels, output height, output width) in the input's memory format. Deterministic.

    Raises
    ------
    TypeError
        If an argument has the wrong Python type.
    ValueError
        If ``overlap`` is neither of its two values.
    RuntimeError
        If a tensor or a size is impossible, or a switch points out of its window or out of the output; the
        message names the argument and its value.

    Notes
    -----
    Differentiable any number of times with respect to ``input``. The check of the switches' values reads one
    number back, which on CUDA waits for the device; while a CUDA graph is being captured it is left out.
    """
    return unpool(
        tensor("input", input),
        tensor("switches", switches),
        window_of(kernel_size, stride, padding, dilation),
        plane("output_size", output_size, tensor("input", input)),
        option("overlap", overlap, OVERLAPS) == "overwrite",
        True,
    )


def plane(name: str, size: Sequence[int] | None, pooled: Tensor) -> list[int] | None:
    """Height and width of what was pooled, from its ``size``, the argument called ``name``, which may be whole."""
    if size is None:
        return None
    size = integers(name, size)
    if len(size) == 2 or pooled.dim() != 4:  # a wrong rank is named later
        return size[-2:]
    if len(size) != 4 or size[:2] != list(pooled.shape[:2]):
        raise RuntimeError(
            f"{name} is {tuple(size)}; it must be a (height, width) or a whole shape, which begins with the "
            f"{tuple(pooled.shape[:2])} of the pooled tensor"
        )
    return size[2:]


def unpooled_shape(
    name: str,
    input: Tensor,
    switches: Tensor,
    window: Window,
    output_size: Sequence[int] | None,
    prefix: str = "",
) -> list[int]:
    """The whole shape of the unpooled ``input``, the argument called ``name``, after every check.

    The names of the pool's arguments begin with ``prefix``.
    """
    check_tensor(name, input)
    window.check(prefix)
    check_switches(switches, input, input.shape, f"the shape of {name}")
    default = [*input.shape[:2], *window.unpooled_size(input.shape[2:])]
    size = default if output_size is None else [*input.shape[:2], *output_size]
    if min(size[2:]) < 1 or not _could_be_pooled(window, size[2:], list(input.shape[2:])):
        arguments = ", ".join(f"{prefix}{key}={tuple(value)}" for key, value in window._asdict().items())
        raise RuntimeError(
            f"{prefix}output_size is {tuple(size[2:])}; it must be the height and width of a tensor whose pool with "
            f"{arguments} has the shape {tuple(input.shape)} of {name}, such as {tuple(default[2:])}"
        )
    return size


def _could_be_pooled(window: Window, size: list[int], pooled: list[int]) -> bool:
    return all(
        n in sizes
        for n, sizes in zip(
            pooled, zip(window.pooled_size(size, False), window.pooled_size(size, True), strict=True), strict=True
        )
    )


def check_switch_values(switches: Tensor, shape: tuple[int, ...], window: Window, size: Sequence[int]) -> None:
    """Raise RuntimeError at the first switch that points out of its window or out of the output."""
    if core.capturing(switches):
        return
    first = core.find("find_invalid_switch", switches, shape, switches)
    if first >= 0:
        # The core counts in the order of storage.
        order = (0, 1, 2, 3) if switches.is_contiguous() else (0, 2, 3, 1)
        index = [0] * 4
        for dim in reversed(order):
            first, index[dim] = divmod(first, switches.size(dim))
        raise RuntimeError(
            f"switches[{', '.join(map(str, index))}] is {int(switches[tuple(index)])}; it must be a position inside "
            f"its window of {tuple(window.kernel_size)} and inside the output of height and width {tuple(size[2:])}: "
            "use the switches of the same pool"
        )


@operator("max_unpool2d", batched=("input", "switches"))
def unpool(
    input: Tensor,
    switches: Tensor,
    window: Window,
    output_size: Sequence[int] | None,
    overwrite: bool,
    check_values: bool,
) -> OneResult:
    size = unpooled_shape("input", input, switches, window, output_size)
    layout = memory_format(input)
    output = yield Result(input, size, layout)
    if output.numel():
        shape = window.shape(size, input.shape, layout)
        switches = dense(switches, layout)
        if check_values:
            check_switch_values(switches, shape, window, size)
        dtype = core.DTYPES[input.dtype]
        core.run("max_unpool2d", input, shape, dtype, overwrite, dense(input, layout), switches, output)


@operator("switch_gather", batched=("input", "switches"))
def gather(input: Tensor, switches: Tensor, window: Window, overwrite: bool, check_values: bool) -> OneResult:
    """The transpose of unpooling."""
    _check_gathered(input, switches, window)
    layout = memory_format(input)
    pooled = yield Result(input, switches.shape, layout)
    if pooled.numel():
        shape = window.shape(input.shape, pooled.shape, layout)
        switches = dense(switches, layout)
        if check_values:
            check_switch_values(switches, shape, window, input.shape)
        tensors = dense(input, layout), switches, pooled
        core.run("switch_gather", input, shape, core.DTYPES[input.dtype], overwrite, *tensors)


def _check_gathered(input: Tensor, switches: Tensor, window: Window) -> None:
    """Raise RuntimeError unless the switches are those of a pool of something of the size of ``input``."""
    check_tensor("input", input)
    window.check()
    height, width = input.shape[2:]
    pooled = list(switches.shape[-2:])
    if switches.dim() != 4 or not _could_be_pooled(window, [height, width], pooled):
        pooled = window.pooled_size((height, width), False)
    check_switches(switches, input, [*input.shape[:2], *pooled], "that of the pool of the input")


def _unpool_setup_context(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    _, switches, ctx.window, _, ctx.overwrite, _ = inputs
    ctx.layout = memory_format(output)
    ctx.save_for_backward(switches)


def _unpool_backward(ctx: Any, grad: Tensor) -> Tensor:
    (switches,) = ctx.saved_tensors
    return gather(dense(grad, ctx.layout), switches, ctx.window, ctx.overwrite, False)


def _gather_setup_context(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    input, switches, ctx.window, ctx.overwrite, _ = inputs
    ctx.size, ctx.layout = input.shape[2:], memory_format(output)
    ctx.save_for_backward(switches)


def _gather_backward(ctx: Any, grad: Tensor) -> Tensor:
    (switches,) = ctx.saved_tensors
    return unpool(dense(grad, ctx.layout), switches, ctx.window, ctx.size, ctx.overwrite, False)


def _unpool_tangent(inputs: Sequence[Any], output: Tensor, tangents: Sequence[Any]) -> Tensor:
    _, switches, window, _, overwrite, _ = inputs
    return unpool(tangents[0], switches, window, output.shape[2:], overwrite, False)


def _gather_tangent(inputs: Sequence[Any], output: Tensor, tangents: Sequence[Any]) -> Tensor:
    _, switches, window, overwrite, _ = inputs
    return gather(tangents[0], switches, window, overwrite, False)


unpool.register_autograd(_unpool_backward, _unpool_setup_context, _unpool_tangent)
gather.register_autograd(_gather_backward, _gather_setup_context, _gather_tangent)
gather.register_out("output", overwrite=False, check_values=True)
