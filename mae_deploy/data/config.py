"""How images reach the model. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mae_deploy.config import setting
from mae_deploy.errors import ConfigError
from mae_deploy.preprocess import Preprocess, default_preprocess


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Data."""

    num_workers: int = 2
    """Processes that decode images; 0 decodes in the training process."""
    max_corrupt: int = 100
    """Unreadable files that are reported and skipped before the run gives up."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel for pixels in [0, 1]; default: ImageNet's for RGB, 0.5 otherwise."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each channel; default: ImageNet's for RGB, 0.25 otherwise."""
    crop_pct: float | None = None
    """Evaluation crop as a share of the resized image; default: 0.875 up to 224 px, 1.0 above."""
    cache: bool = setting(False)
    """Keep decoded images in memory, for small sets of small images."""

    def __post_init__(self) -> None:
        if self.num_workers < 0 or self.max_corrupt < 0:
            raise ConfigError("--num-workers and --max-corrupt cannot be negative")
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise ConfigError(f"--crop-pct {self.crop_pct} must be above 0 and at most 1")

    def preprocess(self, image_size: tuple[int, int], channels: int, base: Preprocess | None = None) -> Preprocess:
        """The evaluation transform: what is set here, else `base` (a checkpoint's), else the default."""
        if channels not in (1, 3, 4):
            raise ConfigError(f"image files hold 1, 3 or 4 channels, not {channels}")
        spec = replace(base, image_size=image_size) if base is not None and base.channels == channels else default_preprocess(image_size, channels)
        given = {name: value for name in ("mean", "std", "crop_pct") if (value := getattr(self, name)) is not None}
        return replace(spec, **given)


@dataclass(frozen=True, kw_only=True, slots=True)
class CropConfig:
    """Augmentation."""

    min_scale: float = 0.2
    """Smallest share of the image's area in a random resized crop."""
    max_scale: float = setting(1.0, hidden=True)
    """Largest share of the image's area in a random resized crop."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    translate: float = 0.0
    """Random shift by up to this share of the image's side, instead of the random resized crop, where above 0 (digits, aligned scans)."""

    def __post_init__(self) -> None:
        if not 0 < self.min_scale <= self.max_scale:
            raise ConfigError(f"--min-scale {self.min_scale} must be above 0 and at most {self.max_scale}")
        if not (0 <= self.hflip <= 1 and 0 <= self.translate < 1):
            raise ConfigError("--hflip must be within 0 and 1, --translate within 0 and 1")
