"""A patch is of a region if it sees any of it: counted pixel by pixel, and moved by the crop as the image is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mae_deploy.errors import ConfigError
from mae_deploy.images.geometry import CropMode
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.images.read import Array
from mae_deploy.images.regions import patches_of

P = 8


def spec(crop_mode: CropMode = "center", crop_pct: float = 1.0, size: tuple[int, int] = (32, 48)) -> Preprocess:
    return Preprocess(image_size=size, crop_mode=crop_mode, crop_pct=crop_pct)


def listed(found: Array | None) -> list[int] | None:
    return None if found is None else found.tolist()


def test_an_image_of_the_inputs_size() -> None:
    """4 x 6 patches of 8 pixels: no resize, no crop."""
    assert listed(patches_of(spec(), P, (32, 48), (0, 0, 8, 8))) == [0]
    assert listed(patches_of(spec(), P, (32, 48, 3), (0, 0, 8.01, 8))) == [0, 1]
    assert listed(patches_of(spec(), P, (32, 48), (7, 7, 9, 9))) == [0, 1, 6, 7]
    assert listed(patches_of(spec(), P, (32, 48), (40, 24, 48, 32))) == [23]
    assert listed(patches_of(spec(), P, (32, 48), (-5, -5, 1e9, 1e9))) == list(range(24))
    assert listed(patches_of(spec(), P, (32, 48), [(0, 0, 8, 8), (40, 24, 48, 32), (1, 1, 2, 2)])) == [0, 23]


@pytest.mark.parametrize("box", [(3, 3, 3, 9), (3, 3, 9, 3), (-9, 0, 0, 8), (48, 0, 60, 8), (0, 32, 8, 50), []])
def test_an_empty_region(box: Any) -> None:
    assert patches_of(spec(), P, (32, 48), box) is None
    assert patches_of(spec(), P, (32, 48), np.zeros((32, 48), bool)) is None


def test_what_the_crop_hides() -> None:
    """Of 32 x 96 pixels, the 24 at either side are not seen."""
    assert patches_of(spec(), P, (32, 96), (0, 0, 24, 32)) is None
    assert listed(patches_of(spec(), P, (32, 96), (0, 0, 25, 1))) == [0]
    assert listed(patches_of(spec("squash"), P, (32, 96), (0, 0, 24, 1))) == [0, 1]  # 16 pixels to a patch
    mask = np.zeros((32, 96), np.uint8)
    mask[:, :24] = 255
    assert patches_of(spec(), P, (32, 96), mask) is None
    mask[31, 24] = 1
    assert listed(patches_of(spec(), P, (32, 96), mask)) == [18]


@pytest.mark.parametrize("crop_mode", ["letterbox", "border"])
def test_what_lies_beside_the_image_sees_none_of_it(crop_mode: CropMode) -> None:
    """Of 48 x 48 pixels, shown 32 x 32: a patch at either side is beside the image."""
    assert listed(patches_of(spec(crop_mode), P, (48, 48), (0, 0, 48, 1))) == [1, 2, 3, 4]
    whole = [row * 6 + column for row in range(4) for column in (1, 2, 3, 4)]
    assert listed(patches_of(spec(crop_mode), P, (48, 48), np.ones((48, 48), bool))) == whole


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border", "letterbox"])
@pytest.mark.parametrize(("form", "crop_pct"), [((480, 640), 0.875), ((97, 61), 1.0), ((20, 30), 0.9), ((3, 900), 1.0)])
def test_boxes_and_masks_are_what_the_crop_shows(crop_mode: CropMode, form: tuple[int, int], crop_pct: float) -> None:
    """A white box on black, through the crop itself with the filter that reaches no further than a pixel."""
    height, width = form
    shown = Preprocess(image_size=(32, 48), crop_mode=crop_mode, crop_pct=crop_pct, interpolation="box")
    random = np.random.default_rng(3)
    for _ in range(20):
        left, right = sorted(random.integers(0, width + 1, 2).tolist())
        top, bottom = sorted(random.integers(0, height + 1, 2).tolist())
        mask = np.zeros(form, bool)
        mask[top:bottom, left:right] = True
        found = patches_of(shown, P, form, (left, top, right, bottom))
        assert listed(found) == listed(patches_of(shown, P, form, mask))
        pixels = shown.crop(np.repeat(np.where(mask, 255, 0).astype(np.uint8)[:, :, None], 3, axis=2))
        if crop_mode == "border":
            pixels = np.where(np.isin(pixels, [124, 116, 104]), 0, pixels)  # the mean, beside the image
        patches = pixels[:, :, 0].reshape(4, P, 6, P)
        bright = np.flatnonzero(patches.max(axis=(1, 3)) > 0).tolist()
        # What is less than half a level bright rounds to black.
        assert set(bright) <= set(listed(found) or [])
        clear = np.flatnonzero(patches.max(axis=(1, 3)) > 127).tolist()
        assert set(clear) <= set(bright)


@pytest.mark.parametrize(
    ("region", "said"),
    [
        ((4, 0, 2, 9), r"the box \(4, 0, 2, 9\) ends before it begins"),
        ((0, 0, float("nan"), 9), "is not of numbers"),
        ((1, 2, 3), r"the region has the shape \(3,\) for an image 32x48"),
        (np.ones((48, 32), bool), r"the region has the shape \(48, 32\) for an image 32x48"),
    ],
)
def test_regions_that_are_none(region: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        patches_of(spec(), P, (32, 48), region)
