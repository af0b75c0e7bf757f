"""How images reach the model. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from mae_deploy.config import Settings, setting
from mae_deploy.errors import ConfigError, MaeDeployError
from mae_deploy.images.geometry import CropMode, Interpolation

if TYPE_CHECKING:
    from mae_deploy.images.preprocess import Preprocess


@dataclass(frozen=True, slots=True)
class Columns:
    """Columns of a table; None: the one that holds images, and `label`."""

    image: str | None = None
    label: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationConfig(Settings, resume="fixed"):
    """Validation."""

    val_split: str | None = None
    """Name of the split to validate with, such as test; default: val, validation or valid."""
    val_share: float | None = setting(None, above=0, below=1)
    """Validate with this share of the training images of each class, such as 0.1, drawn by --seed, and train on the
    others; DATA may then be DATA/<class>/…."""

    def faults(self) -> Iterator[MaeDeployError]:
        if self.val_share is not None and self.val_split is not None:
            yield ConfigError(f"--val-split {self.val_split} does not go with --val-share {self.val_share:g}")
        if self.val_split == "train":
            yield ConfigError("--val-split train: what is trained on validates nothing", hint="use --val-share 0.1")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig(Settings):
    """Data."""

    num_workers: int = setting(-1, resume="free", at_least=-1)
    """Processes that decode images; 0 decodes in the training process, -1 starts one for each granted core but one."""
    max_corrupt: int = setting(100, resume="free", at_least=0)
    """Unreadable files that are reported and skipped before the run gives up."""
    max_pixels: int | None = setting(None, resume="free", at_least=1)
    """Pixels of the largest image that is read, such as 300000000 for photos of 300 megapixels; default: 178956970."""
    mean: tuple[float, ...] | None = setting(None, resume="fixed")
    """Mean of each channel for pixels in [0, 1]; default: ImageNet's for RGB, 0.5 otherwise."""
    std: tuple[float, ...] | None = setting(None, resume="fixed")
    """Standard deviation of each channel; default: ImageNet's for RGB, 0.25 otherwise."""
    pixel_max: float | None = setting(None, resume="fixed", above=0)
    """What pixels of more than 8 bits are divided by before --mean and --std, such as 65535, 10000 (Sentinel-2) or 1;
    default: 8-bit pixels, 255."""
    crop_pct: float | None = setting(None, resume="fixed", above=0, at_most=1)
    """Evaluation crop as a share of the resized image; default: 0.875 up to 224 px, 1.0 above."""
    crop_mode: CropMode | None = setting(None, resume="fixed")
    """How evaluation fits images of another form: center cuts out the middle, squash changes the aspect ratio, border
    pads with --mean, letterbox with black; the latter three show the whole image unless --crop-pct is given; default:
    the checkpoint's, else center."""
    interpolation: Interpolation | None = setting(None, resume="fixed")
    """Filter with which evaluation resizes; default: the checkpoint's, else bicubic."""
    cache: bool = setting(False, resume="free")
    """Keep decoded images in memory, for small sets of small images."""
    repeated_aug: int = setting(1, resume="fixed", at_least=1)
    """Views of each image in a batch, which is decoded once for them all; an epoch keeps its length and sees fewer
    images."""
    shuffle_buffer: int = setting(1000, resume="fixed", at_least=1)
    """Images that each worker mixes, where shards are streamed from a URL or a pipe."""
    epoch_images: int | None = setting(None, resume="fixed", at_least=1)
    """Images that make an epoch of streamed shards, which nobody has counted; whole sets have their own."""
    image_column: str | None = setting(None, resume="fixed")
    """Column of the images in a Hugging Face data set; default: the one that holds images."""
    label_column: str | None = setting(None, resume="fixed")
    """Column of the labels in a Hugging Face data set; default: label."""

    @property
    def columns(self) -> Columns:
        """Where a Hugging Face data set holds images and labels."""
        return Columns(self.image_column, self.label_column)

    def preprocess(self, image_size: tuple[int, int], channels: int, base: Preprocess | None = None) -> Preprocess:
        """The evaluation transform: what is set here, else `base` (a checkpoint's), else the default."""
        from mae_deploy.images.preprocess import default_preprocess  # it needs NumPy, for which no --help should wait

        spec = (
            replace(base, image_size=image_size)
            if base is not None and base.channels == channels
            else default_preprocess(image_size, channels)
        )
        return spec.altered(
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
            interpolation=self.interpolation,
            pixel_max=self.pixel_max,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class CropConfig(Settings, resume="fixed"):
    """Augmentation."""

    crop: Literal["random", "fixed", "none"] = "random"
    """random: resized crop; fixed: a crop of fixed size at a random place; none: the centre, without flips (paper,
    table 1e)."""
    color_jitter: float = setting(0.0, at_least=0)
    """Random change of brightness, contrast and saturation, each by up to this share; for 1, 3 and 4 channels."""
    min_scale: float = setting(0.2, above=0)
    """Smallest share of the image's area in a random resized crop."""
    max_scale: float = setting(1.0, hidden=True)
    """Largest share of the image's area in a random resized crop."""
    hflip: float = setting(0.5, at_least=0, at_most=1)
    """Probability of a horizontal flip."""
    translate: float = setting(0.0, at_least=0, below=1)
    """Random shift by up to this share of the image's side, instead of the random resized crop, where above 0 (digits,
    aligned scans)."""

    def faults(self) -> Iterator[MaeDeployError]:
        if self.min_scale > self.max_scale:
            yield ConfigError(f"--min-scale {self.min_scale:g} must be at most max_scale, {self.max_scale:g}")
