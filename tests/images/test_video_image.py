"""Frames in their own pixel format against the ordinary path: RGB pixels through Pillow."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from mae_deploy.errors import ConfigError
from mae_deploy.images.geometry import CropMode, Interpolation
from mae_deploy.images.preprocess import Preprocess, default_preprocess
from mae_deploy.images.read import Array
from mae_deploy.images.video_image import VideoImage

HEIGHT, WIDTH = 92, 142


@pytest.fixture(scope="module")
def pixels() -> Array:
    """Smooth waves of each colour, as chrominance at half the resolution keeps them."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    waves = [128 + 60 * np.sin(y / (9 + c)) + 50 * np.cos(x / (7 + 2 * c)) for c in range(3)]
    return np.stack(waves, axis=2).astype(np.uint8)


def as_format(pixels: Array, pixel_format: Any) -> Array:
    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
    found: Array = frame.to_ndarray(format=pixel_format)
    return found


@pytest.mark.parametrize("pixel_format", ["rgb24", "bgr24", "nv12", "yuv420p"])
def test_every_format_gives_the_same_picture(pixels: Array, pixel_format: Any) -> None:
    image = VideoImage.from_array(as_format(pixels, pixel_format), pixel_format)
    assert (image.width, image.height) == (WIDTH, HEIGHT)
    difference = image.rgb().astype(int) - pixels
    assert np.abs(difference).mean() < (0.01 if "24" in pixel_format else 2)
    assert np.abs(difference.mean(axis=(0, 1))).max() < 0.7  # of 255: no colour is shifted


@pytest.mark.parametrize(
    ("mode", "interpolation"),
    [
        *itertools.product(("center", "squash", "border", "letterbox"), ("bicubic",)),
        ("center", "box"),
        ("center", "lanczos"),
    ],
)
def test_pixels_are_near_those_of_the_ordinary_path(
    pixels: Array, mode: CropMode, interpolation: Interpolation
) -> None:
    spec = dataclasses.replace(default_preprocess((32, 48)), crop_mode=mode, interpolation=interpolation)
    image = VideoImage.from_array(as_format(pixels, "nv12"), "nv12")
    assert spec.converted(image) is image
    ours, ordinary = spec.crop(image), spec.crop(Image.fromarray(image.rgb()))
    assert ours.shape == (32, 48, 3)
    assert ours.dtype == np.uint8
    error = np.square(ours.astype(float) - ordinary).mean()
    assert 10 * np.log10(ordinary.var() / error) > 30  # dB
    np.testing.assert_array_equal(spec.crop_roughly(image), ours)
    grid = ours.reshape(2, 16, 3, 16, 3)
    np.testing.assert_array_equal(spec.crop_patches(image, np.array([1, 5]), 16), grid[[0, 1], :, [1, 2]])


@pytest.mark.parametrize("factor", [2, 3, 5])
def test_a_frame_that_is_shrunk_much_is_near_the_ordinary_path_too(pixels: Array, factor: int) -> None:
    large = np.asarray(Image.fromarray(pixels[:60, :100]).resize((48 * factor, 32 * factor)))
    spec = dataclasses.replace(default_preprocess((32, 48)), crop_pct=1.0)
    ours, ordinary = spec.crop(VideoImage.from_array(large, "bgr24")), spec.crop(large[..., ::-1].copy())
    error = np.square(ours.astype(float) - ordinary).mean()
    assert 10 * np.log10(ordinary.var() / error) > 30  # dB


@pytest.mark.parametrize(
    "spec",
    [
        Preprocess(image_size=(32, 48), interpolation="hamming"),
        Preprocess(image_size=(32, 48), channels=1, mean=(0.5,), std=(0.25,)),
        Preprocess(image_size=(32, 48), pixel_max=255.0),
    ],
)
def test_what_one_pass_cannot_do_is_done_as_ever(pixels: Array, spec: Preprocess) -> None:
    image = VideoImage.from_array(pixels, "rgb24")
    expected = spec.crop(image.rgb() if spec.channels == 3 else Image.fromarray(image.rgb()))
    np.testing.assert_array_equal(spec.crop(spec.converted(image)), expected)
    np.testing.assert_array_equal(spec.crop(image), expected)


def test_a_strip_is_cut_to_its_middle_as_ever() -> None:
    strip = np.repeat(np.arange(240, dtype=np.uint8)[None, :, None], 3, axis=2).repeat(2, axis=0).repeat(20, axis=1)
    spec = default_preprocess((32, 32))
    np.testing.assert_array_equal(spec.crop(VideoImage.from_array(strip, "rgb24")), spec.crop(strip))


@pytest.mark.parametrize("rotation", [0, 90, -90, 180])
def test_a_turned_frame_is_upright(pixels: Array, rotation: int) -> None:
    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
    image = VideoImage(frame, rotation=rotation)
    expected = np.rot90(pixels, rotation // 90)
    assert (image.height, image.width) == expected.shape[:2]
    np.testing.assert_allclose(image.rgb().astype(int), expected, atol=1)
    assert image.resized((30, 20), "bicubic").shape == (20, 30, 3)


def test_grey_frames_are_grey(pixels: Array) -> None:
    found = VideoImage.from_array(np.ascontiguousarray(pixels[:, :, 0]), "gray").rgb()
    np.testing.assert_allclose(found.astype(int), pixels[:, :, :1].repeat(3, axis=2), atol=2)  # rounding to video range


def test_nothing_is_copied() -> None:
    array = np.full((HEIGHT, WIDTH, 3), 50, np.uint8)
    image = VideoImage.from_array(array, "bgr24")
    array[:, :, 0] = 200
    np.testing.assert_allclose(image.resized((20, 20), "bicubic")[0, 0].astype(int), (50, 50, 200), atol=1)


@pytest.mark.parametrize(
    ("shape", "pixel_format"),
    [((9, 9), "rgb24"), ((9, 9, 4), "bgr24"), ((9, 8, 1), "gray"), ((10, 8), "nv12"), ((9, 8), "argb")],
)
def test_an_array_of_another_format_is_refused(shape: tuple[int, ...], pixel_format: Any) -> None:
    with pytest.raises(ConfigError, match=pixel_format):
        VideoImage.from_array(np.zeros(shape, np.uint8), pixel_format)
