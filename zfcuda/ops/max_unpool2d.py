"""Unpooling by switches, the transpose of max-pooling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from zfcuda import core
from zfcuda.ops._common import check_tensor, dense, empty, integers, is_image, memory_format, option, pair, tensor
from zfcuda.ops._pool import Window, check_switches
from zfcuda.ops._register import entry, operator

__all__ = ["max_unpool2d"]

OVERLAPS = ("sum", "overwrite")


@entry()
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
        Pooled values (batch, channels, height, width), or of one image without the batch; float32 or float64, any
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
    if is_image(input) and is_image(switches):
        size = None if output_size is None else integers("output_size", output_size)[-2:]
        window = kernel_size, stride, padding, dilation
        return max_unpool2d(input.unsqueeze(0), switches.unsqueeze(0), *window, size, overlap).squeeze(0)
    kernel = pair("kernel_size", kernel_size)
    return unpool(
        tensor("input", input),
        tensor("switches", switches),
        kernel,
        kernel if stride is None else pair("stride", stride),
        pair("padding", padding),
        pair("dilation", dilation),
        None if output_size is None else integers("output_size", output_size),
        option("overlap", overlap, OVERLAPS) == "overwrite",
        True,
    )


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
    size = default if output_size is None else [*input.shape[:2], *output_size[-2:]]
    valid = output_size is None or len(output_size) == 2 or (len(output_size) == 4 and list(output_size) == size)
    if not valid or min(size[2:]) < 1 or not _could_be_pooled(window, size[2:], list(input.shape[2:])):
        arguments = ", ".join(f"{prefix}{key}={tuple(value)}" for key, value in window._asdict().items())
        raise RuntimeError(
            f"{prefix}output_size is {tuple(size if output_size is None else output_size)}; it must be a (height, "
            f"width) or the whole shape of a tensor whose pool with {arguments} has the shape {tuple(input.shape)} of "
            f"{name}, such as {tuple(default)}"
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
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_size: Sequence[int] | None,
    overwrite: bool,
    check_values: bool,
) -> Tensor:
    window = Window(kernel_size, stride, padding, dilation)
    size = unpooled_shape("input", input, switches, window, output_size)
    layout = memory_format(input)
    if not input.numel():
        return empty(input, size, layout)
    shape = window.shape(size, input.shape, layout)
    switches = dense(switches, layout)
    if check_values:
        check_switch_values(switches, shape, window, size)
    output = empty(input, size, layout)
    dtype = core.DTYPES[input.dtype]
    core.run("max_unpool2d", input, shape, dtype, overwrite, dense(input, layout), switches, output)
    return output


@unpool.register_fake
def _(
    input: Tensor,
    switches: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_size: Sequence[int] | None,
    overwrite: bool,
    check_values: bool,
) -> Tensor:
    window = Window(kernel_size, stride, padding, dilation)
    size = unpooled_shape("input", input, switches, window, output_size)
    return empty(input, size, memory_format(input))


@operator("switch_gather", batched=("unpooled", "switches"))
def gather(
    unpooled: Tensor,
    switches: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    overwrite: bool,
    check_values: bool,
) -> Tensor:
    """The transpose of unpooling."""
    window = Window(kernel_size, stride, padding, dilation)
    check_gathered(unpooled, switches, window)
    pooled = empty(unpooled, switches.shape, memory_format(unpooled))
    run_gather(unpooled, switches, window, overwrite, check_values, pooled)
    return pooled


@gather.register_fake
def _(
    unpooled: Tensor,
    switches: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    overwrite: bool,
    check_values: bool,
) -> Tensor:
    check_gathered(unpooled, switches, Window(kernel_size, stride, padding, dilation))
    return empty(unpooled, switches.shape, memory_format(unpooled))


def check_gathered(unpooled: Tensor, switches: Tensor, window: Window) -> None:
    """Raise RuntimeError unless the switches are those of a pool of something of the size of ``unpooled``."""
    check_tensor("input", unpooled)
    window.check()
    height, width = unpooled.shape[2:]
    pooled = list(switches.shape[-2:])
    if switches.dim() != 4 or not _could_be_pooled(window, [height, width], pooled):
        pooled = window.pooled_size((height, width), False)
    check_switches(switches, unpooled, [*unpooled.shape[:2], *pooled], "that of the pool of the input")


def run_gather(
    unpooled: Tensor, switches: Tensor, window: Window, overwrite: bool, check_values: bool, pooled: Tensor
) -> None:
    """``switch_gather`` of csrc/ops.h into a checked tensor of the input's memory format."""
    if not pooled.numel():
        return
    layout = memory_format(unpooled)
    shape = window.shape(unpooled.shape, pooled.shape, layout)
    switches = dense(switches, layout)
    if check_values:
        check_switch_values(switches, shape, window, unpooled.shape)
    tensors = dense(unpooled, layout), switches, pooled
    core.run("switch_gather", unpooled, shape, core.DTYPES[unpooled.dtype], overwrite, *tensors)


def _unpool_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, switches, *ctx.window, _, ctx.overwrite, _ = inputs
    ctx.layout = memory_format(output)
    ctx.save_for_backward(switches)


def _unpool_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (switches,) = ctx.saved_tensors
    return gather(dense(grad, ctx.layout), switches, *ctx.window, ctx.overwrite, False), *(None,) * 8


def _gather_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    unpooled, switches, *ctx.window, ctx.overwrite, _ = inputs
    ctx.size, ctx.layout = unpooled.shape[2:], memory_format(output)
    ctx.save_for_backward(switches)


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (switches,) = ctx.saved_tensors
    grad = dense(grad, ctx.layout)
    return unpool(grad, switches, *ctx.window, ctx.size, ctx.overwrite, False), *(None,) * 7


unpool.register_autograd(_unpool_backward, _unpool_setup_context)
gather.register_autograd(_gather_backward, _gather_setup_context)
