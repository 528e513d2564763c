"""crop_windows: windows of images, byte for byte, wherever they lie."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from oracles import Sample, for_all

from zfcuda import ops, reference

DTYPES = [
    torch.uint8,
    torch.bool,
    torch.int16,
    torch.float16,
    torch.float32,
    torch.int64,
    torch.float64,
    torch.complex128,
]


def numpys(input, images, origins, size, fill=0):
    """Each window as a slice of a canvas of ``fill`` in whose middle its image lies."""
    height, width = (size, size) if isinstance(size, int) else size
    pixels = input.contiguous().view(torch.uint8).numpy()
    canvas = np.full(
        (len(input), *(n + 2 * m for n, m in zip(input.shape[1:3], (height, width), strict=True)), pixels.shape[3]),
        fill,
    )
    canvas[:, height : height + input.size(1), width : width + input.size(2)] = pixels
    windows = np.empty((len(images), height, width, pixels.shape[3]), np.uint8)
    for window, image, (top, left) in zip(windows, images.tolist(), origins.tolist(), strict=True):
        y, x = min(max(top, -height), input.size(1)), min(max(left, -width), input.size(2))
        window[:] = canvas[image, y + height :, x + width :][:height, :width]
    return torch.from_numpy(windows).view(input.dtype)


def images_of(*size, dtype=torch.uint8, seed=0):
    """Random bytes, so that every bit of every dtype counts."""
    unit = torch.empty(0, dtype=dtype).element_size()
    random = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (*size[:3], size[3] * unit), generator=random).byte()
    return pixels % 2 == 1 if dtype is torch.bool else pixels.view(dtype)


def crops(images, size, windows=7, fill=0, seed=0):
    """Origins from far beyond the top left corner to far beyond the bottom right."""
    random = torch.Generator().manual_seed(seed)
    which = torch.randint(max(len(images), 1), (windows,), generator=random)
    ranges = zip(size, images.shape[1:3], strict=True)
    origins = torch.stack([torch.randint(-n - 1, m + 2, (windows,), generator=random) for n, m in ranges], 1)
    return Sample([images, which, origins], {"size": size, "fill": fill}, differentiable=False)


def same_bytes(actual, expected):
    assert actual.shape == expected.shape and actual.dtype == expected.dtype and actual.is_contiguous()
    assert torch.equal(actual.cpu().view(torch.uint8), expected.contiguous().view(torch.uint8))


def check(sample, backend):
    expected = sample.call(numpys)
    same_bytes(sample.call(reference.crop_windows), expected)
    placed = [t.to(backend.device) for t in sample.tensors]
    same_bytes(ops.crop_windows(*placed, **sample.options), expected)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(backend, dtype, channels):
    check(crops(images_of(3, 5, 6, channels, dtype=dtype), (4, 3), fill=0), backend)


@pytest.mark.parametrize("channels", [1, 2, 4, 8, 12, 16, 32])
@pytest.mark.parametrize("offset", [0, 1, 2, 4, 8, 16])
def test_every_alignment(backend, channels, offset):
    """Pixels of any size from any address, moved in units that suit both."""
    whole = images_of(1, 1, 1, 2 * 4 * 5 * channels + offset).flatten()
    images = whole[offset:].view(2, 4, 5, channels)
    check(crops(images, (3, 3), fill=7), backend)


def test_edges(backend):
    """A window larger than the image, at every origin at which they meet and one beyond."""
    images = images_of(2, 2, 3, 3)
    origins = torch.cartesian_prod(torch.arange(-5, 4), torch.arange(-6, 5))
    which = torch.arange(len(origins)) % 2
    check(Sample([images, which, origins], {"size": (4, 5), "fill": 255}), backend)


@pytest.mark.parametrize("fill", [0, 1, 127, 255])
def test_fill_is_a_byte(backend, fill):
    check(crops(images_of(2, 3, 3, 2, dtype=torch.int64), (4, 4), fill=fill), backend)
    far = torch.full((1, 2), 2**40, device=backend.device)
    images = images_of(1, 3, 3, 4).to(backend.device)
    for origins in (far, -far):
        window = ops.crop_windows(images, torch.zeros(1, device=backend.device).long(), origins, 2, fill)
        assert window.eq(fill).all()


def test_strides_of_every_argument(backend):
    sample = crops(images_of(3, 6, 5, 4, dtype=torch.float32), (3, 4))
    expected = sample.call(numpys)
    images, which, origins = (t.to(backend.device) for t in sample.tensors)
    images = images.movedim(3, 1).contiguous().movedim(1, 3)
    which = torch.stack([which, which + 9], 1)[:, 0]
    origins = origins.t().contiguous().t()
    assert not images.is_contiguous() and not which.is_contiguous() and not origins.is_contiguous()
    same_bytes(ops.crop_windows(images, which, origins, **sample.options), expected)


def test_of_nothing(backend):
    for images, windows in ((images_of(2, 3, 3, 2), 0), (images_of(2, 3, 3, 0), 3)):
        sample = crops(images, (2, 2), windows)
        placed = [t.to(backend.device) for t in sample.tensors]
        assert ops.crop_windows(*placed, **sample.options).shape == (windows, 2, 2, images.size(3))


CASES = st.builds(
    lambda images, dtype, size, windows, fill, seed: crops(
        images_of(*images, dtype=dtype, seed=seed), size, windows, fill, seed
    ),
    st.tuples(*(st.integers(1, top) for top in (3, 9, 9, 9))),
    st.sampled_from([d for d in DTYPES if d is not torch.bool]),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.integers(1, 9),
    st.integers(0, 255),
    st.integers(0, 99),
)


def test_agrees_with_slices(backend):
    for_all(backend, CASES, lambda sample: check(sample, backend), examples=150)


IMAGES, WHICH, ORIGINS = torch.ones(2, 4, 4, 3), torch.tensor([0, 1, 1]), torch.zeros(3, 2).long()
REFUSED = [
    (TypeError, "input", lambda i, n, o: ops.crop_windows([], n, o, 2)),
    (TypeError, "images", lambda i, n, o: ops.crop_windows(i, [0, 1], o, 2)),
    (TypeError, "origins", lambda i, n, o: ops.crop_windows(i, n, None, 2)),
    (TypeError, "size", lambda i, n, o: ops.crop_windows(i, n, o, 2.5)),
    (TypeError, "fill", lambda i, n, o: ops.crop_windows(i, n, o, 2, 0.5)),
    (RuntimeError, "fill is 256", lambda i, n, o: ops.crop_windows(i, n, o, 2, 256)),
    (RuntimeError, "fill is -1", lambda i, n, o: ops.crop_windows(i, n, o, 2, -1)),
    (RuntimeError, "size is", lambda i, n, o: ops.crop_windows(i, n, o, (2, 0))),
    (RuntimeError, "size is .* less than", lambda i, n, o: ops.crop_windows(i, n, o, (1, 2**31))),
    (RuntimeError, "size is .* bytes", lambda i, n, o: ops.crop_windows(i, n, o, 2**31 - 1)),
    (RuntimeError, "size is .* bytes", lambda i, n, o: ops.crop_windows(i, n[:0], o[:0], 2**31 - 1)),
    (RuntimeError, "input has shape", lambda i, n, o: ops.crop_windows(i[0], n, o, 2)),
    (RuntimeError, "images has dtype", lambda i, n, o: ops.crop_windows(i, n.int(), o, 2)),
    (RuntimeError, "images has shape", lambda i, n, o: ops.crop_windows(i, o, o, 2)),
    (RuntimeError, "images has shape", lambda i, n, o: ops.crop_windows(i, n[0], o, 2)),
    (RuntimeError, "images is on meta", lambda i, n, o: ops.crop_windows(i, n.to("meta"), o, 2)),
    (RuntimeError, "origins has dtype", lambda i, n, o: ops.crop_windows(i, n, o.double(), 2)),
    (RuntimeError, "origins has shape", lambda i, n, o: ops.crop_windows(i, n, o[:2], 2)),
    (RuntimeError, "origins is on meta", lambda i, n, o: ops.crop_windows(i, n, o.to("meta"), 2)),
    (IndexError, "images has 2", lambda i, n, o: ops.crop_windows(i, n + 1, o, 2)),
    (IndexError, "images has -1", lambda i, n, o: ops.crop_windows(i, n - 1, o, 2)),
    (IndexError, "images has 1; .* 0 images", lambda i, n, o: ops.crop_windows(i[:0], n, o, 2)),
]


@pytest.mark.parametrize(("error", "message", "call"), REFUSED)
def test_refuses(backend, error, message, call):
    with pytest.raises(error, match=message):
        call(*(t.to(backend.device) for t in (IMAGES, WHICH, ORIGINS)))
