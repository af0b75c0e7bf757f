"""Pixels as files hold them: any number of channels, any type of number, all bits."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, get_args

import numpy as np
import numpy.typing as npt

from mae_deploy.errors import ConfigError, MissingDependency, import_optional, reason
from mae_deploy.images.geometry import Box, Placement
from mae_deploy.images.limits import check_bytes, check_size

if TYPE_CHECKING:  # imported where it is used: a device that is given normalised arrays needs no Pillow
    from PIL import Image, ImageFile

Array = npt.NDArray[Any]

ChannelOrder = Literal["rgb", "bgr"]
"""Of an array's colours; OpenCV's frames are BGR."""

NUMPY_SUFFIX = ".npy"

TIFF_SUFFIXES = (".tif", ".tiff")

_ORIENTATION = 274
"""The tag of EXIF and TIFF; 1 is upright."""

_MIN_IS_WHITE, _PALETTE = 0, 3
"""TIFF's photometric interpretations in which a larger number is no brighter pixel."""

_DEEP_COLOURS = ("RGB;16B", "RGBA;16B", "LA;16B")
"""What Pillow calls colours, or grey and alpha, of 16 bits in a PNG."""

_DECODERS = {"PNG": "png_decode", "JPEG2000": "jpeg2k_decode", "AVIF": "avif_decode"}
"""Of imagecodecs, for formats whose colours may have more than the 8 bits that Pillow gives."""


def read_array(path: Path, file: BinaryIO | None = None) -> Array:
    """A `.npy` or TIFF file as `(H, W, C)`, in its own type of number; a TIFF upright, with white as its largest
    number.

    Args:
        file: the content, where `path` is but its name.

    Raises:
        ValueError: not an image; the message says why.
        MissingDependency: `tifffile`, which TIFF needs, is not installed.
    """
    if path.suffix.lower() != NUMPY_SUFFIX:
        return channels_last(_read_tiff(file or path))
    values = load_npy(file or path)
    if values.ndim > 1:
        check_size(values.shape[1], values.shape[0])
    return channels_last(values)


def load_npy(source: Path | BinaryIO) -> Array:
    """The array of a `.npy` file; nothing in it is unpickled.

    Raises:
        ValueError: it is none, holds objects or several arrays, is cut off, or larger than an image may be.
    """
    try:
        with source.open("rb") if isinstance(source, Path) else nullcontext(source) as file:
            several = file.read(2) == b"PK"
            file.seek(0)
        if several:  # NumPy leaves a damaged archive open
            raise ValueError("it holds several arrays; one image is one array (H, W, C)")
        # Mapped, a header that promises too much takes no memory.
        values: Array = np.load(source, allow_pickle=False, mmap_mode="r" if isinstance(source, Path) else None)
    except Exception as error:  # of any kind: what NumPy raises follows from the bytes of the header
        raise ValueError(reason(error)) from error
    check_bytes(values.nbytes)
    return np.array(values) if isinstance(values, np.memmap) else values


def read_deep(image: ImageFile.ImageFile, channels: int) -> Array | None:
    """The pixels `(H, W, C)` of a file that Pillow has opened and not loaded, as the file holds them, upright; None
    where Pillow gives all bits.

    Args:
        channels: how many are wanted: an alpha channel beyond them lies on white.

    Raises:
        ValueError: a file that cannot be read in full.
        MissingDependency: `imagecodecs` is not installed.
    """
    file: Any = image.fp
    decoder, _, offset, args = image.tile[0] if image.tile else ("", None, 0, "")
    maximum = _pnm_maximum(image)
    if maximum > 255:
        if decoder != "ppm_plain":
            file.seek(offset)
            count = image.height * image.width * len(image.getbands())
            values = np.frombuffer(file.read(2 * count), ">u2", count)
            return channels_last(values.reshape(image.height, image.width, -1))
        if image.mode != "I":
            raise ValueError("a plain PPM of more than 8 bits; save it as binary PPM, PNG or TIFF")
        # Pillow has scaled it to 65535, which loses nothing.
        return channels_last(np.rint(np.asarray(image) * (maximum / 65535)).astype(np.uint16))
    if image.format not in _DECODERS or (image.format == "PNG" and args not in _DEEP_COLOURS):
        return None
    file.seek(0)
    codecs = import_optional("imagecodecs", extra="tiff")
    pixels = channels_last(getattr(codecs, _DECODERS[image.format])(file.read()))
    if image.format == "PNG" and pixels.shape[2] == channels + 1:
        pixels = _on_white(pixels, 65535)
    return upright(pixels, image.getexif().get(_ORIENTATION, 1))


def may_be_deep(image: ImageFile.ImageFile) -> bool:
    """Whether a file that Pillow has opened may hold more than 8 bits of a pixel, by its header."""
    args = image.tile[0][3] if image.tile else ""
    return (
        image.mode[0] in "IF"
        or _pnm_maximum(image) > 255
        or "16" in str(args)
        or image.format in (*_DECODERS.keys() - {"PNG"}, "TIFF")
    )


def upright(pixels: Array, orientation: int) -> Array:
    """An array `(H, W, C)` turned as this orientation of EXIF and TIFF says it is to be shown."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def in_rgb(pixels: Array, channel_order: ChannelOrder, axis: int = -1) -> Array:
    """An array of any order of colours as RGB, RGBA, or the one channel that it has.

    Args:
        axis: that of the channels.

    Raises:
        ConfigError: no such order, or not of this number of channels.
    """
    check_channel_order(channel_order)
    found = pixels.shape[axis]
    if channel_order == "rgb" or found == 1:
        return pixels
    if found not in (3, 4):
        raise ConfigError(f"channel_order {channel_order} is for 1, 3 or 4 channels, not {found}")
    return pixels.take([2, 1, 0, 3][:found], axis)


def check_channel_order(channel_order: str) -> None:
    """Raise ConfigError unless there is such an order."""
    if channel_order not in get_args(ChannelOrder):
        raise ConfigError(f"channel_order {channel_order!r} is not one of {', '.join(get_args(ChannelOrder))}")


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


def resize_and_cut(pixels: Array, placed: Placement, interpolation: str, fill: Sequence[float]) -> Array:
    """Each channel of the part that is placed resized and cut, with Pillow's filter: `(H, W, C)` to uint8, where it is
    uint8, else float32.

    Args:
        fill: of each channel, what lies outside of the image.
    """
    from PIL import Image

    height, width, _ = pixels.shape
    planes = pixels.transpose(2, 0, 1).astype(np.uint8 if pixels.dtype == np.uint8 else np.float32, copy=False)
    made = []
    for plane, value in zip(planes, fill, strict=True):
        image = Image.fromarray(np.ascontiguousarray(plane))
        if placed.size != (width, height):
            image = image.resize(placed.size, Image.Resampling[interpolation.upper()])
        made.append(np.asarray(cut(image, placed.box, [value if image.mode == "F" else min(round(value), 255)])))
    return np.stack(made, axis=2)


def cut(image: Image.Image, box: Box, fill: Sequence[float]) -> Image.Image:
    """A box of an image; what lies outside of the image has the colour `fill`, a number for each channel."""
    from PIL import Image

    left, top, right, bottom = box
    if left >= 0 and top >= 0 and right <= image.width and bottom <= image.height:
        return image.crop(box)
    colour: Any = fill[0] if len(fill) == 1 else tuple(fill)
    filled = Image.new(image.mode, (right - left, bottom - top), colour)
    filled.paste(image, (-left, -top))
    return filled


def require_tiff() -> Any:
    """`tifffile`.

    Raises:
        MissingDependency: it is not installed.
    """
    try:
        return import_optional("tifffile", extra="tiff")
    except MissingDependency as error:
        raise MissingDependency(f"TIFF files of any number of channels: {error}", hint=error.hint) from error


def _pnm_maximum(image: ImageFile.ImageFile) -> int:
    """White of an opened PGM or PPM file by its header; 0: another kind of file."""
    if image.format != "PPM" or image.mode not in ("L", "I", "RGB"):
        return 0
    _, _, _, args = image.tile[0]
    if isinstance(args, tuple):
        return int(args[1])
    return 65535 if args == "I;16B" else 255


def _on_white(pixels: Array, white: int) -> Array:
    """`(H, W, C + 1)` with alpha as the last channel: `(H, W, C)`."""
    colours, alpha = pixels[..., :-1].astype(np.float64), pixels[..., -1:].astype(np.float64) / white
    blended: Array = np.rint(colours * alpha + white * (1 - alpha)).astype(pixels.dtype)
    return blended


def _read_tiff(path: Path | BinaryIO) -> Array:
    """The first image of the file; its channels are samples of a pixel or pages."""
    with require_tiff().TiffFile(path, _multifile=False) as file:  # pages that lie in other files are left alone
        series = file.series[0]
        page = series.keyframe
        check_size(page.imagewidth, page.imagelength)
        check_bytes(series.nbytes)
        values, axes = series.asarray(), series.axes
        orientation = page.tags.valueof(_ORIENTATION, 1)
        if page.photometric == _MIN_IS_WHITE and values.dtype.kind == "u":
            values = (1 << page.bitspersample) - 1 - values
        if page.photometric == _PALETTE:
            colours = (page.colormap >> 8).astype(np.uint8)  # of 16 bits each, as TIFF has it
            values, axes = np.moveaxis(colours[:, values], 0, -1), f"{axes}S"
    kept = [place for place, axis in enumerate(axes) if axis in "YX" or values.shape[place] > 1]
    values, axes = values.reshape([values.shape[place] for place in kept]), "".join(axes[place] for place in kept)
    if values.ndim > 3 or not {"Y", "X"} <= set(axes):
        raise ValueError(f"a TIFF of axes {axes} and shape {values.shape} is not an image")
    order = [axes.index("Y"), axes.index("X"), *(place for place, axis in enumerate(axes) if axis not in "YX")]
    return upright(np.asarray(values).transpose(order), orientation)
