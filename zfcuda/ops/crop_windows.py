"""Windows cut from maps, perhaps reaching beyond them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zfcuda import core
from zfcuda.ops._common import check_device, check_shape, integer, pair, tensor
from zfcuda.ops._out import Result
from zfcuda.ops._register import OneResult, entry, not_differentiable, operator

__all__ = ["crop_windows"]


@entry(repeats=False)
def crop_windows(input: Tensor, images: Tensor, origins: Tensor, size: int | Sequence[int], fill: int = 0) -> Tensor:
    """Cut a window out of an image for each entry of ``images``.

    Parameters
    ----------
    input
        (images, height, width, channels), any dtype; copied first unless contiguous.
    images
        int64 (windows,): the image of each window.
    origins
        int64 (windows, 2): row and column of each window's first pixel; the window may reach beyond the image, or
        lie outside it.
    size
        Height and width of the windows.
    fill
        The byte, 0 to 255, that all bytes of pixels outside the image have.

    Returns
    -------
    Tensor
        (windows, height, width, channels), of the input's dtype.

    Raises
    ------
    TypeError
        If an argument has the wrong Python type.
    RuntimeError
        If a tensor or a size is impossible; the message names the argument and its value.
    IndexError
        If an image does not exist.

    Notes
    -----
    Not differentiable: a backward pass through the result raises.
    The check of the images reads their numbers, which on CUDA waits for the device; while a CUDA graph is being
    captured it is left out.
    """
    if not 0 <= integer("fill", fill) <= 255:
        raise RuntimeError(f"fill is {fill}; it must be a byte, 0 to 255")
    return _crop(tensor("input", input), tensor("images", images), tensor("origins", origins), pair("size", size), fill)


def check_origins(name: str, value: Tensor, shape: Sequence[int], like: Tensor) -> None:
    """Check an int64 argument of one row a window."""
    if value.dtype != torch.int64:
        raise RuntimeError(f"{name} has dtype {value.dtype}; it must be torch.int64: convert it with .long()")
    check_shape(name, value, shape, "one for each window")
    check_device(name, value, like)


def _check(input: Tensor, images: Tensor, origins: Tensor, size: Sequence[int]) -> list[int]:
    if input.dim() != 4:
        raise RuntimeError(f"input has shape {tuple(input.shape)}; it must be (images, height, width, channels)")
    if min(size) < 1 or max(size) >= 1 << 31:
        raise RuntimeError(f"size is {tuple(size)}; both numbers must be at least 1 and less than 2^31")
    if images.dim() != 1:
        raise RuntimeError(f"images has shape {tuple(images.shape)}; it must be (windows,), a number for each window")
    check_origins("images", images, images.shape, input)
    check_origins("origins", origins, (len(images), 2), input)
    if max(len(images), 1) * size[0] * size[1] * input.size(3) * input.element_size() >= 1 << 63:
        raise RuntimeError(f"size is {tuple(size)}; the windows of all {len(images)} images would have over 2^63 bytes")
    return [len(images), *size, input.size(3)]


def _check_images(images: Tensor, count: int) -> None:
    if core.capturing(images):
        return
    low, high = (int(v) for v in images.aminmax())
    if low < 0 or high >= count:
        wrong = low if low < 0 else high
        raise IndexError(f"images has {wrong}; it must name the {count} images of input, counted from 0")


@operator("crop_windows")
def _crop(input: Tensor, images: Tensor, origins: Tensor, size: Sequence[int], fill: int) -> OneResult:
    windows = yield Result(input, _check(input, images, origins, size))
    if windows.numel():
        _check_images(images, len(input))
        pixel = input.size(3) * input.element_size()
        shape = (*input.shape[:3], pixel, *windows.shape[:3], fill)
        core.run("crop_windows", input, shape, input.contiguous(), images.contiguous(), origins.contiguous(), windows)


not_differentiable(_crop, "crop_windows", "index the input to differentiate by it")
