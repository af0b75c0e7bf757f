"""From image files and arrays to the encoder's input, in NumPy and Pillow alone: what trains is what deploys."""

from __future__ import annotations

import dataclasses
import functools
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mae_deploy.images.arrays import NUMPY_SUFFIX, TIFF_SUFFIXES, channels_last, read_array, require_tiff, resize_and_cut
from mae_deploy.errors import ConfigError, MaeDeployError

if TYPE_CHECKING:  # imported where it is used: a device that is given normalised arrays needs no Pillow
    from PIL import Image
    from typing_extensions import TypeIs

Array = npt.NDArray[Any]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""The Pillow mode for each number of channels that ordinary image files hold."""

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
            raise ConfigError(f"mean and std need one value for each of {self.channels} channels, not {len(self.mean)} and {len(self.std)}")
        if self.interpolation not in _INTERPOLATIONS:
            raise ConfigError(f"interpolation {self.interpolation!r} is not one of {', '.join(_INTERPOLATIONS)}")
        if self.pixel_max is not None and not self.pixel_max > 0:
            raise ConfigError(f"pixel_max {self.pixel_max:g} must be above 0", hint="65535 for 16-bit images, 10000 for Sentinel-2's reflectance")

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

    def read(self, path: Path) -> Image.Image | Array:
        """Read an image file; see `read_image`."""
        return read_image(path, self.channels, self.pixel_max)

    def crop(self, image: Image.Image | Array) -> Array:
        """Resize so that the crop covers `image_size`, and cut out the centre: `(H, W, C)`, uint8 or, where `pixel_max` is given, float32.

        For a square, to the pixel what torchvision's Resize and CenterCrop do, which the original evaluates with.

        Raises:
            UnreadableImage: an array that is no such image.
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
        """uint8 or float32 `(B, H, W, C)` to float32 `(B, C, H, W)`, `(x / 255 - mean) / std`, with `pixel_max` for 255 where it is given."""
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        scaled = (pixels.astype(np.float32) / np.float32(self.divisor) - mean) / std
        return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))

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
        return resize_and_cut(pixels[top:bottom, left:right], size, box, self.interpolation).astype(self.dtype, copy=False)


def is_image(value: object) -> TypeIs[Image.Image]:
    """Whether it is a Pillow image; whoever has one has imported Pillow."""
    pillow = sys.modules.get("PIL.Image")
    return pillow is not None and isinstance(value, pillow.Image)


def takes_arrays(channels: int, pixel_max: float | None = None) -> bool:
    """Whether such images are NumPy arrays: another number of channels than 1, 3 and 4, or pixels of more than 8 bits."""
    return channels not in MODES or pixel_max is not None


def require_readers(names: Iterable[str], spec: Preprocess) -> None:
    """Say before a run, and not in the midst of it, that a package is missing that these files need.

    Raises:
        MissingDependency: `tifffile`.
    """
    if spec.takes_arrays and any(name.lower().endswith(TIFF_SUFFIXES) for name in names):
        require_tiff()


def read_image(
    path: Path, channels: int = 3, pixel_max: float | None = None, *, content: bytes | None = None, shrink: Callable[[int, int], int] | None = None
) -> Image.Image | Array:
    """Read an image file: a Pillow image of 8 bits, upright (EXIF), in the mode of `channels`, or an array `(H, W, C)` where `takes_arrays`.

    Args:
        content: the file's bytes, where `path` is but its name in a shard or a table.
        shrink: by what factor a JPEG of this width and height may be made smaller while it is decoded; training only, the pixels are not quite the same.

    Raises:
        UnreadableImage: empty, cut short, not an image, of a kind that has no 8-bit form, or a bomb; an array of another number of channels.
        MissingDependency: a TIFF file that only `tifffile` reads.
    """
    from PIL import Image, ImageOps

    file = None if content is None else io.BytesIO(content)
    try:
        if path.suffix.lower() == NUMPY_SUFFIX or (takes_arrays(channels, pixel_max) and path.suffix.lower() in TIFF_SUFFIXES):
            pixels = as_array(read_array(path, file), channels, pixel_max)
            return pixels if takes_arrays(channels, pixel_max) else from_array(pixels)
        with warnings.catch_warnings():
            # Pillow warns of large files and of damaged metadata that it then does without.
            warnings.simplefilter("ignore")
            with Image.open(file or path, formats=_formats()) as image:
                if shrink is not None and (factor := shrink(image.width, image.height)) > 1:
                    image.draft(None, (image.width // factor, image.height // factor))
                image.load()
                upright = ImageOps.exif_transpose(image)
                if takes_arrays(channels, pixel_max):
                    return as_array(np.asarray(upright.convert("RGB") if upright.mode == "P" else upright), channels, pixel_max)
                return to_mode(upright, channels)
    except MaeDeployError:
        raise
    except Exception as error:
        # Not a list of types: on damaged files, Pillow's plug-ins raise nearly all that Python has.
        empty = content == b"" if content is not None else os.path.exists(path) and os.path.getsize(path) == 0
        # Pillow names bytes by their address, under which the same file would be reported anew each time.
        reason = "the file is empty" if empty else " ".join(str(error).replace(repr(file), "").split())
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


def as_array(values: Array, channels: int, pixel_max: float | None) -> Array:
    """An image as the array `(H, W, C)` that it must be: uint8 unless `pixel_max` says in what range other numbers lie.

    Raises:
        UnreadableImage: another number of channels, other numbers, NaN or infinity.
    """
    try:
        pixels = channels_last(values)
    except ValueError as error:
        raise UnreadableImage(str(error)) from error
    found = pixels.shape[2]
    if found != channels:
        swapped = "; arrays are (H, W, C)" if values.ndim == 3 and values.shape[0] == channels else ""
        raise UnreadableImage(f"the image has {found} channel{'s' * (found != 1)}, not {channels}{swapped}")
    if pixel_max is None and pixels.dtype != np.uint8:
        raise UnreadableImage(f"the pixels are {pixels.dtype}; say what they are to be divided by with --pixel-max, such as 65535")
    return pixels


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
    """All image files at or below `root`, or all `.npy` files where there is no image, in a stable order; hidden files and folders are left out.

    Raises:
        ConfigError: nothing is there.
    """
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise ConfigError(f"no such file or folder: {root}")
    known = _image_suffixes()
    files = sorted(_walk(root), key=lambda path: path.relative_to(root).as_posix())
    # Beside images, .npy files are labels, masks or features; where there is nothing else, they are the images.
    found = [path for path in files if path.suffix.lower() in known] or [path for path in files if path.suffix.lower() == NUMPY_SUFFIX]
    if not found:
        raise ConfigError(f"no images below {root}", hint="any format that Pillow reads, TIFF, or .npy arrays (H, W, C), in any tree of folders")
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
    box = _middle(*image.size)
    return image if box == (0, 0, *image.size) else image.crop(box)


def _middle(width: int, height: int) -> tuple[int, int, int, int]:
    """The box of an image without the far ends of a strip: left, top, right and bottom."""
    longest = _LONGEST * min(width, height)
    left, top = ((side - min(side, longest)) // 2 for side in (width, height))
    return left, top, left + min(width, longest), top + min(height, longest)


@functools.cache
def _formats() -> tuple[str, ...]:
    """Pillow's formats but those that hold no pixels it can read, and EPS, for which it would start Ghostscript on a file that nobody checked."""
    from PIL import Image

    Image.init()
    return tuple(name for name in Image.OPEN if name not in ("PDF", "MPEG", "HDF5", "GRIB", "BUFR", "EPS"))


def is_image_name(name: str) -> bool:
    """Whether a file of this name is an image by its suffix."""
    suffix = os.path.splitext(name)[1].lower()
    return suffix == NUMPY_SUFFIX or suffix in _image_suffixes()


@functools.cache
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
