"""Augmentation keeps shape and channels whatever it draws; evaluation is the deployed preprocessing; both reach the
workers.
"""

from __future__ import annotations

import pickle
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mae_deploy.data.config import CropConfig
from mae_deploy.data.transforms import NormaliseImages, eval_transform, train_transform
from mae_deploy.errors import ConfigError
from mae_deploy.images.preprocess import default_preprocess
from mae_deploy.images.read import Array
from mae_deploy.seeding import seed_everything

WHOLE = CropConfig(min_scale=1.0, hflip=0.0)
"""A crop of the whole area: of a square picture, torchvision takes it as it is where no other shape fits."""


def pixels_of(channels: int, height: int = 13, width: int = 17) -> Array:
    return np.random.default_rng(channels).integers(0, 256, (height, width, channels), dtype=np.uint8)


def image_of(pixels: Array) -> Image.Image:
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("notation", [None, "rand-m9-mstd0.5-inc1", "rand-m10-n3"])
@pytest.mark.parametrize("translate", [0.0, 0.2])
def test_shape_and_type_hold_for_every_draw(channels: int, notation: str | None, translate: float) -> None:
    """timm's strongest level asks Pillow for 0 bits, and its colour operations do not know RGBA: both raised about once
    in a thousand images.
    """
    transform = train_transform(
        default_preprocess((10, 15), channels), CropConfig(translate=translate), auto_augment=notation
    )
    image = image_of(pixels_of(channels))
    seed_everything(0)
    for _ in range(60):
        found = transform(image)
        assert (found.shape, found.dtype) == ((channels, 10, 15), torch.uint8)


def test_posterizing_at_full_strength(monkeypatch: pytest.MonkeyPatch) -> None:
    transform = train_transform(default_preprocess((13, 13)), WHOLE, auto_augment="rand-m10-inc1")
    augment: Any = transform.steps[-1]
    augment.ops = [operation for operation in augment.ops if operation.name.startswith("Posterize")]
    assert len(augment.ops) == 1
    monkeypatch.setattr(random, "random", lambda: 0.0)  # every operation is applied
    pixels = pixels_of(3, 13, 13)
    np.testing.assert_array_equal(transform(image_of(pixels)).permute(1, 2, 0), pixels & 128)


def test_colours_change_beside_an_alpha_channel_that_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    transform = train_transform(default_preprocess((13, 13), 4), WHOLE, auto_augment="rand-m10-inc1")
    augment: Any = transform.steps[-1]
    augment.ops = [operation for operation in augment.ops if operation.name == "Invert"]
    monkeypatch.setattr(random, "random", lambda: 0.0)
    augment.num_layers = 1
    pixels = pixels_of(4, 13, 13)
    found = transform(image_of(pixels)).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(found[:, :, 3], pixels[:, :, 3])
    np.testing.assert_array_equal(found[:, :, :3], 255 - pixels[:, :, :3])


@pytest.mark.parametrize("notation", ["foo", "", "augmix-m5", "rand-m9-wz1"])
def test_notation_that_timm_does_not_know(notation: str) -> None:
    with pytest.raises(ConfigError, match="--auto-augment"):
        train_transform(default_preprocess((10, 15)), CropConfig(), auto_augment=notation)


def test_flip() -> None:
    pixels = pixels_of(3, 13, 13)
    plain = train_transform(default_preprocess((13, 13)), WHOLE)(image_of(pixels))
    np.testing.assert_array_equal(plain.permute(1, 2, 0), pixels)
    flipped = train_transform(default_preprocess((13, 13)), CropConfig(min_scale=1.0, hflip=1.0))(image_of(pixels))
    assert torch.equal(flipped, plain.flip(2))


def test_translation_moves_the_whole_picture_at_most_that_far() -> None:
    transform = train_transform(default_preprocess((20, 20), 1), CropConfig(hflip=0.0, translate=0.1))
    dot = np.zeros((20, 20, 1), np.uint8)
    dot[11, 7] = 255
    seed_everything(0)
    places = {tuple(transform(image_of(dot))[0].nonzero()[0].tolist()) for _ in range(60)}
    assert len(places) > 9
    assert all(abs(row - 11) <= 2 and abs(column - 7) <= 2 for row, column in places)


def test_the_crop_is_random_and_within_its_share() -> None:
    """Each pixel's value is its place, so the corners tell the crop's size."""
    rows, columns = np.meshgrid(np.arange(200), np.arange(200), indexing="ij")
    image = Image.fromarray(np.stack([rows, columns, rows * 0], axis=2).astype(np.uint8))
    transform = train_transform(default_preprocess((40, 40)), CropConfig(min_scale=0.25, max_scale=0.36, hflip=0.0))
    seed_everything(0)
    areas = []
    for _ in range(40):
        found = transform(image).float()
        # The corners' centres lie half a target pixel inside.
        areas.append(
            float((found[0, -1, 0] - found[0, 0, 0]) * (found[1, 0, -1] - found[1, 0, 0])) * (40 / 39) ** 2 / 200**2
        )
    assert len({round(area, 3) for area in areas}) > 9
    # Rounding of two grey levels a side of about 100, and of the crop to whole pixels.
    assert all(0.25 * 0.93 < area < 0.36 * 1.07 for area in areas)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_evaluation_is_the_deployed_crop(channels: int) -> None:
    spec = default_preprocess((10, 15), channels)
    image = image_of(pixels_of(channels))
    np.testing.assert_array_equal(eval_transform(spec)(image).permute(1, 2, 0), spec.crop(image))


def test_normalisation_in_torch_is_the_deployed_one() -> None:
    """To the bit: the same three operations in float32."""
    spec = default_preprocess((16, 16))
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    found = NormaliseImages(spec)(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()))
    np.testing.assert_array_equal(found, spec.normalise(pixels))


def test_transforms_can_be_sent_to_workers_that_are_not_forked() -> None:
    """macOS, Windows and Python 3.14 do not fork by default."""
    spec = default_preprocess((10, 15))
    image = image_of(pixels_of(3))
    for transform in (eval_transform(spec), train_transform(spec, CropConfig(), auto_augment="rand-m9-mstd0.5-inc1")):
        copy = pickle.loads(pickle.dumps(transform))
        seed_everything(1)
        expected = transform(image)
        seed_everything(1)
        assert torch.equal(copy(image), expected)


# --- the paper's other crops, table 1e ------------------------------------------------------------------------------


def places_of(
    crop: CropConfig, size: tuple[int, int], image_size: tuple[int, int], draws: int = 40
) -> list[tuple[int, int, int]]:
    """Row and column that each crop's corner shows, and the width it spans; each pixel's value is its place, plus
    50.
    """
    rows, columns = np.meshgrid(np.arange(size[0]) + 50, np.arange(size[1]) + 50, indexing="ij")
    image = Image.fromarray(np.stack([rows, columns, rows * 0], axis=2).astype(np.uint8))
    transform = train_transform(default_preprocess(image_size), crop)
    seed_everything(0)
    found = [transform(image).int() for _ in range(draws)]
    return [(int(one[0, 0, 0]), int(one[1, 0, 0]), int(one[1, 0, -1] - one[1, 0, 0])) for one in found]


def test_no_augmentation_is_the_deployed_crop() -> None:
    pixels = pixels_of(3, 23, 29)
    transform = train_transform(default_preprocess((10, 15)), CropConfig(crop="none"))
    for _ in range(5):
        np.testing.assert_array_equal(
            transform(image_of(pixels)).permute(1, 2, 0), default_preprocess((10, 15)).crop(image_of(pixels))
        )


def test_a_fixed_crop_of_small_images_moves_by_an_eighth() -> None:
    places = places_of(CropConfig(crop="fixed", hflip=0.0), (32, 32), (32, 32), 80)
    # Four pixels of padding, which are 0: what is not black at the corner is at most four pixels inside.
    inside = {(row - 50, column - 50) for row, column, _ in places if row and column}
    assert {place for pair in inside for place in pair} == set(range(5))
    assert any(row == 0 for row, _, _ in places)


def test_a_fixed_crop_of_large_images_keeps_its_scale() -> None:
    places = places_of(CropConfig(crop="fixed", hflip=0.0), (160, 200), (70, 70))
    assert len({place[:2] for place in places}) > 9
    # 160 pixels become 80: a crop of 70 spans 69 steps of two.
    assert {width for _, _, width in places} <= {136, 137, 138, 139}


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_colour_jitter_changes_colours_and_no_alpha(channels: int) -> None:
    pixels = np.full((13, 13, channels), 100, np.uint8)
    pixels[0, 0, :] = (200, 20, 90, 7)[:channels]
    transform = train_transform(
        default_preprocess((13, 13), channels), CropConfig(min_scale=1.0, hflip=0.0, color_jitter=0.8)
    )
    seed_everything(0)
    found = transform(image_of(pixels)).permute(1, 2, 0).numpy()
    assert found.shape == pixels.shape
    assert not np.array_equal(found[:, :, :3], pixels[:, :, :3])
    np.testing.assert_array_equal(found[:, :, 3:], pixels[:, :, 3:])


# --- more channels, more bits, smaller decoding -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "crop", [CropConfig(), CropConfig(crop="fixed"), CropConfig(crop="none"), CropConfig(translate=0.1)]
)
@pytest.mark.parametrize(("dtype", "pixel_max"), [(np.uint8, None), (np.uint16, 10000.0), (np.float32, 1.0)])
def test_arrays_of_any_channels_and_numbers(crop: CropConfig, dtype: type, pixel_max: float | None) -> None:
    spec = replace(default_preprocess((10, 15), 5), pixel_max=pixel_max)
    pixels: Array = (np.random.default_rng(0).random((13, 17, 5)) * (pixel_max or 255)).astype(dtype)
    found = train_transform(spec, crop)(pixels)
    assert (found.shape, str(found.dtype)) == ((5, 10, 15), f"torch.{spec.dtype}")
    assert abs(float(found.float().mean()) / (pixel_max or 255) - 0.5) < 0.15


def test_an_array_and_a_picture_are_drawn_alike() -> None:
    pixels = pixels_of(3, 40, 50)
    transform = train_transform(default_preprocess((10, 15)), CropConfig())
    for seed in range(5):
        seed_everything(seed)
        expected = transform(image_of(pixels))
        seed_everything(seed)
        assert torch.equal(transform(pixels), expected)


@pytest.mark.parametrize(
    ("more", "option"), [({"auto_augment": "rand-m9-mstd0.5-inc1"}, "--auto-augment none"), ({}, "--color-jitter 0")]
)
def test_colours_of_many_channels_cannot_be_augmented(more: dict[str, str], option: str) -> None:
    with pytest.raises(ConfigError, match="colours of 5 channels") as caught:
        train_transform(default_preprocess((10, 15), 5), CropConfig(color_jitter=0.4), **more)
    assert option in str(caught.value.hint)


@pytest.mark.parametrize(
    ("crop", "size", "factor"),
    [
        (CropConfig(min_scale=0.2), (1150, 1150), 1),  # 224 / sqrt(0.2 x 3/4) = 578.4
        (CropConfig(min_scale=0.2), (1160, 1160), 2),
        (CropConfig(min_scale=0.2), (4000, 3000), 4),
        (CropConfig(min_scale=0.2), (9000, 223), 1),
        (CropConfig(crop="fixed"), (2048, 2048), 8),
        (CropConfig(crop="fixed"), (2048, 2047), 4),
        (CropConfig(crop="none"), (600, 512), 2),
        (CropConfig(translate=0.1), (448, 900), 2),
    ],
)
def test_decoding_never_leaves_less_than_a_crop_needs(crop: CropConfig, size: tuple[int, int], factor: int) -> None:
    shrink = train_transform(default_preprocess((224, 224)), crop).shrink
    assert shrink is not None
    assert shrink(*size) == shrink(size[1], size[0]) == factor
    assert eval_transform(default_preprocess((224, 224))).shrink is None
