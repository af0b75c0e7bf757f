"""From image files and arrays to the encoder's input, in NumPy and Pillow alone: what trains is what deploys."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mae_deploy.errors import ConfigError
from mae_deploy.images.arrays import TIFF_SUFFIXES, require_tiff, resize_and_cut
from mae_deploy.images.read import (
    Array,
    as_array,
    from_array,
    is_image,
    name_of_bytes,
    read_image,
    takes_arrays,
    to_mode,
)
from mae_deploy.images.statistics import check_statistics

if TYPE_CHECKING:  # imported where it is used: a device that is given normalised arrays needs no Pillow
    from PIL import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


_LONGEST = 100
"""Longer strips (sides as 1 to 100) are cut to their middle before they are resized: whole, one of 1 × 65,000 pixels
would take gigabytes."""

_INTERPOLATIONS = ("bicubic", "bilinear", "nearest")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Preprocess:
    """Resize, centre crop and normalisation, as written in checkpoints and bundles."""

    image_size: tuple[int, int]
    """Height and width in pixels."""
    channels: int = 3
    """Channels of the input: 1 grey, 3 RGB, 4 RGBA, any other number from TIFF and NumPy files."""
    crop_pct: float = 0.875
    """The crop's side as a share of the resized image's (the original uses 224/256; 1.0 above 224 px)."""
    interpolation: str = "bicubic"
    """bicubic, bilinear or nearest."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Per-channel mean of pixels in [0, 1], or of pixels divided by `pixel_max`."""
    std: tuple[float, ...] = IMAGENET_STD
    """Per-channel standard deviation of pixels in [0, 1], or of pixels divided by `pixel_max`."""
    pixel_max: float | None = None
    """Pixels of any type of number, and what they are divided by; None: 8-bit pixels, divided by 255."""

    def __post_init__(self) -> None:
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise ConfigError(
                f"mean and std need one value for each of {self.channels} channels, not {len(self.mean)} and"
                f" {len(self.std)}"
            )
        if self.interpolation not in _INTERPOLATIONS:
            raise ConfigError(f"interpolation {self.interpolation!r} is not one of {', '.join(_INTERPOLATIONS)}")
        if self.pixel_max is not None and not self.pixel_max > 0:
            raise ConfigError(
                f"pixel_max {self.pixel_max:g} must be above 0",
                hint="65535 for 16-bit images, 10000 for Sentinel-2's reflectance",
            )
        check_statistics(self.mean, self.std, self.pixel_max)

    @property
    def takes_arrays(self) -> bool:
        """Whether images are NumPy arrays; else they are Pillow images of 8 bits a channel."""
        return takes_arrays(self.channels, self.pixel_max)

    @property
    def divisor(self) -> float:
        """What pixels are divided by: 255, or `pixel_max`."""
        return 255 if self.pixel_max is None else self.pixel_max

    @property
    def dtype(self) -> str:
        """Of cropped pixels: uint8, or float32 where `pixel_max` is given."""
        return "uint8" if self.pixel_max is None else "float32"

    def read(self, image: Path | bytes) -> Image.Image | Array:
        """Read an image file, or its bytes; see `read_image`."""
        if isinstance(image, bytes):
            return read_image(name_of_bytes(image), self.channels, self.pixel_max, content=image)
        return read_image(image, self.channels, self.pixel_max)

    def crop(self, image: Image.Image | Array) -> Array:
        """Resize so that the crop covers `image_size`, and cut out the centre: `(H, W, C)`, uint8 or, where `pixel_max`
        is given, float32.

        For a square, to the pixel what torchvision's Resize and CenterCrop do, which the original evaluates with.

        Raises:
            UnreadableImage: an array that is not such an image.
        """
        from PIL import Image

        if self.takes_arrays:
            return self._crop_array(image)
        image = _without_far_ends(to_mode(image if is_image(image) else from_array(image), self.channels))
        size, box = self._place(image.size)
        if size != image.size:
            image = image.resize(size, Image.Resampling[self.interpolation.upper()])
        return np.asarray(image.crop(box)).reshape(*self.image_size, self.channels)

    def normalise(self, pixels: Array) -> Array:
        """uint8 or float32 `(B, H, W, C)` to float32 `(B, C, H, W)`, `(x / 255 - mean) / std`, with `pixel_max` for 255
        where it is given.
        """
        return np.ascontiguousarray(self.normalise_pixels(pixels).transpose(0, 3, 1, 2))

    def normalise_pixels(self, pixels: Array) -> Array:
        """The same of pixels in any arrangement, `(..., C)`, as float32 `(..., C)`."""
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        scaled: Array = (pixels.astype(np.float32) / np.float32(self.divisor) - mean) / std
        return scaled

    def __call__(self, images: Sequence[Image.Image | Array]) -> Array:
        """Images of any size, as Pillow images or arrays `(H, W)` or `(H, W, C)`, to float32 `(B, C, H, W)`."""
        return self.normalise(np.stack([self.crop(image) for image in images]))

    def _place(self, found: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
        """To what width and height an image of this width and height is resized, and the box that is cut out of it."""
        height, width = self.image_size
        covered = int(height / self.crop_pct), int(width / self.crop_pct)
        if covered[0] * found[0] >= covered[1] * found[1]:
            size = (int(covered[0] * found[0] / found[1]), covered[0])
        else:
            size = (covered[1], int(covered[1] * found[1] / found[0]))
        left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
        return size, (left, top, left + width, top + height)

    def _crop_array(self, image: Image.Image | Array) -> Array:
        pixels = as_array(np.asarray(image), self.channels, self.pixel_max)
        height, width, _ = pixels.shape
        left, top, right, bottom = _middle(width, height)
        size, box = self._place((right - left, bottom - top))
        return resize_and_cut(pixels[top:bottom, left:right], size, box, self.interpolation).astype(
            self.dtype, copy=False
        )


def require_readers(names: Iterable[str], spec: Preprocess) -> None:
    """Say before a run, and not in the midst of it, that a package is missing that these files need.

    Raises:
        MissingDependency: `tifffile`.
    """
    if spec.takes_arrays and any(name.lower().endswith(TIFF_SUFFIXES) for name in names):
        require_tiff()


def _without_far_ends(image: Image.Image) -> Image.Image:
    box = _middle(*image.size)
    return image if box == (0, 0, *image.size) else image.crop(box)


def _middle(width: int, height: int) -> tuple[int, int, int, int]:
    """The box of an image without the far ends of a strip: left, top, right and bottom."""
    longest = _LONGEST * min(width, height)
    left, top = ((side - min(side, longest)) // 2 for side in (width, height))
    return left, top, left + min(width, longest), top + min(height, longest)


def default_preprocess(image_size: tuple[int, int], channels: int = 3) -> Preprocess:
    """The original's evaluation transform for this size; ImageNet statistics for RGB, 0.5 and 0.25 for other
    channels.
    """
    rgb = channels == 3
    return Preprocess(
        image_size=image_size,
        channels=channels,
        crop_pct=0.875 if max(image_size) <= 224 else 1.0,
        mean=IMAGENET_MEAN if rgb else (0.5,) * channels,
        std=IMAGENET_STD if rgb else (0.25,) * channels,
    )
