"""Settings of `mae-deploy data`. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mae_deploy.config import Settings, setting
from mae_deploy.data.config import Columns
from mae_deploy.errors import ConfigError, MaeDeployError
from mae_deploy.training.config import Device


@dataclass(frozen=True, kw_only=True, slots=True)
class StatsConfig(Settings, resume="never"):
    """Settings of `mae-deploy data stats`."""

    data: str = setting(argument=True)
    """Images: a folder in any tree, local tar shards, or a Hugging Face data set on disk."""
    sample: int | None = setting(None, at_least=1)
    """Read only this many images, drawn at random; default: all."""
    in_chans: int = setting(3, at_least=1)
    """Channels: 1 grey, 3 RGB, 4 RGBA, any number from TIFF and NumPy files."""
    pixel_max: float | None = setting(None, above=0)
    """What pixels of more than 8 bits are divided by, such as 65535; default: 8-bit pixels, 255."""
    image_column: str | None = None
    """Column of the images in a Hugging Face data set; default: the one that holds images."""
    num_workers: int = setting(-1, at_least=-1)
    """Processes that decode images; 0 decodes in this one, -1 starts one for each granted core but one."""
    max_pixels: int | None = setting(None, at_least=1)
    """Pixels of the largest image that is read, such as 300000000 for photos of 300 megapixels; default: 178956970."""
    seed: int = 0
    """Seed of --sample."""
    device: Device = "cpu"
    """Not used: images are read on the CPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackConfig(Settings):
    """Settings of `mae-deploy data pack`."""

    source: str = setting(argument=True, flag="SRC", resume="free")
    """Images: a folder in any tree; labelled images as SRC/train/<class>/… and SRC/val/<class>/…; tar shards; a Hugging
    Face data set on disk."""
    out: Path = setting(argument=True, resume="free")
    """Folder to write shards to; called again after a kill, it goes on."""
    short_side: int | None = setting(None, resume="fixed", at_least=1)
    """Make larger images this small, by their shorter side in pixels; default: keep their size."""
    encoding: Literal["keep", "jpeg", "png", "npy"] = setting("keep", resume="fixed")
    """keep: each file as it is, where its size stays; where not, JPEG as JPEG, others without loss; or one format for
    all."""
    quality: int = setting(90, resume="fixed", at_least=1, at_most=100)
    """Quality of JPEG files, from 1 to 100."""
    dedup: Literal["no", "exact", "near"] = setting("no", resume="fixed")
    """Leave out images that came before: exact, the same pixels; near, also those that look the same (difference hash,
    3 of 64 bits)."""
    drop_like: Path | None = setting(None, resume="fixed")
    """Leave out the images of this table, in which search --duplicates or --outliers has listed them."""
    shard_images: int = setting(5000, resume="fixed", at_least=1)
    """Images in a shard."""
    in_chans: int = setting(3, resume="fixed", at_least=1)
    """Channels: 1 grey, 3 RGB, 4 RGBA, any number from TIFF and NumPy files."""
    pixel_max: float | None = setting(None, resume="fixed", above=0)
    """What pixels of more than 8 bits are divided by in training, such as 65535; here, it only lets them pass."""
    image_column: str | None = setting(None, resume="fixed")
    """Column of the images in a Hugging Face data set; default: the one that holds images."""
    label_column: str | None = setting(None, resume="fixed")
    """Column of the labels in a Hugging Face data set; default: none, or label where there are splits."""
    max_corrupt: int = setting(100, resume="free", at_least=0)
    """Unreadable files that are reported and left out before packing gives up."""
    max_pixels: int | None = setting(None, resume="free", at_least=1)
    """Pixels of the largest image that is read, such as 300000000 for photos of 300 megapixels; default: 178956970."""
    num_workers: int = setting(-1, resume="free", at_least=-1)
    """Processes that decode and encode images; 0 does it in this one, -1 starts one for each granted core but one."""
    seed: int = setting(0, resume="fixed")
    """Seed of the order in which images lie in the shards."""
    device: Device = setting("cpu", resume="free")
    """Not used: images are packed on the CPU."""

    def faults(self) -> Iterator[MaeDeployError]:
        channels = {"jpeg": (1, 3), "png": (1, 3, 4)}.get(self.encoding)
        if channels is None or (self.in_chans in channels and self.pixel_max is None):
            return
        given = f"--in-chans {self.in_chans}" if self.in_chans not in channels else f"--pixel-max {self.pixel_max:g}"
        yield ConfigError(
            f"--encoding {self.encoding} holds {' or '.join(map(str, channels))} channels of 8 bits, not {given}",
            hint="use --encoding npy, or png for RGBA",
        )

    @property
    def columns(self) -> Columns:
        """Where a Hugging Face data set holds images and labels."""
        return Columns(self.image_column, self.label_column)
