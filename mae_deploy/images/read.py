"""Image files: any format that Pillow reads, TIFF of many channels, NumPy files.

How many bits a pixel has is decided by the kind of file, never by what is in it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, TypeVar

import numpy as np

from mae_deploy.errors import ConfigError, MaeDeployError
from mae_deploy.file_kinds import is_special, stand_in
from mae_deploy.images.arrays import (
    NUMPY_SUFFIX,
    TIFF_SUFFIXES,
    ChannelOrder,
    channels_last,
    may_be_deep,
    read_array,
    read_deep,
)
from mae_deploy.images.arrays import Array as Array
from mae_deploy.images.limits import TooManyPixels, check_bytes, check_size, given_limit
from mae_deploy.machine import granted_cores

if TYPE_CHECKING:  # imported where it is used: a device that is given normalised arrays needs no Pillow
    from PIL import Image, ImageFile
    from typing_extensions import TypeIs

Item = TypeVar("Item")
Value = TypeVar("Value")

_TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

_HEAD = 4096
"""Bytes of a file that is no image by which it may be known."""

_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262
"""TIFF's tags."""

_MOST_THREADS = 4
"""That read ahead: each holds a whole photo."""

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""The Pillow mode for each number of channels that ordinary image files hold."""


class UnreadableImage(Exception):
    """A file that is not an image, is cut short or is empty; the message names it and says why."""


def readable(
    items: Iterable[Item],
    read: Callable[[Item], Value],
    left_out: Callable[[Item, str], object],
    *,
    ahead: int = 0,
) -> Iterator[tuple[Item, Value]]:
    """Read images one after the other, as they are asked for: each item with what was read.

    Args:
        left_out: is told of each item that cannot be read, and why.
        ahead: images that are read before they are asked for, in a few threads; 0: none, and in no thread.
    """

    def attempt(item: Item) -> tuple[Item, Value | UnreadableImage]:
        try:
            return item, read(item)
        except UnreadableImage as error:
            return item, error

    for item, value in _ahead(attempt, items, ahead) if ahead else map(attempt, items):
        if isinstance(value, UnreadableImage):
            left_out(item, str(value))
        else:
            yield item, value


def _ahead(function: Callable[[Item], Value], items: Iterable[Item], ahead: int) -> Iterator[Value]:
    """As `map`, with so many results ready before they are asked for."""
    from concurrent.futures import Future, ThreadPoolExecutor

    pending: deque[Future[Value]] = deque()
    pool = ThreadPoolExecutor(min(ahead, _MOST_THREADS, granted_cores()), thread_name_prefix="images")
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


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
        MissingDependency: a TIFF file that only `tifffile` reads, or colours of 16 bits that only `imagecodecs` does.
    """
    arrays = takes_arrays(channels, pixel_max)
    with _reading(path, content) as file:
        if arrays or path.suffix.lower() == NUMPY_SUFFIX:
            pixels = as_array(_stored(path, file, channels), channels, pixel_max)
            return pixels if arrays else from_array(pixels)
        with _open_image(file or path) as image:
            if shrink is not None and (factor := shrink(image.width, image.height)) > 1:
                image.draft(None, (image.width // factor, image.height // factor))
            _load_upright(image)
            converted = to_mode(image, channels)
            return converted.copy() if converted is image else converted


def stored_pixels(path: Path, channels: int, content: bytes | None = None) -> Array:
    """The pixels `(H, W, C)` of a file with all their bits, in its own type of number.

    Args:
        channels: how many are wanted; there may be others.
        content: the file's bytes, where `path` is but its name.

    Raises:
        UnreadableImage: see `read_image`.
        MissingDependency: a file that only `tifffile` or `imagecodecs` reads.
    """
    with _reading(path, content) as file:
        return channels_last(_stored(path, file, channels))


class Header(NamedTuple):
    """What can be said of a file without its pixels."""

    may_be_deep: bool = True
    """Whether it may hold more than 8 bits of a pixel; true of what Pillow does not know."""
    pictures: int = 1
    """Pages or frames, of which the first is read."""


def read_header(path: Path, content: bytes) -> Header:
    """The header of an image file, where there is one."""
    if path.suffix.lower() != NUMPY_SUFFIX:
        with contextlib.suppress(Exception), _open_image(io.BytesIO(content)) as image:
            deep = may_be_deep(image)
            # Of a phone's photo in MPO the others are a depth map or a preview.
            return Header(deep, 1 if image.format == "MPO" else getattr(image, "n_frames", 1))
    return Header()


@contextlib.contextmanager
def _open_image(file: Path | BinaryIO) -> Iterator[ImageFile.ImageFile]:
    """Pillow's image of a file, of which no more than the header is read."""
    from PIL import Image

    with _SILENCE:
        # Pillow warns of large files and of damaged metadata that it then does without.
        limit = given_limit()
        if limit is not None and Image.MAX_IMAGE_PIXELS is not None and 2 * Image.MAX_IMAGE_PIXELS < limit:
            Image.MAX_IMAGE_PIXELS = -(-limit // 2)  # Pillow refuses what is twice as large
        try:
            opened = Image.open(file, formats=formats())
        except Image.DecompressionBombError as error:
            raise TooManyPixels(f"{str(error).partition(',')[0]}: --max-pixels allows more") from error
        with opened as image:
            if limit is not None:
                check_size(*image.size)
            yield image


class _Silence:
    """No warnings as long as any thread is inside. `warnings.catch_warnings` puts back what it found, which of two
    threads at once leaves the filters of the first in place for ever.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._filters = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.simplefilter("ignore")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._filters.__exit__(None, None, None)


_SILENCE = _Silence()


@contextlib.contextmanager
def _reading(path: Path, content: bytes | None) -> Iterator[BinaryIO | None]:
    """The content as a file, where there is any; whatever goes wrong is an `UnreadableImage` that names the path."""
    if content is None and is_special(path):
        raise UnreadableImage(f"{path}: it is no file")
    file = None if content is None else io.BytesIO(content)
    try:
        check_bytes(path.stat().st_size if content is None else len(content))
        yield file
    except MaeDeployError:
        raise
    except Exception as error:
        # Not a list of types: on damaged files, Pillow's plug-ins raise nearly all that Python has. It names bytes by
        # their address, under which the same file would be reported anew each time.
        reason = _what_is_there(path, content) or " ".join(str(error).replace(repr(file), "").split())
        raise UnreadableImage(f"{path}: {reason}") from error


def _what_is_there(path: Path, content: bytes | None) -> str | None:
    """What took the image's place: nothing, a pointer, a web page."""
    try:
        with io.BytesIO(content) if content is not None else path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError:
        return None
    instead = stand_in(head)
    return f"it is {instead.words}" if instead is not None else (None if head else "the file is empty")


def name_of_bytes(content: bytes) -> Path:
    """A name for an image that is no file, with the suffix by which NumPy and TIFF files are known."""
    return Path(f"{len(content):,} bytes{suffix_of(content)}")


def suffix_of(content: bytes) -> str:
    """The suffix of files of this content; empty where it is no image that is known."""
    signatures = {b"\x93NUMPY": NUMPY_SUFFIX, **dict.fromkeys(_TIFF_SIGNATURES, TIFF_SUFFIXES[0])}
    for start, suffix in signatures.items():
        if content.startswith(start):
            return suffix
    from PIL import Image

    with contextlib.suppress(Exception), _open_image(io.BytesIO(content)) as image:
        plain, known = f".{image.format}".lower(), Image.EXTENSION
        return plain if plain in known else next(suffix for suffix, name in known.items() if name == image.format)
    return ""


def _stored(path: Path, file: BinaryIO | None, channels: int) -> Array:
    """The pixels `(H, W)` or `(H, W, C)` with all their bits."""
    if path.suffix.lower() in (NUMPY_SUFFIX, *TIFF_SUFFIXES):
        return read_array(path, file)
    with _open_image(file or path) as image:
        if (deep := read_deep(image, channels)) is not None:
            return deep
        _load_upright(image)
        if image.mode.startswith("I"):
            return _grey_values(image)[0]
        return np.asarray(to_mode(image, channels) if image.mode != "F" and channels in MODES else image)


def _load_upright(image: Image.Image) -> None:
    from PIL import ImageOps

    image.load()
    ImageOps.exif_transpose(image, in_place=True)


def to_mode(image: Image.Image, channels: int) -> Image.Image:
    """Convert to 8 bits and to the mode of `channels`; 16-bit values are scaled, not clipped. Where there is no channel
    for it, what is transparent is laid on white.

    Raises:
        UnreadableImage: pixels with no fixed range.
    """
    from PIL import Image

    if channels not in MODES:
        raise ConfigError(f"image files hold 1, 3 or 4 channels, not {channels}")
    mode = MODES[channels]
    if image.mode.startswith("I"):
        # convert("RGB") would clip everything above 255 to white.
        values, white = _grey_values(image)
        if white is None:
            raise UnreadableImage("32-bit pixels have no fixed range; save the image with 8 or 16 bits a channel")
        image = Image.fromarray((values.astype(np.int64) * 255 // white).astype(np.uint8))
    elif image.mode == "F":
        raise UnreadableImage("floating-point pixels have no fixed range; save the image with 8 or 16 bits a channel")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        if channels != 4:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)


def as_array(values: Array, channels: int, pixel_max: float | None) -> Array:
    """An image as the array `(H, W, C)` that it must be: uint8 unless `pixel_max` says in what range other numbers lie.

    Raises:
        UnreadableImage: another number of channels, other numbers, NaN or infinity, or 8 bits where `pixel_max` is
            above 255.
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
    if pixel_max is not None and pixel_max > 255 and pixels.dtype.itemsize == 1:
        raise UnreadableImage(f"the pixels have 8 bits, at most 255, and would be divided by --pixel-max {pixel_max:g}")
    return pixels


def from_array(pixels: Array, channel_order: ChannelOrder = "rgb") -> Image.Image:
    """A uint8 array `(H, W)`, `(H, W, 1)`, `(H, W, 3)` or `(H, W, 4)` as a Pillow image.

    Args:
        channel_order: of the array.

    Raises:
        ConfigError: another dtype or shape.
    """
    from PIL import Image

    pixels = np.asarray(pixels)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))):
        raise ConfigError(f"an image must be uint8 (H, W), (H, W, 3) or (H, W, 4), not {pixels.dtype} {pixels.shape}")
    if channel_order == "rgb" or pixels.ndim == 2:
        return Image.fromarray(pixels)
    height, width, found = pixels.shape
    order = "BGR" if found == 3 else "BGRA"
    return Image.frombuffer(MODES[found], (width, height), np.ascontiguousarray(pixels), "raw", order, 0, 1)


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


def _grey_values(image: Image.Image) -> tuple[Array, int | None]:
    """Pixels `(H, W)` of more than 8 bits, and what white is by the kind of file; None: nothing says."""
    values = np.asarray(image)
    if image.mode == "I":  # as Pillow reads some files of 16 bits, PGM scaled to them from its header's maximum
        return values, 65535 if image.format in ("PNG", "PPM") else None
    tags = getattr(image, "tag_v2", {})
    white = (1 << tags.get(_BITS_PER_SAMPLE, (16,))[0]) - 1
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero
        values = white - values
    transparent = image.info.get("transparency")
    return np.where(values == transparent, white, values) if isinstance(transparent, int) else values, white
