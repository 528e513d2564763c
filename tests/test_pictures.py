"""Pictures: scales, crops and arrangements."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zfcuda.report import pictures

RNG = np.random.default_rng(0)


def solid(height, width, value):
    return np.full((height, width, 3), value, np.uint8)


def test_projection_shows_zero_as_grey_and_the_extreme_as_white_or_black():
    values = np.zeros((3, 2, 2))
    values[0, 0, 0], values[1, 0, 1] = -4, 2
    shown = pictures.projection(values)
    assert shown.dtype == np.uint8 and shown.shape == (2, 2, 3)
    np.testing.assert_array_equal(shown[1, 1], [128, 128, 128])
    np.testing.assert_array_equal(shown[0, 0], [1, 128, 128])
    np.testing.assert_array_equal(shown[0, 1], [128, 192, 128])  # 128 + 63.5, to even


@given(st.floats(1e-6, 1e6))
def test_projection_does_not_depend_on_scale_and_mirrors_sign(factor):
    values = np.random.default_rng(1).normal(size=(3, 4, 5))
    shown = pictures.projection(values).astype(int)
    assert np.abs(pictures.projection(values * factor).astype(int) - shown).max() <= 1
    assert np.abs(pictures.projection(-values).astype(int) + shown - 256).max() <= 1


def test_projection_of_nothing_is_grey():
    assert (pictures.projection(np.zeros((3, 4, 4))) == pictures.GREY).all()


def test_one_channel_becomes_grey_levels():
    shown = pictures.projection(RNG.normal(size=(1, 3, 3)))
    assert (shown == shown[:, :, :1]).all()


def test_patch_undoes_the_loader():
    pixels = RNG.integers(0, 256, size=(5, 7, 3)).astype(np.uint8)
    mean, std = np.array([123.0, 116.0, 103.0]), np.array([58.0, 57.0, 56.0])
    values = (pixels.transpose(2, 0, 1) - mean[:, None, None]) / std[:, None, None]
    np.testing.assert_array_equal(pictures.patch(values, mean, std), pixels)
    np.testing.assert_array_equal(pictures.patch(np.array([[[-5.0, 300.0]]])), [[[0] * 3, [255] * 3]])


@given(st.integers(-9, 9), st.integers(-9, 9), st.integers(1, 9), st.integers(1, 9))
def test_crop_equals_a_crop_of_the_padded_picture(top, left, height, width):
    picture = np.random.default_rng(2).integers(0, 256, size=(6, 5, 3)).astype(np.uint8)
    padded = np.pad(picture, ((20, 20), (20, 20), (0, 0)), constant_values=pictures.GREY)
    expected = padded[20 + top : 20 + top + height, 20 + left : 20 + left + width]
    np.testing.assert_array_equal(pictures.crop(picture, (top, left, top + height, left + width)), expected)


def test_enlarge_repeats_pixels_and_keeps_the_aspect():
    picture = RNG.integers(0, 256, size=(2, 4, 3)).astype(np.uint8)
    np.testing.assert_array_equal(pictures.enlarge(picture, 12), picture.repeat(3, 0).repeat(3, 1))
    assert pictures.enlarge(solid(40, 20, 7), 10).shape == (10, 5, 3)


def test_grid_places_pictures_row_by_row():
    shown = pictures.grid([solid(2, 3, i) for i in (10, 20, 30)], columns=2, gap=1, fill=255)
    assert shown.shape == (5, 7, 3)
    assert (shown[:2, :3] == 10).all() and (shown[:2, 4:] == 20).all() and (shown[3:, :3] == 30).all()
    assert (shown[2] == 255).all() and (shown[:, 3] == 255).all() and (shown[3:, 4:] == 255).all()


def test_fig2_puts_projections_left_and_patches_right_in_the_same_order():
    maps = [([solid(4, 4, 10 * m + 1)] * 9, [solid(4, 4, 10 * m + 2)] * 9) for m in range(4)]
    shown = pictures.fig2(maps, columns=2)
    block, half = 3 * 4 + 2, 2 * (3 * 4 + 2) + 4
    assert shown.shape == (half, 2 * half + 8, 3)
    for m in range(4):
        y, x = m // 2 * (block + 4), m % 2 * (block + 4)
        assert (shown[y, x] == 10 * m + 1).all() and (shown[y, x + half + 8] == 10 * m + 2).all()


def test_fig2_shows_missing_entries_as_grey():
    shown = pictures.fig2([([solid(4, 4, 1)], [solid(4, 4, 2)]), ([], [])], columns=2)
    assert (shown[0, 0] == 1).all() and (shown[0, 5] == pictures.GREY).all()
    assert (shown[0, 14 + 4] == pictures.GREY).all()


def test_filters_each_or_common_scale():
    weight = np.stack([np.full((3, 2, 2), 1.0), np.full((3, 2, 2), 0.5)])
    each = pictures.filters(weight, columns=2, size=2)
    common = pictures.filters(weight, columns=2, size=2, scale="common")
    assert (each[:, :2] == 255).all() and (each[:, 4:] == 255).all()
    assert (common[:, :2] == 255).all() and (common[:, 4:] == 192).all()
    assert pictures.filters(np.ones((96, 3, 7, 7))).shape[0] == 10 * 30 - 2


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: pictures.projection(np.zeros((2, 4, 4))), r"\(2, 4, 4\)"),
        (lambda: pictures.grid([], 3), "0 pictures"),
        (lambda: pictures.fig2([([], [])]), "dead"),
        (lambda: pictures.fig2([([solid(1, 1, 0)] * 10, [])]), "10 pictures"),
        (lambda: pictures.filters(np.zeros((3, 7, 7))), r"\(3, 7, 7\)"),
        (lambda: pictures.filters(np.zeros((1, 3, 7, 7)), scale="all"), "'all'"),
    ],
)
def test_errors_name_the_argument(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("channels", [1, 3])
def test_many_pictures_at_once_are_those_of_one_by_one(channels):
    values = RNG.normal(size=(4, channels, 30, 20)).astype(np.float32)
    values[1] = 0
    kept = values.copy()
    for many, one in zip(pictures.projections(values), values, strict=True):
        difference = many.astype(int) - pictures.projection(one, pictures.white(one))
        assert np.abs(difference).max() <= 1  # float32 against float64
    mean, std = np.arange(channels) + 100.0, np.full(channels, 60.0)
    for many, one in zip(pictures.patches(values, mean, std), values, strict=True):
        assert np.abs(many.astype(int) - pictures.patch(one, mean, std)).max() <= 1
    np.testing.assert_array_equal(values, kept)


def test_white_clips_one_in_two_hundred_of_what_is_not_zero():
    values = np.concatenate([np.zeros(5000), RNG.permutation(np.arange(1.0, 1001))])
    scale = pictures.white(values)
    assert (values > scale).sum() == 5
    assert pictures.white(np.zeros((3, 4))) == 0
