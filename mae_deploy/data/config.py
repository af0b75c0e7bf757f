"""How images reach the model. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from mae_deploy.config import Settings, setting
from mae_deploy.errors import ConfigError
from mae_deploy.images.preprocess import Preprocess, default_preprocess


@dataclass(frozen=True, slots=True)
class Columns:
    """Columns of a table; None: the one that holds images, and `label`."""

    image: str | None = None
    label: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig(Settings):
    """Data."""

    num_workers: int = setting(-1, resume="free")
    """Processes that decode images; 0 decodes in the training process, -1 starts one for each core but one."""
    max_corrupt: int = setting(100, resume="free")
    """Unreadable files that are reported and skipped before the run gives up."""
    mean: tuple[float, ...] | None = setting(None, resume="fixed")
    """Mean of each channel for pixels in [0, 1]; default: ImageNet's for RGB, 0.5 otherwise."""
    std: tuple[float, ...] | None = setting(None, resume="fixed")
    """Standard deviation of each channel; default: ImageNet's for RGB, 0.25 otherwise."""
    pixel_max: float | None = setting(None, resume="fixed")
    """What pixels of more than 8 bits are divided by before --mean and --std, such as 65535, 10000 (Sentinel-2) or 1;
    default: 8-bit pixels, 255."""
    crop_pct: float | None = setting(None, resume="fixed")
    """Evaluation crop as a share of the resized image; default: 0.875 up to 224 px, 1.0 above."""
    cache: bool = setting(False, resume="free")
    """Keep decoded images in memory, for small sets of small images."""
    repeated_aug: int = setting(1, resume="fixed")
    """Views of each image in a batch, which is decoded once for them all; an epoch keeps its length and sees fewer
    images."""
    shuffle_buffer: int = setting(1000, resume="fixed")
    """Images that each worker mixes, where shards are streamed from a URL or a pipe."""
    epoch_images: int | None = setting(None, resume="fixed")
    """Images that make an epoch of streamed shards, which nobody has counted; whole sets have their own."""
    image_column: str | None = setting(None, resume="fixed")
    """Column of the images in a Hugging Face data set; default: the one that holds images."""
    label_column: str | None = setting(None, resume="fixed")
    """Column of the labels in a Hugging Face data set; default: label."""

    def __post_init__(self) -> None:
        if self.num_workers < -1 or self.max_corrupt < 0:
            raise ConfigError("--num-workers must be at least -1, --max-corrupt at least 0")
        if min(self.repeated_aug, self.shuffle_buffer, 1 if self.epoch_images is None else self.epoch_images) < 1:
            raise ConfigError("--repeated-aug, --shuffle-buffer and --epoch-images must be at least 1")
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise ConfigError(f"--crop-pct {self.crop_pct} must be above 0 and at most 1")
        if self.pixel_max is not None and not self.pixel_max > 0:
            raise ConfigError(f"--pixel-max {self.pixel_max:g} must be above 0")

    @property
    def columns(self) -> Columns:
        """Where a Hugging Face data set holds images and labels."""
        return Columns(self.image_column, self.label_column)

    def preprocess(self, image_size: tuple[int, int], channels: int, base: Preprocess | None = None) -> Preprocess:
        """The evaluation transform: what is set here, else `base` (a checkpoint's), else the default."""
        spec = (
            replace(base, image_size=image_size)
            if base is not None and base.channels == channels
            else default_preprocess(image_size, channels)
        )
        given = {
            name: value
            for name in ("mean", "std", "crop_pct", "pixel_max")
            if (value := getattr(self, name)) is not None
        }
        return replace(spec, **given)


@dataclass(frozen=True, kw_only=True, slots=True)
class CropConfig(Settings, resume="fixed"):
    """Augmentation."""

    crop: Literal["random", "fixed", "none"] = "random"
    """random: resized crop; fixed: a crop of fixed size at a random place; none: the centre, without flips (paper,
    table 1e)."""
    color_jitter: float = 0.0
    """Random change of brightness, contrast and saturation, each by up to this share; for 1, 3 and 4 channels."""
    min_scale: float = 0.2
    """Smallest share of the image's area in a random resized crop."""
    max_scale: float = setting(1.0, hidden=True)
    """Largest share of the image's area in a random resized crop."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    translate: float = 0.0
    """Random shift by up to this share of the image's side, instead of the random resized crop, where above 0 (digits,
    aligned scans)."""

    def __post_init__(self) -> None:
        if not 0 < self.min_scale <= self.max_scale:
            raise ConfigError(f"--min-scale {self.min_scale} must be above 0 and at most {self.max_scale}")
        if self.color_jitter < 0:
            raise ConfigError(f"--color-jitter {self.color_jitter:g} cannot be negative")
        if not (0 <= self.hflip <= 1 and 0 <= self.translate < 1):
            raise ConfigError("--hflip must be within 0 and 1, --translate within 0 and 1")
