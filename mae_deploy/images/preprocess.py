"""From image files and arrays to the encoder's input, in NumPy and Pillow alone: what trains is what deploys."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from mae_deploy.errors import ConfigError
from mae_deploy.images.arrays import TIFF_SUFFIXES, ChannelOrder, cut, in_rgb, require_tiff, resize_and_cut
from mae_deploy.images.geometry import CropMode, Interpolation, Placement, place
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
from mae_deploy.images.video_image import VideoImage

if TYPE_CHECKING:  # imported where it is used: a device that is given normalised arrays needs no Pillow
    from PIL import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_LEAST_CROP = 0.01
"""An image is resized to the input's size over this share of it: a smaller one fills the memory."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Preprocess:
    """Resize, crop and normalisation, as written in checkpoints and bundles."""

    image_size: tuple[int, int]
    """Height and width in pixels."""
    channels: int = 3
    """Channels of the input: 1 grey, 3 RGB, 4 RGBA, any other number from TIFF and NumPy files."""
    crop_pct: float = 0.875
    """The crop's side as a share of the resized image's (the original uses 224/256; 1.0 above 224 px); a letterbox has
    none."""
    interpolation: Interpolation = "bicubic"
    """Pillow's filter of the resize."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Per-channel mean of pixels in [0, 1], or of pixels divided by `pixel_max`."""
    std: tuple[float, ...] = IMAGENET_STD
    """Per-channel standard deviation of pixels in [0, 1], or of pixels divided by `pixel_max`."""
    pixel_max: float | None = None
    """Pixels of any type of number, and what they are divided by; None: 8-bit pixels, divided by 255."""
    crop_mode: CropMode = "center"
    """center: the aspect ratio is kept, the middle cut out; squash: the sides are resized to the input's, whatever the
    aspect ratio; border: the aspect ratio is kept, what is missing at the sides filled with `mean` (all three as timm
    does); letterbox: the same with black, and always the whole image (as DeepStream does)."""

    def __post_init__(self) -> None:
        check_statistics(self.mean, self.std, self.pixel_max)
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise ConfigError(
                f"mean and std need one value for each of {self.channels} channels, not {len(self.mean)} and"
                f" {len(self.std)}"
            )
        for name, kind in (("interpolation", Interpolation), ("crop_mode", CropMode)):
            if (value := getattr(self, name)) not in get_args(kind):
                raise ConfigError(f"{name} {value!r} is not one of {', '.join(get_args(kind))}")
        if not _LEAST_CROP <= self.crop_pct <= 1 / _LEAST_CROP:
            raise ConfigError(
                f"crop_pct {self.crop_pct:g} must be above 0, from {_LEAST_CROP:g} to {1 / _LEAST_CROP:g}"
            )
        if min(self.image_size) < 1:
            raise ConfigError(f"image_size {self.image_size} must be at least 1")
        if self.pixel_max is not None and not self.pixel_max > 0:
            raise ConfigError(
                f"pixel_max {self.pixel_max:g} must be above 0",
                hint="65535 for 16-bit images, 10000 for Sentinel-2's reflectance",
            )

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

    def altered(
        self,
        *,
        crop_mode: CropMode | None = None,
        crop_pct: float | None = None,
        interpolation: Interpolation | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        pixel_max: float | None = None,
    ) -> Preprocess:
        """With what is given. Another `crop_mode` than center shows the whole image unless `crop_pct` is given too.

        Raises:
            ConfigError: values that do not fit.
        """
        if crop_mode not in (None, "center", self.crop_mode) and crop_pct is None:
            crop_pct = 1.0
        given: dict[str, Any] = {
            "crop_mode": crop_mode,
            "crop_pct": crop_pct,
            "interpolation": interpolation,
            "mean": mean,
            "std": std,
            "pixel_max": pixel_max,
        }
        return dataclasses.replace(self, **{name: value for name, value in given.items() if value is not None})

    def place(self, found: tuple[int, int]) -> Placement:
        """To what size an image of this width and height is resized, and which box of it is the input."""
        return place(self.crop_mode, self.image_size, self.crop_pct, found)

    def crop(self, image: Image.Image | Array | VideoImage, channel_order: ChannelOrder = "rgb") -> Array:
        """Resize and crop, or fill, to `image_size` as `crop_mode` says: `(H, W, C)`, uint8 or, where `pixel_max` is
        given, float32.

        For a square, center is to the pixel what torchvision's Resize and CenterCrop do, which the original evaluates
        with.

        Args:
            channel_order: of arrays; Pillow images know their own.

        Raises:
            UnreadableImage: an array that is not such an image.
        """
        from PIL import Image

        if isinstance(image, VideoImage):
            if self._scales(image):
                return self._crop_video(image)
            image, channel_order = image.rgb(), "rgb"
        if self.takes_arrays:
            return self._crop_array(image, channel_order)
        image = to_mode(image if is_image(image) else from_array(image, channel_order), self.channels)
        placed = self.place(image.size)
        if placed.part != (0, 0, *image.size):
            image = image.crop(placed.part)
        if placed.size != image.size:
            image = image.resize(placed.size, Image.Resampling[self.interpolation.upper()])
        return np.asarray(cut(image, placed.box, self._fill)).reshape(*self.image_size, self.channels)

    def converted(
        self, image: Image.Image | Array | VideoImage, channel_order: ChannelOrder = "rgb"
    ) -> Image.Image | Array | VideoImage:
        """An image in the form that the methods below and `crop` need not convert again.

        Raises:
            UnreadableImage: an array that is not such an image.
        """
        if isinstance(image, VideoImage):
            if self._scales(image):
                return image
            image, channel_order = image.rgb(), "rgb"
        if self.takes_arrays:
            return in_rgb(as_array(np.asarray(image), self.channels, self.pixel_max), channel_order)
        return to_mode(image if is_image(image) else from_array(image, channel_order), self.channels)

    def crop_roughly(self, image: Image.Image | Array | VideoImage) -> Array:
        """As `crop`, in a third of the time and not to the pixel: enough to see what changed. What the crop hides is
        not resized, and a large image is averaged in blocks before it is filtered.
        """
        source = self._source(image)
        if source is None or not is_image(image):
            return self.crop(image)
        height, width = self.image_size
        found = image.resize((width, height), _filter(self.interpolation), source, reducing_gap=1.0)
        return np.asarray(found).reshape(height, width, self.channels)

    def crop_patches(self, image: Image.Image | Array | VideoImage, ids: Array, patch_size: int) -> Array:
        """Some patches of what `crop` gives, `(K, P, P, C)`, by their row-major indices: nothing else is resized. They
        differ from those of `crop` by 1 of 255 at most.
        """
        P, (height, width) = patch_size, self.image_size
        rows, columns = height // P, width // P
        source = self._source(image)
        if source is None or not is_image(image) or 2 * len(ids) > rows * columns:
            grid = self.crop(image).reshape(rows, P, columns, P, self.channels)
            row, column = np.divmod(ids, columns)
            return grid[row, :, column]
        resample = _filter(self.interpolation)
        across, down = (source[2] - source[0]) / columns, (source[3] - source[1]) / rows
        found = np.empty((len(ids), P, P, self.channels), np.uint8)
        # Neighbours in a row are resized as one: a call of Pillow's takes as long as the pixels of several patches.
        order = np.argsort(ids)
        follows = (np.diff(ids[order]) == 1) & (ids[order][1:] % columns != 0)
        for run in np.split(order, np.flatnonzero(~follows) + 1) if len(ids) else ():
            down_by, right_by = divmod(int(ids[run[0]]), columns)
            left, top = source[0] + right_by * across, source[1] + down_by * down
            box = (left, top, min(left + len(run) * across, image.width), min(top + down, image.height))
            strip = np.asarray(image.resize((len(run) * P, P), resample, box))
            found[run] = strip.reshape(P, len(run), P, self.channels).swapaxes(0, 1)
        return found

    def seen_part(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of what the input shows of an image of this width and height; beyond the image's
        sides where the input is filled there.
        """
        placed = self.place(size)
        left, top, right, bottom = placed.box
        across, down = ((placed.part[side + 2] - placed.part[side]) / placed.size[side] for side in (0, 1))
        x, y = placed.part[:2]
        return x + left * across, y + top * down, x + right * across, y + bottom * down

    def _source(self, image: Image.Image | Array | VideoImage) -> tuple[float, float, float, float] | None:
        """The part of an image that is the input; None where the input is not a resized part of it."""
        if not is_image(image):
            return None
        placed = self.place(image.size)
        left, top, right, bottom = placed.box
        if left < 0 or top < 0 or right > placed.size[0] or bottom > placed.size[1] or placed.size == image.size:
            return None
        return self.seen_part(image.size)

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

    @property
    def _fill(self) -> tuple[float, ...]:
        """The colour beside an image that does not cover the input; as the mean, it is 0 once normalised."""
        if self.crop_mode != "border":
            return (0,) * self.channels
        return tuple(value * self.divisor if self.pixel_max else round(255 * value) for value in self.mean)

    def _scales(self, image: VideoImage) -> bool:
        """Whether a frame is resized and converted in one pass."""
        whole = self.place((image.width, image.height)).part == (0, 0, image.width, image.height)
        return self.channels == 3 and not self.takes_arrays and whole and image.has_filter(self.interpolation)

    def _crop_video(self, image: VideoImage) -> Array:
        from PIL import Image

        placed = self.place((image.width, image.height))
        left, top, right, bottom = placed.box
        pixels = image.resized(placed.size, self.interpolation)
        if left >= 0 and top >= 0 and right <= placed.size[0] and bottom <= placed.size[1]:
            return pixels[top:bottom, left:right]
        return np.asarray(cut(Image.fromarray(pixels), placed.box, self._fill))

    def _crop_array(self, image: Image.Image | Array, channel_order: ChannelOrder) -> Array:
        pixels = as_array(np.asarray(image), self.channels, self.pixel_max)
        if not is_image(image):
            pixels = in_rgb(pixels, channel_order)
        height, width, _ = pixels.shape
        placed = self.place((width, height))
        left, top, right, bottom = placed.part
        made = resize_and_cut(pixels[top:bottom, left:right], placed, self.interpolation, self._fill)
        return made.astype(self.dtype, copy=False)


def _filter(interpolation: Interpolation) -> Any:
    from PIL import Image

    return Image.Resampling[interpolation.upper()]


def require_readers(names: Iterable[str], spec: Preprocess) -> None:
    """Say before a run, and not in the midst of it, that a package is missing that these files need.

    Raises:
        MissingDependency: `tifffile`.
    """
    if spec.takes_arrays and any(name.lower().endswith(TIFF_SUFFIXES) for name in names):
        require_tiff()


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
