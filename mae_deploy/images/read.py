"""Images as arrays: any format that Pillow reads, TIFF of many channels, NumPy files."""

from __future__ import annotations

import functools
import importlib.util
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import numpy as np
import numpy.typing as npt

from mae_deploy.errors import ConfigError, MaeDeployError, MissingDependency, import_optional

if TYPE_CHECKING:  # imported where it is used: a device that is given normalised arrays needs no Pillow
    from PIL import Image
    from typing_extensions import TypeIs

Array = npt.NDArray[Any]

Item = TypeVar("Item")
Value = TypeVar("Value")

NUMPY_SUFFIX = ".npy"

TIFF_SUFFIXES = (".tif", ".tiff")

_TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

_MOST_PIXELS = 2 * 89_478_485
"""At which Pillow takes a file for a bomb as well."""

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""The Pillow mode for each number of channels that ordinary image files hold."""


class UnreadableImage(Exception):
    """A file that is not an image, is cut short or is empty; the message names it and says why."""


def readable(
    items: Iterable[Item], read: Callable[[Item], Value], left_out: Callable[[Item, str], object]
) -> Iterator[tuple[Item, Value]]:
    """Read images one after the other, as they are asked for: each item with what was read.

    Args:
        left_out: is told of each item that cannot be read, and why.
    """
    for item in items:
        try:
            value = read(item)
        except UnreadableImage as error:
            left_out(item, str(error))
        else:
            yield item, value


def is_image(value: object) -> TypeIs[Image.Image]:
    """Whether it is a Pillow image; whoever has one has imported Pillow."""
    pillow = sys.modules.get("PIL.Image")
    return pillow is not None and isinstance(value, pillow.Image)


def takes_arrays(channels: int, pixel_max: float | None = None) -> bool:
    """Whether such images are NumPy arrays: another number of channels than 1, 3 and 4, or pixels of more than 8
    bits.
    """
    return channels not in MODES or pixel_max is not None


def read_image(
    path: Path,
    channels: int = 3,
    pixel_max: float | None = None,
    *,
    content: bytes | None = None,
    shrink: Callable[[int, int], int] | None = None,
) -> Image.Image | Array:
    """Read an image file: a Pillow image of 8 bits, upright (EXIF), in the mode of `channels`, or an array `(H, W, C)`
    where `takes_arrays`.

    Args:
        content: the file's bytes, where `path` is but its name in a shard or a table.
        shrink: by what factor a JPEG of this width and height may be made smaller while it is decoded; training only,
            the pixels are not quite the same.

    Raises:
        UnreadableImage: empty, cut short, not an image, of a kind that has no 8-bit form, or a bomb; an array of
            another number of channels.
        MissingDependency: a TIFF file that only `tifffile` reads.
    """
    from PIL import Image, ImageOps

    file = None if content is None else io.BytesIO(content)
    try:
        if path.suffix.lower() == NUMPY_SUFFIX or (
            takes_arrays(channels, pixel_max) and path.suffix.lower() in TIFF_SUFFIXES
        ):
            pixels = as_array(read_array(path, file), channels, pixel_max)
            return pixels if takes_arrays(channels, pixel_max) else from_array(pixels)
        with warnings.catch_warnings():
            # Pillow warns of large files and of damaged metadata that it then does without.
            warnings.simplefilter("ignore")
            with Image.open(file or path, formats=formats()) as image:
                if shrink is not None and (factor := shrink(image.width, image.height)) > 1:
                    image.draft(None, (image.width // factor, image.height // factor))
                image.load()
                upright = ImageOps.exif_transpose(image)
                if takes_arrays(channels, pixel_max):
                    return as_array(
                        np.asarray(upright.convert("RGB") if upright.mode == "P" else upright), channels, pixel_max
                    )
                return to_mode(upright, channels)
    except MaeDeployError:
        raise
    except Exception as error:
        # Not a list of types: on damaged files, Pillow's plug-ins raise nearly all that Python has.
        empty = content == b"" if content is not None else os.path.exists(path) and os.path.getsize(path) == 0
        # Pillow names bytes by their address, under which the same file would be reported anew each time.
        reason = "the file is empty" if empty else " ".join(str(error).replace(repr(file), "").split())
        raise UnreadableImage(f"{path}: {reason}") from error


def name_of_bytes(content: bytes) -> Path:
    """A name for an image that is no file, with the suffix by which NumPy and TIFF files are known."""
    signatures = {b"\x93NUMPY": NUMPY_SUFFIX, **dict.fromkeys(_TIFF_SIGNATURES, TIFF_SUFFIXES[0])}
    suffix = next((suffix for start, suffix in signatures.items() if content.startswith(start)), "")
    return Path(f"{len(content):,} bytes{suffix}")


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
        raise UnreadableImage(
            f"the pixels are {pixels.dtype}; say what they are to be divided by with --pixel-max, such as 65535"
        )
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


@functools.cache
def formats() -> tuple[str, ...]:
    """Pillow's formats but those that hold no pixels it can read, and EPS, for which it would start Ghostscript on a
    file that nobody checked; HEIF where `pillow_heif` is installed.
    """
    from PIL import Image

    Image.init()
    if importlib.util.find_spec("pillow_heif") is not None:
        importlib.import_module("pillow_heif").register_heif_opener()
    return tuple(name for name in Image.OPEN if name not in ("PDF", "MPEG", "HDF5", "GRIB", "BUFR", "EPS"))


# --- arrays of any number of channels and any type of number ---------------------------------------------------------


def read_array(path: Path, file: BinaryIO | None = None) -> Array:
    """A `.npy` or TIFF file as `(H, W, C)`, in its own type of number.

    Args:
        file: the content, where `path` is but its name.

    Raises:
        ValueError: not an image; the message says why.
        MissingDependency: `tifffile`, which TIFF needs, is not installed.
    """
    values = (
        np.load(file or path, allow_pickle=False) if path.suffix.lower() == NUMPY_SUFFIX else _read_tiff(file or path)
    )
    if not isinstance(values, np.ndarray):
        raise ValueError("it holds several arrays; one image is one array (H, W, C)")
    return channels_last(values)


def channels_last(values: Array) -> Array:
    """An image as `(H, W, C)` with finite numbers in the machine's own byte order.

    Raises:
        ValueError: another shape or type, or NaN or infinity.
    """
    if values.ndim not in (2, 3) or values.size == 0:
        raise ValueError(f"an array of shape {values.shape} is not an image; images are (H, W, C) or (H, W)")
    if values.dtype.kind not in "uif":
        raise ValueError(f"pixels are {values.dtype}, not integers or floating-point numbers")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError("pixels are NaN or infinite; fill them first, such as with the mean of their band")
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    return values[:, :, None] if values.ndim == 2 else values


def resize_and_cut(pixels: Array, size: tuple[int, int], box: tuple[int, int, int, int], interpolation: str) -> Array:
    """Each channel resized to `size` and cut to `box`, with Pillow's filter: `(H, W, C)` to uint8, where it is uint8,
    else float32.

    Args:
        size: width and height.
        box: left, top, right and bottom.
    """
    from PIL import Image

    height, width, _ = pixels.shape
    planes = pixels.transpose(2, 0, 1).astype(np.uint8 if pixels.dtype == np.uint8 else np.float32, copy=False)
    made = []
    for plane in planes:
        image = Image.fromarray(np.ascontiguousarray(plane))
        if size != (width, height):
            image = image.resize(size, Image.Resampling[interpolation.upper()])
        made.append(np.asarray(image.crop(box)))
    return np.stack(made, axis=2)


def require_tiff() -> Any:
    """`tifffile`.

    Raises:
        MissingDependency: it is not installed.
    """
    try:
        return import_optional("tifffile", extra="tiff")
    except MissingDependency as error:
        raise MissingDependency(f"TIFF files of any number of channels: {error}", hint=error.hint) from error


def _read_tiff(path: Path | BinaryIO) -> Array:
    """The first image of the file; its channels are samples of a pixel or pages."""
    with require_tiff().TiffFile(path) as file:
        series = file.series[0]
        if series.size > _MOST_PIXELS * max(1, file.pages[0].samplesperpixel):
            raise ValueError(f"an image of shape {series.shape} is too large")
        values, axes = series.asarray(), series.axes
    kept = [place for place, axis in enumerate(axes) if axis in "YX" or values.shape[place] > 1]
    values, axes = values.reshape([values.shape[place] for place in kept]), "".join(axes[place] for place in kept)
    if values.ndim > 3 or not {"Y", "X"} <= set(axes):
        raise ValueError(f"a TIFF of axes {axes} and shape {values.shape} is not an image")
    order = [axes.index("Y"), axes.index("X"), *(place for place, axis in enumerate(axes) if axis not in "YX")]
    pixels: Array = np.asarray(values).transpose(order)
    return pixels
