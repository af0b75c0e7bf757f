"""Settings of `mae-deploy data`. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mae_deploy.config import Settings, setting
from mae_deploy.data.config import Columns
from mae_deploy.errors import ConfigError
from mae_deploy.training.config import Device


@dataclass(frozen=True, kw_only=True, slots=True)
class StatsConfig(Settings, resume="never"):
    """Settings of `mae-deploy data stats`."""

    data: str = setting(argument=True)
    """Images: a folder in any tree, local tar shards, or a Hugging Face data set on disk."""
    sample: int | None = None
    """Read only this many images, drawn at random; default: all."""
    in_chans: int = 3
    """Channels: 1 grey, 3 RGB, 4 RGBA, any number from TIFF and NumPy files."""
    pixel_max: float | None = None
    """What pixels of more than 8 bits are divided by, such as 65535; default: 8-bit pixels, 255."""
    image_column: str | None = None
    """Column of the images in a Hugging Face data set; default: the one that holds images."""
    num_workers: int = -1
    """Processes that decode images; 0 decodes in this one, -1 starts one for each core but one."""
    seed: int = 0
    """Seed of --sample."""
    device: Device = "cpu"
    """Not used: images are read on the CPU."""

    def __post_init__(self) -> None:
        if self.in_chans < 1 or (self.sample is not None and self.sample < 1) or self.num_workers < -1:
            raise ConfigError("--in-chans and --sample must be at least 1, --num-workers at least -1")


@dataclass(frozen=True, kw_only=True, slots=True)
class PackConfig(Settings):
    """Settings of `mae-deploy data pack`."""

    source: str = setting(argument=True, flag="SRC", resume="free")
    """Images: a folder in any tree; labelled images as SRC/train/<class>/… and SRC/val/<class>/…; tar shards; a Hugging
    Face data set on disk."""
    out: Path = setting(argument=True, resume="free")
    """Folder to write shards to; called again after a kill, it goes on."""
    short_side: int | None = setting(None, resume="fixed")
    """Make larger images this small, by their shorter side in pixels; default: keep their size."""
    encoding: Literal["keep", "jpeg", "png", "npy"] = setting("keep", resume="fixed")
    """keep: each file as it is, where its size stays; where not, JPEG as JPEG, others without loss; or one format for
    all."""
    quality: int = setting(90, resume="fixed")
    """Quality of JPEG files, from 1 to 100."""
    dedup: Literal["no", "exact", "near"] = setting("no", resume="fixed")
    """Leave out images that came before: exact, the same pixels; near, also those that look the same (difference hash,
    3 of 64 bits)."""
    shard_images: int = setting(5000, resume="fixed")
    """Images in a shard."""
    in_chans: int = setting(3, resume="fixed")
    """Channels: 1 grey, 3 RGB, 4 RGBA, any number from TIFF and NumPy files."""
    pixel_max: float | None = setting(None, resume="fixed")
    """What pixels of more than 8 bits are divided by in training, such as 65535; here, it only lets them pass."""
    image_column: str | None = setting(None, resume="fixed")
    """Column of the images in a Hugging Face data set; default: the one that holds images."""
    label_column: str | None = setting(None, resume="fixed")
    """Column of the labels in a Hugging Face data set; default: none, or label where there are splits."""
    max_corrupt: int = setting(100, resume="free")
    """Unreadable files that are reported and left out before packing gives up."""
    num_workers: int = setting(-1, resume="free")
    """Processes that decode and encode images; 0 does it in this one, -1 starts one for each core but one."""
    seed: int = setting(0, resume="fixed")
    """Seed of the order in which images lie in the shards."""
    device: Device = setting("cpu", resume="free")
    """Not used: images are packed on the CPU."""

    def __post_init__(self) -> None:
        if min(self.in_chans, self.shard_images, 1 if self.short_side is None else self.short_side) < 1:
            raise ConfigError("--in-chans, --shard-images and --short-side must be at least 1")
        if not 1 <= self.quality <= 100:
            raise ConfigError(f"--quality {self.quality} must be within 1 and 100")
        if self.max_corrupt < 0 or self.num_workers < -1:
            raise ConfigError("--max-corrupt must be at least 0, --num-workers at least -1")
        if self.encoding == "jpeg" and (self.in_chans not in (1, 3) or self.pixel_max is not None):
            raise ConfigError(
                "--encoding jpeg holds 1 or 3 channels of 8 bits", hint="use --encoding png for RGBA, npy for others"
            )
        if self.encoding == "png" and (self.in_chans not in (1, 3, 4) or self.pixel_max is not None):
            raise ConfigError("--encoding png holds 1, 3 or 4 channels of 8 bits", hint="use --encoding npy")

    @property
    def columns(self) -> Columns:
        """Where a Hugging Face data set holds images and labels."""
        return Columns(self.image_column, self.label_column)
