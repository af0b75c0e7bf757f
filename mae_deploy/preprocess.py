"""From image files and arrays to the encoder's input, in NumPy and Pillow alone: what trains is what deploys."""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mae_deploy.errors import ConfigError, MaeDeployError

if TYPE_CHECKING:  # imported where it is used: a device that is given normalised arrays needs no Pillow
    from PIL import Image
    from typing_extensions import TypeIs

Array = npt.NDArray[Any]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""The Pillow mode for each number of channels that image files can hold."""

_LONGEST = 100
"""Longer strips (sides as 1 to 100) are cut to their middle before they are resized: whole, one of 1 × 65,000 pixels would take gigabytes."""

_INTERPOLATIONS = ("bicubic", "bilinear", "nearest")


class UnreadableImage(Exception):
    """A file that is no image, is cut short or is empty; the message names it and says why."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Preprocess:
    """Resize, centre crop and normalisation, as written in checkpoints and bundles."""

    image_size: tuple[int, int]
    """Height and width in pixels."""
    channels: int = 3
    """Channels of the input: 1 grey, 3 RGB, 4 RGBA."""
    crop_pct: float = 0.875
    """The crop's side as a share of the resized image's (the original uses 224/256; 1.0 above 224 px)."""
    interpolation: str = "bicubic"
    """bicubic, bilinear or nearest."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Per-channel mean of pixels in [0, 1]."""
    std: tuple[float, ...] = IMAGENET_STD
    """Per-channel standard deviation of pixels in [0, 1]."""

    def __post_init__(self) -> None:
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise ConfigError(f"mean and std need one value for each of {self.channels} channels, not {len(self.mean)} and {len(self.std)}")
        if self.interpolation not in _INTERPOLATIONS:
            raise ConfigError(f"interpolation {self.interpolation!r} is not one of {', '.join(_INTERPOLATIONS)}")

    def crop(self, image: Image.Image) -> Array:
        """Resize so that the crop covers `image_size`, and cut out the centre: uint8 `(H, W, C)`.

        For a square, to the pixel what torchvision's Resize and CenterCrop do, which the original evaluates with.
        """
        from PIL import Image

        height, width = self.image_size
        image = _without_far_ends(to_mode(image, self.channels))
        covered = int(height / self.crop_pct), int(width / self.crop_pct)
        if covered[0] * image.width >= covered[1] * image.height:
            size = (int(covered[0] * image.width / image.height), covered[0])
        else:
            size = (covered[1], int(covered[1] * image.height / image.width))
        if size != image.size:
            image = image.resize(size, Image.Resampling[self.interpolation.upper()])
        left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
        pixels = np.asarray(image.crop((left, top, left + width, top + height)))
        return pixels.reshape(height, width, self.channels)

    def normalise(self, pixels: Array) -> Array:
        """uint8 `(B, H, W, C)` to float32 `(B, C, H, W)`, `(x / 255 - mean) / std`."""
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        scaled = (pixels.astype(np.float32) / np.float32(255) - mean) / std
        return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))

    def __call__(self, images: Sequence[Image.Image | Array]) -> Array:
        """Images of any size, as Pillow images or uint8 arrays `(H, W)` or `(H, W, C)`, to float32 `(B, C, H, W)`."""
        return self.normalise(np.stack([self.crop(image if is_image(image) else from_array(image)) for image in images]))


def is_image(value: object) -> TypeIs[Image.Image]:
    """Whether it is a Pillow image; whoever has one has imported Pillow."""
    pillow = sys.modules.get("PIL.Image")
    return pillow is not None and isinstance(value, pillow.Image)


def read_image(path: Path, channels: int = 3) -> Image.Image:
    """Read an image file upright (EXIF) in the mode of `channels`.

    Raises:
        UnreadableImage: empty, cut short, not an image, of a kind that has no 8-bit form, or a bomb.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            # Pillow warns of large files and of damaged metadata that it then does without.
            warnings.simplefilter("ignore")
            with Image.open(path, formats=_formats()) as image:
                image.load()
                return to_mode(ImageOps.exif_transpose(image), channels)
    except MaeDeployError:
        raise
    except Exception as error:
        # Not a list of types: on damaged files, Pillow's plug-ins raise nearly all that Python has.
        reason = "the file is empty" if os.path.exists(path) and os.path.getsize(path) == 0 else " ".join(str(error).split())
        raise UnreadableImage(f"{path}: {reason}") from error


def to_mode(image: Image.Image, channels: int) -> Image.Image:
    """Convert to 8 bits and to the mode of `channels`; 16-bit values are scaled, not clipped.

    Raises:
        UnreadableImage: pixels with no fixed range.
    """
    from PIL import Image

    if channels not in MODES:
        raise ConfigError(f"image files hold 1, 3 or 4 channels, not {channels}")
    mode = MODES[channels]
    if image.mode == mode:
        return image
    if image.mode.startswith("I"):
        # "I;16", and "I" as Pillow reads some 16-bit files: convert("RGB") would clip everything above 255 to white.
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise UnreadableImage("32-bit pixels have no fixed range; save the image with 8 or 16 bits a channel")
        divisor = 257 if image.mode != "I" or values.max() > 255 else 1
        image = Image.fromarray((values // divisor).astype(np.uint8))
    elif image.mode == "F":
        raise UnreadableImage("floating-point pixels have no fixed range; save the image with 8 or 16 bits a channel")
    elif image.mode == "P":
        # Palettes may carry transparency that a direct conversion drops with a warning.
        image = image.convert("RGBA")
    return image.convert(mode)


def from_array(pixels: Array) -> Image.Image:
    """A uint8 array `(H, W)`, `(H, W, 1)`, `(H, W, 3)` or `(H, W, 4)` as a Pillow image.

    Raises:
        ConfigError: another dtype or shape.
    """
    from PIL import Image

    pixels = np.asarray(pixels)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))):
        raise ConfigError(f"an image must be uint8 (H, W), (H, W, 3) or (H, W, 4), not {pixels.dtype} {pixels.shape}")
    return Image.fromarray(pixels)


def find_images(root: Path) -> list[Path]:
    """All image files at or below `root`, in a stable order; hidden files and folders are left out.

    Raises:
        ConfigError: nothing is there.
    """
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise ConfigError(f"no such file or folder: {root}")
    known = _image_suffixes()
    found = sorted((path for path in _walk(root) if path.suffix.lower() in known), key=lambda path: path.relative_to(root).as_posix())
    if not found:
        raise ConfigError(f"no images below {root}", hint="any format that Pillow reads, in any tree of folders")
    return found


def _walk(root: Path) -> Iterator[Path]:
    entered: set[tuple[int, int]] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        # A link may lead to a folder that was walked already, or back up: each is entered once.
        here = os.stat(folder)
        if (here.st_dev, here.st_ino) in entered:
            folders.clear()
            continue
        entered.add((here.st_dev, here.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(folder) / name for name in files if not name.startswith("."))


def _without_far_ends(image: Image.Image) -> Image.Image:
    width, height = (min(side, _LONGEST * min(image.size)) for side in image.size)
    if (width, height) == image.size:
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


@functools.cache
def _formats() -> tuple[str, ...]:
    """Pillow's formats but those that hold no pixels it can read, and EPS, for which it would start Ghostscript on a file that nobody checked."""
    from PIL import Image

    Image.init()
    return tuple(name for name in Image.OPEN if name not in ("PDF", "MPEG", "HDF5", "GRIB", "BUFR", "EPS"))


def _image_suffixes() -> frozenset[str]:
    from PIL import Image

    formats = _formats()
    return frozenset(suffix for suffix, name in Image.EXTENSION.items() if name in formats)


def default_preprocess(image_size: tuple[int, int], channels: int = 3) -> Preprocess:
    """The original's evaluation transform for this size; ImageNet statistics for RGB, 0.5 and 0.25 for other channels."""
    rgb = channels == 3
    return Preprocess(
        image_size=image_size,
        channels=channels,
        crop_pct=0.875 if max(image_size) <= 224 else 1.0,
        mean=IMAGENET_MEAN if rgb else (0.5,) * channels,
        std=IMAGENET_STD if rgb else (0.25,) * channels,
    )
