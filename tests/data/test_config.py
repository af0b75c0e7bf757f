"""What is set wins over a checkpoint's preprocessing, and that over the default; impossible values are named."""

from __future__ import annotations

from typing import Any

import pytest

from mae_deploy.data.config import CropConfig, DataConfig
from mae_deploy.errors import ConfigError
from mae_deploy.images.preprocess import Preprocess, default_preprocess

BASE = Preprocess(image_size=(8, 8), crop_pct=0.5, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))


def test_precedence() -> None:
    assert DataConfig().preprocess((10, 15), 3) == default_preprocess((10, 15))
    assert DataConfig().preprocess((10, 15), 3, BASE) == Preprocess(
        image_size=(10, 15), crop_pct=0.5, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)
    )
    assert DataConfig(crop_pct=0.9).preprocess((10, 15), 3, BASE) == Preprocess(
        image_size=(10, 15), crop_pct=0.9, mean=BASE.mean, std=BASE.std
    )
    # Another number of channels has other statistics.
    assert DataConfig().preprocess((10, 15), 1, BASE) == default_preprocess((10, 15), 1)
    assert DataConfig(mean=(0.7,), std=(0.8,)).preprocess((10, 15), 1).mean == (0.7,)


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (DataConfig, {"num_workers": -2}, "--num-workers must be at least -1, got -2"),
        (DataConfig, {"max_corrupt": -1}, "--max-corrupt must be at least 0, got -1"),
        (DataConfig, {"repeated_aug": 0}, "--repeated-aug must be at least 1, got 0"),
        (DataConfig, {"epoch_images": 0}, "--epoch-images must be at least 1, got 0"),
        (CropConfig, {"color_jitter": -0.1}, "--color-jitter must be at least 0, got -0.1"),
        (DataConfig, {"crop_pct": 0.0}, "--crop-pct must be above 0 and at most 1, got 0.0"),
        (DataConfig, {"crop_pct": 1.1}, "--crop-pct must be above 0 and at most 1, got 1.1"),
        (CropConfig, {"min_scale": 0.0}, "--min-scale must be above 0, got 0.0"),
        (CropConfig, {"min_scale": 1.5}, "--min-scale 1.5 must be at most max_scale, 1"),
        (CropConfig, {"hflip": 1.5}, "--hflip must be at least 0 and at most 1, got 1.5"),
        (CropConfig, {"translate": 1.0}, "--translate must be at least 0 and below 1, got 1.0"),
    ],
)
def test_impossible_values(config: type[Any], values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**values)


def test_any_number_of_channels() -> None:
    assert DataConfig().preprocess((10, 15), 2).mean == (0.5, 0.5)


def test_a_mean_for_each_channel() -> None:
    with pytest.raises(ConfigError, match="one value for each of 3 channels, not 1 and 3"):
        DataConfig(mean=(0.5,)).preprocess((10, 15), 3)
