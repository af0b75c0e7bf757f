"""Images of any number of channels and any type of number, as NumPy and TIFF files hold them; resized in Pillow channel
by channel.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from mae_deploy.errors import MissingDependency, import_optional

Array = npt.NDArray[Any]

NUMPY_SUFFIX = ".npy"

TIFF_SUFFIXES = (".tif", ".tiff")

_MOST_PIXELS = 2 * 89_478_485
"""At which Pillow takes a file for a bomb as well."""


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
        raise ValueError(f"an array of shape {values.shape} is no image; images are (H, W, C) or (H, W)")
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
        raise ValueError(f"a TIFF of axes {axes} and shape {values.shape} is no image")
    order = [axes.index("Y"), axes.index("X"), *(place for place, axis in enumerate(axes) if axis not in "YX")]
    pixels: Array = np.asarray(values).transpose(order)
    return pixels
