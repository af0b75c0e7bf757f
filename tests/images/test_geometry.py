"""The crop modes that timm has are timm's to the last bit; the others by hand."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
from PIL import Image
from timm.data import create_transform

from mae_deploy.errors import ConfigError
from mae_deploy.images.geometry import CropMode, Interpolation, place
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.images.read import Array

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
SIZES = [(301, 203), (97, 380), (17, 19), (224, 224), (50, 3), (1, 260)]
"""Heights and widths; timm enlarges the last to 0 rows in mode border, so it is left out there."""


def noise(*shape: int) -> Array:
    return np.random.default_rng(5).integers(0, 256, shape, dtype=np.uint8)


def white(height: int, width: int) -> Image.Image:
    return Image.new("RGB", (width, height), (255, 255, 255))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest", "lanczos", "box", "hamming"])
@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_timms_modes_are_timms(crop_mode: CropMode, crop_pct: float, interpolation: Interpolation) -> None:
    # Of another form than a square, timm rounds what covers it otherwise than torchvision, and center is torchvision's.
    for size in [(56, 56)] if crop_mode == "center" else [(56, 56), (32, 47)]:
        settings: dict[str, Any] = {"crop_mode": crop_mode, "crop_pct": crop_pct, "interpolation": interpolation}
        theirs: Any = create_transform((3, *size), mean=MEAN, std=STD, **settings)
        ours = Preprocess(image_size=size, mean=MEAN, std=STD, **settings)
        for form in SIZES[: -1 if crop_mode == "border" else None]:
            pixels = noise(*form, 3)
            # The same pixels; mean and standard deviation are applied in another order of float32 operations.
            np.testing.assert_allclose(ours([pixels])[0], theirs(Image.fromarray(pixels)).numpy(), atol=1e-5)


def test_squash_shows_the_whole_image() -> None:
    pixels = np.zeros((30, 70, 3), np.uint8)
    pixels[:, 35:] = 200
    spec = Preprocess(image_size=(16, 16), crop_mode="squash", crop_pct=1.0, interpolation="nearest")
    np.testing.assert_array_equal(spec.crop(pixels), np.repeat([[[0] * 3] * 8 + [[200] * 3] * 8], 16, axis=0))


@pytest.mark.parametrize(
    ("form", "rows", "columns"),
    [
        ((40, 80), (4, 12), (0, 16)),  # half as high as wide: 8 of 16 rows, 4 above and 4 below
        ((80, 40), (0, 16), (4, 12)),
        ((50, 80), (3, 13), (0, 16)),  # 10 of 16 rows
        ((64, 80), (1, 14), (0, 16)),  # 12.8 is 13 of 16 rows, 1 above and 2 below
        ((3, 900), (7, 8), (0, 16)),  # never less than one row
        ((20, 20), (0, 16), (0, 16)),
    ],
)
@pytest.mark.parametrize(("crop_mode", "beside"), [("letterbox", (0, 0, 0)), ("border", (102, 128, 153))])
def test_the_sides_of_an_image_that_keeps_its_form(
    form: tuple[int, int], rows: tuple[int, int], columns: tuple[int, int], crop_mode: CropMode, beside: tuple[int, ...]
) -> None:
    spec = Preprocess(image_size=(16, 16), crop_mode=crop_mode, crop_pct=1.0, mean=MEAN, std=STD)
    found = spec.crop(white(*form))
    expected = np.broadcast_to(np.array(beside, np.uint8), (16, 16, 3)).copy()
    expected[rows[0] : rows[1], columns[0] : columns[1]] = 255
    np.testing.assert_array_equal(found, expected)


def test_a_letterbox_is_whole_whatever_the_share_of_the_crop() -> None:
    whole, share = (
        Preprocess(image_size=(16, 16), crop_mode="letterbox", crop_pct=crop_pct) for crop_pct in (1.0, 0.5)
    )
    np.testing.assert_array_equal(whole.crop(white(16, 30)), share.crop(white(16, 30)))


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border", "letterbox"])
@pytest.mark.parametrize("form", [(31, 57), (57, 31), (16, 16)])
def test_arrays_are_fitted_as_images_are(crop_mode: CropMode, form: tuple[int, int]) -> None:
    """Six channels of 8 bits, of which the first three are a picture's; in floating point up to Pillow's rounding to
    whole levels.
    """
    pixels, size = noise(*form, 3), (16, 24)
    six = np.concatenate([pixels, pixels], axis=2)
    plain = Preprocess(image_size=size, crop_mode=crop_mode, mean=MEAN, std=STD).crop(pixels)
    arrays = Preprocess(image_size=size, crop_mode=crop_mode, channels=6, mean=MEAN * 2, std=STD * 2).crop(six)
    np.testing.assert_array_equal(arrays, np.concatenate([plain, plain], axis=2))
    narrow, wide = (
        Preprocess(image_size=size, crop_mode=crop_mode, pixel_max=limit, mean=MEAN, std=STD, interpolation="bilinear")
        for limit in (None, 510)
    )
    # Pillow rounds bytes after each of two passes, by half a level.
    np.testing.assert_allclose(wide.crop(pixels.astype(np.float32) * 2) / 2, narrow.crop(pixels), atol=1)


def test_bytes_beside_an_array_of_bytes_are_bytes() -> None:
    spec = Preprocess(
        image_size=(4, 4), crop_mode="border", crop_pct=1.0, channels=1, mean=(0.5,), std=(1,), pixel_max=99
    )
    found = spec.crop(np.full((2, 4, 1), 7, np.uint8))
    assert found[:, 0, 0].tolist() == [50, 7, 7, 50]  # 49.5 of 99, in whole numbers as the image itself


def test_strips_are_not_cut_where_all_of_them_is_shown() -> None:
    strip = np.zeros((2, 1000, 3), np.uint8)
    strip[:, 990:] = 255
    spec = Preprocess(image_size=(4, 100), crop_mode="squash", crop_pct=1.0, interpolation="nearest")
    assert spec.crop(strip)[0, :, 0].tolist() == [0] * 99 + [255]
    assert place("center", (4, 100), 1.0, (1000, 2)).part == (400, 0, 600, 2)


def test_names_that_are_none() -> None:
    for name, value in (("crop_mode", "centre"), ("interpolation", "cubic")):
        with pytest.raises(ConfigError, match=f"{name} '{value}' is not one of "):
            Preprocess(image_size=(4, 4), **cast("dict[str, Any]", {name: value}))


def test_another_mode_shows_the_whole_image_unless_told_otherwise() -> None:
    center = Preprocess(image_size=(4, 4))
    assert center.altered() == center
    assert center.altered(crop_mode="center").crop_pct == 0.875
    squash = center.altered(crop_mode="squash")
    assert (squash.crop_mode, squash.crop_pct) == ("squash", 1.0)
    assert center.altered(crop_mode="border", crop_pct=0.9).crop_pct == 0.9
    assert squash.altered(crop_mode="squash", mean=MEAN).mean == MEAN
