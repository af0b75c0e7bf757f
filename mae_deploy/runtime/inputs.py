"""From what a caller has (images of any kind, lists of patches) to the arrays that a graph takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from PIL import Image, ImageOps

from mae_deploy.errors import ConfigError
from mae_deploy.preprocess import Array, Preprocess, UnreadableImage, from_array

Images: TypeAlias = "Array | Image.Image | Sequence[Array | Image.Image]"
Keep: TypeAlias = "Array | Sequence[int] | Sequence[Sequence[int]] | Sequence[Array]"

_ACCEPTED = "images are uint8 (H, W), (H, W, C) or (B, H, W, C), a list of such arrays or of Pillow images, or normalised float32 (B, C, H, W)"


def image_batch(images: Images, preprocess: Preprocess) -> Array:
    """Any accepted form of images as the graph's input, float32 `(B, C, H, W)`.

    A uint8 array of three axes is one image `(H, W, C)`; a batch of grey images is `(B, H, W, 1)`. Pillow images are turned upright (EXIF).

    Raises:
        ConfigError: no images, another type, dtype or shape, or a Pillow image that cannot be decoded.
    """
    if isinstance(images, np.ndarray):
        if images.dtype == np.float32:
            return _normalised(images, preprocess)
        if images.dtype != np.uint8 or images.ndim not in (2, 3, 4):
            raise ConfigError(f"images are {images.dtype} {images.shape}", hint=_ACCEPTED)
        images = list(images) if images.ndim == 4 else [images]
    elif isinstance(images, Image.Image):
        images = [images]
    elif not isinstance(images, list | tuple):
        raise ConfigError(f"images are of type {type(images).__name__}", hint=_ACCEPTED)
    if not images:
        raise ConfigError("there are no images", hint="give at least one")
    return preprocess.normalise(np.stack([_pixels(image, index, preprocess) for index, image in enumerate(images)]))


def keep_batch(keep: Keep, batch: int, num_patches: int, fixed_keep: int | None) -> Array:
    """Indices of the visible patches as the graph's input, int64 `(B, K)`; `(K,)` is meant for every image.

    Raises:
        ConfigError: not whole numbers, rows of unequal length or for another number of images, an index out of range or twice, or not the graph's fixed K.
    """
    ids = _as_integers(keep)
    if ids.ndim == 1:
        ids = np.broadcast_to(ids, (batch, len(ids)))
    if ids.ndim != 2 or len(ids) != batch or ids.shape[1] == 0:
        raise ConfigError(
            f"keep has the shape {ids.shape} for {batch} images", hint="give (K,) indices for every image, or (B, K), a row for each; K is at least 1"
        )
    if fixed_keep is not None and ids.shape[1] != fixed_keep:
        raise ConfigError(f"keep has {ids.shape[1]} patches an image, the graph is fixed to {fixed_keep}", hint="export with --tokens visible for any number")
    outside = ids[(ids < 0) | (ids >= num_patches)]
    if outside.size:
        raise ConfigError(f"keep has the patch {outside[0]}", hint=f"patches are 0 to {num_patches - 1}, row by row from the top left")
    ordered = np.sort(ids, axis=1)
    twice = ordered[:, 1:][ordered[:, 1:] == ordered[:, :-1]]
    if twice.size:
        raise ConfigError(f"keep has the patch {twice[0]} twice for one image", hint="list each patch once")
    return np.ascontiguousarray(ids, dtype=np.int64)


def _normalised(images: Array, preprocess: Preprocess) -> Array:
    height, width = preprocess.image_size
    if images.ndim != 4 or images.shape[1:] != (preprocess.channels, height, width) or len(images) == 0:
        raise ConfigError(
            f"float32 images have the shape {images.shape}, not (B, {preprocess.channels}, {height}, {width})",
            hint="float32 is taken as normalised already; give uint8 for images of any size",
        )
    return np.ascontiguousarray(images)


def _pixels(image: Any, index: int, preprocess: Preprocess) -> Array:
    """One image, resized and cropped: uint8 `(H, W, C)`."""
    try:
        if isinstance(image, np.ndarray):
            if image.size == 0:
                raise ConfigError(f"no pixels in shape {image.shape}")
            return preprocess.crop(from_array(image))
        if isinstance(image, Image.Image):
            return preprocess.crop(ImageOps.exif_transpose(image))
    except ConfigError as error:
        raise ConfigError(f"image {index}: {error}", hint=error.hint or _ACCEPTED) from error
    except (UnreadableImage, OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError) as error:  # Pillow decodes late
        raise ConfigError(f"image {index} cannot be decoded: {' '.join(str(error).split())}") from error
    raise ConfigError(f"image {index} is of type {type(image).__name__}", hint=_ACCEPTED)


def _as_integers(keep: Keep) -> Array:
    try:
        ids = np.asarray(keep)
    except ValueError as error:  # NumPy's word for rows of unequal length
        raise ConfigError("keep has rows of unequal length", hint="give every image the same number of patches") from error
    if ids.size and ids.dtype.kind not in "iu":
        raise ConfigError(f"keep must be whole numbers, not {ids.dtype}")
    return ids
