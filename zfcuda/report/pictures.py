"""Arrays in, pictures out: projections, patches, and the arrangement of the paper's Fig. 2.

Small pure functions on numpy arrays. A *picture* is a uint8 array (height, width, 3); `PIL.Image.fromarray`
turns one into an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

__all__ = [
    "GREY",
    "beside",
    "crop",
    "enlarge",
    "fig2",
    "filters",
    "grid",
    "patch",
    "patches",
    "projection",
    "projections",
    "white",
]

#: The picture of zero in a projection, and the fill of everything outside an image.
GREY = 128

#: The part of a projection's non-zero values that its scale covers; the few beyond are clipped.
WHITE = 0.995

Picture = NDArray[np.uint8]


def projection(values: ArrayLike, scale: float | None = None) -> Picture:
    """A signed image on a symmetric scale: zero is mid-grey, the largest absolute value black or white.

    ``128 + 127 * values / scale``, the same scale for all channels, so that colours are kept.

    Parameters
    ----------
    values : array (3 or 1, height, width)
        A projection, or the filter of a first layer.
    scale : float, optional
        The value shown as white; default the largest absolute value of this image.

    Returns
    -------
    uint8 array (height, width, 3)
    """
    image = _rgb(values)
    if scale is None:
        scale = float(np.abs(image).max(initial=0.0))
    return _to_bytes(GREY + image * (127 / scale if scale > 0 else 0.0))


def patch(values: ArrayLike, mean: ArrayLike = 0.0, std: ArrayLike = 1.0) -> Picture:
    """A network input as a picture: ``values * std + mean``, in 0 … 255.

    Parameters
    ----------
    values : array (3 or 1, height, width)
        The input, or a piece of it.
    mean, std : float, (channels,) or anything that broadcasts against (channels, height, width)
        What the loader subtracted, and divided by, in units of pixel values 0 … 255.

    Returns
    -------
    uint8 array (height, width, 3)
    """
    values = np.asarray(values, dtype=np.float64)
    return _to_bytes(_rgb(values * _per_channel(std) + _per_channel(mean)))


def white(values: ArrayLike) -> float:
    """A scale for `projection` that the few strongest pixels do not set.

    Of the values that are not zero, one in 200 lies beyond it. 0 where all are zero.
    """
    strengths = np.abs(np.asarray(values)).ravel()
    strengths = strengths[strengths > 0]
    nth = int(WHITE * max(strengths.size - 1, 0))
    return float(np.partition(strengths, nth)[nth]) if strengths.size else 0.0


def projections(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Many projections (n, 3 or 1, height, width) as pictures (n, height, width, 3), each on the scale of `white`."""
    scales = np.array([white(image) for image in values], np.float32)
    factors = np.divide(127, scales, out=np.zeros_like(scales), where=scales > 0)
    return _batch_to_bytes(values * factors[:, None, None, None] + np.float32(GREY))


def patches(values: NDArray[np.float32], mean: ArrayLike = 0.0, std: ArrayLike = 1.0) -> NDArray[np.uint8]:
    """Many pieces of inputs (n, 3 or 1, height, width) as pictures (n, height, width, 3); see `patch`."""
    return _batch_to_bytes(values * _per_channel(std).astype(np.float32) + _per_channel(mean).astype(np.float32))


def crop(picture: Picture, box: Sequence[int]) -> Picture:
    """The pixels of ``box`` = (top, left, bottom, right); what lies outside the picture is mid-grey."""
    top, left, bottom, right = box
    height, width = picture.shape[:2]
    out = np.full((bottom - top, right - left, 3), GREY, np.uint8)
    inside = picture[max(top, 0) : max(min(bottom, height), 0), max(left, 0) : max(min(right, width), 0)]
    y, x = max(-top, 0), max(-left, 0)
    out[y : y + inside.shape[0], x : x + inside.shape[1]] = inside
    return out


def enlarge(picture: Picture, size: int) -> Picture:
    """The picture with its longer side at ``size`` pixels: nearest neighbours up, box filter down."""
    height, width = picture.shape[:2]
    ratio = size / max(height, width)
    new = max(round(width * ratio), 1), max(round(height * ratio), 1)
    return np.asarray(
        Image.fromarray(picture).resize(new, Image.Resampling.NEAREST if ratio >= 1 else Image.Resampling.BOX)
    )


def grid(pictures: Sequence[Picture], columns: int, gap: int = 1, fill: int = 255) -> Picture:
    """Pictures in rows of ``columns``, with ``gap`` pixels between them.

    Cells have the size of the largest picture; smaller ones, and cells left over, show ``fill``.

    Raises
    ------
    ValueError
        If there is no picture, or ``columns`` is not positive.
    """
    if not pictures or columns < 1:
        raise ValueError(f"grid of {len(pictures)} pictures in {columns} columns; both must be at least 1")
    height = max(p.shape[0] for p in pictures)
    width = max(p.shape[1] for p in pictures)
    rows = -(-len(pictures) // columns)
    out = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), fill, np.uint8)
    for i, picture in enumerate(pictures):
        y, x = i // columns * (height + gap), i % columns * (width + gap)
        out[y : y + picture.shape[0], x : x + picture.shape[1]] = picture
    return out


def beside(left: Picture, right: Picture, gap: int = 8, fill: int = 255) -> Picture:
    """Two pictures next to each other, aligned at the top."""
    out = np.full((max(left.shape[0], right.shape[0]), left.shape[1] + gap + right.shape[1], 3), fill, np.uint8)
    out[: left.shape[0], : left.shape[1]] = left
    out[: right.shape[0], left.shape[1] + gap :] = right
    return out


def fig2(
    maps: Sequence[tuple[Sequence[Picture], Sequence[Picture]]],
    columns: int = 4,
    size: int | None = None,
    across: int = 3,
) -> Picture:
    """One layer in the arrangement of the paper's Fig. 2.

    Left, a block for each map with its strongest projections, three by three; right, in the same
    order, the blocks of the image patches that caused them.

    Parameters
    ----------
    maps : sequence of (projections, patches)
        For each map up to ``across²`` pictures of each, strongest first; a dead map has none.
    columns : int
        Blocks in a row, on either side.
    size : int, optional
        Side of every small picture, in pixels; default the longest side given.
    across : int
        Pictures in a row of a block.

    Returns
    -------
    uint8 array (height, width, 3)

    Raises
    ------
    ValueError
        If no map has a picture, or a map has too many.
    """
    sides = [max(p.shape[:2]) for pair in maps for pictures in pair for p in pictures]
    if not sides:
        raise ValueError("maps has no picture; at least one map must not be dead")
    cell = size or max(sides)
    halves = [grid([_block(pair[side], cell, across) for pair in maps], columns, gap=4) for side in (0, 1)]
    return beside(halves[0], halves[1])


def filters(
    weight: ArrayLike, columns: int | None = None, size: int = 28, scale: Literal["each", "common"] = "each"
) -> Picture:
    """The filters of a first layer in a grid (Fig. 6 a-c).

    Parameters
    ----------
    weight : array (maps, 3 or 1, kernel_h, kernel_w)
    columns : int, optional
        Filters in a row; default about as many as rows.
    size : int
        Side of a filter in the picture.
    scale : {"each", "common"}
        A symmetric scale for each filter, or one for all of them, which shows filters that died or dominate.

    Returns
    -------
    uint8 array (height, width, 3)

    Raises
    ------
    ValueError
        For an unknown ``scale`` or a weight of another shape.
    """
    weight = np.asarray(weight)
    if scale not in ("each", "common"):
        raise ValueError(f"scale is {scale!r}; it must be 'each' or 'common'")
    if weight.ndim != 4:
        raise ValueError(f"weight has shape {weight.shape}; it must be (maps, channels, height, width)")
    shared = float(np.abs(weight).max(initial=0.0)) if scale == "common" else None
    pictures = [enlarge(projection(f, shared), size) for f in weight]
    return grid(pictures, columns or round(np.sqrt(len(weight))), gap=2)


def _block(pictures: Sequence[Picture], cell: int, across: int) -> Picture:
    """``across`` by ``across`` pictures; mid-grey where there are fewer."""
    if len(pictures) > across**2:
        raise ValueError(f"a map has {len(pictures)} pictures; a block holds {across**2}")
    empty = np.full((cell, cell, 3), GREY, np.uint8)
    cells = [enlarge(p, cell) for p in pictures] + [empty] * (across**2 - len(pictures))
    return grid(cells, across)


def _rgb(values: ArrayLike) -> NDArray[np.float64]:
    """(3 or 1, height, width) to (height, width, 3)."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 3 or values.shape[0] not in (1, 3):
        raise ValueError(f"image has shape {values.shape}; it must be (3, height, width) or (1, height, width)")
    return np.broadcast_to(values.transpose(1, 2, 0), (*values.shape[1:], 3))


def _per_channel(value: ArrayLike) -> NDArray[np.float64]:
    """A number for each channel, made to broadcast against (channels, height, width)."""
    value = np.asarray(value, dtype=np.float64)
    return value[:, None, None] if value.ndim == 1 else value


def _batch_to_bytes(images: NDArray[np.float32]) -> NDArray[np.uint8]:
    """(n, 3 or 1, height, width) to uint8 (n, height, width, 3)."""
    shown = np.rint(np.clip(images, 0, 255)).astype(np.uint8).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(np.broadcast_to(shown, (*shown.shape[:3], 3)))


def _to_bytes(image: NDArray[np.float64]) -> Picture:
    return np.rint(np.clip(image, 0, 255)).astype(np.uint8)
