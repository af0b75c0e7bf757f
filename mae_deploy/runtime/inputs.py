"""From what a caller has (images of any kind, lists of patches) to the arrays that a graph takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from mae_deploy.errors import ConfigError
from mae_deploy.images.arrays import ChannelOrder, check_channel_order, in_rgb
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.images.read import Array, UnreadableImage, is_image
from mae_deploy.images.video_image import VideoImage
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.cache import take_patches
from mae_deploy.runtime.manifest import IDS_KEEP, NUM_KEEP, PATCHES, TOKEN_INPUTS, UPDATES
from mae_deploy.text import expand_range

if TYPE_CHECKING:
    from PIL import Image
    from typing_extensions import TypeIs

Images: TypeAlias = "Array | Image.Image | VideoImage | Sequence[Array | Image.Image | VideoImage]"
Keep: TypeAlias = "Array | str | Sequence[int] | Sequence[Sequence[int]] | Sequence[Array]"
NumKeep: TypeAlias = "Array | Sequence[int]"

_BGR = "; colours are RGB, and OpenCV's frames are BGR: channel_order='bgr'"

_ACCEPTED_ARRAYS = (
    "images are numbers as the files hold them, (H, W), (H, W, C) or (B, H, W, C), but floating-point batches as a"
    " list; or normalised float32 (B, C, H, W)" + _BGR
)

_ACCEPTED = (
    "images are uint8 (H, W), (H, W, C) or (B, H, W, C), a list of such arrays or of Pillow images, or normalised"
    " float32 (B, C, H, W)" + _BGR
)


def is_batch(images: Images) -> TypeIs[Array | Sequence[Array | Image.Image | VideoImage]]:
    """Whether it is several images, which can be counted and sliced: a list, or an array of four axes."""
    return isinstance(images, list | tuple) or (isinstance(images, np.ndarray) and images.ndim == 4)


def image_batch(
    images: Images,
    preprocess: Preprocess,
    dtype: str = "float32",
    *,
    channel_order: ChannelOrder = "rgb",
    first: int = 0,
) -> Array:
    """Any accepted form of images as the graph's input: float32 or float16 `(B, C, H, W)`, normalised, or uint8
    `(B, H, W, C)`.

    A uint8 array of three axes is one image `(H, W, C)`; a batch of grey images is `(B, H, W, 1)`. Pillow images are
    turned upright (EXIF). Where pixels have more than 8 bits (`pixel_max`), arrays are of any type of number; of
    floating-point ones, those of four axes are normalised already.

    Args:
        dtype: what the graph takes. With uint8 the graph normalises, and no floating-point work is done here.
        channel_order: of arrays, rgb or bgr; Pillow images know their own.
        first: number of the first image, by which an error names them.

    Raises:
        ConfigError: no images, another type, dtype or shape, or a Pillow image that cannot be decoded.
    """
    check_channel_order(channel_order)
    if isinstance(images, np.ndarray):
        wide = preprocess.pixel_max is not None
        if images.dtype in (np.float32, np.float16) and (images.ndim == 4 or not wide):
            return _normalised(images, preprocess, dtype, channel_order)
        if (images.dtype != np.uint8 and not wide) or images.ndim not in (2, 3, 4):
            raise ConfigError(f"images are {images.dtype} {images.shape}", hint=_accepted(preprocess))
        images = list(images) if images.ndim == 4 else [images]
    elif is_image(images) or isinstance(images, VideoImage):
        images = [images]
    elif not isinstance(images, list | tuple):
        raise ConfigError(f"images are of type {type(images).__name__}", hint=_accepted(preprocess))
    if not images:
        raise ConfigError("there are no images", hint="give at least one")
    return pixel_batch(
        np.stack([_pixels(image, index, preprocess, channel_order) for index, image in enumerate(images, first)]),
        preprocess,
        dtype,
    )


def pixel_batch(pixels: Array, preprocess: Preprocess, dtype: str) -> Array:
    """Images that are cropped already, `(B, H, W, C)`, as the graph's input of this dtype."""
    return pixels if dtype == "uint8" else preprocess.normalise(pixels).astype(dtype, copy=False)


def patch_batch(patches: Array, bundle: Bundle) -> Array:
    """The kept patches as the graph's input: `(B, K, P * P * C)` of its dtype.

    Args:
        patches: pixels `(B, K, P, P, C)`, uint8 or of more than 8 bits as `preprocess.crop` gives them; or of the
            graph's shape, floating-point ones normalised.

    Raises:
        ConfigError: another shape or dtype.
    """
    preprocess, P, dtype = bundle.preprocess, bundle.model["patch_size"], bundle.image_dtype
    size = (P, P, preprocess.channels)
    if patches.ndim == 5 and patches.shape[2:] == size and patches.dtype == preprocess.dtype:
        normalised = patches if dtype == "uint8" else preprocess.normalise_pixels(patches)
        return normalised.reshape(*patches.shape[:2], -1).astype(dtype, copy=False)
    floats = ("float32", "float16") if dtype != "uint8" else (dtype,)
    if patches.ndim != 3 or patches.shape[2] != math.prod(size) or patches.dtype not in floats:
        raise ConfigError(
            f"patches are {patches.dtype} {patches.shape}",
            hint=f"patches are pixels, {preprocess.dtype} (B, K, {P}, {P}, {preprocess.channels}), or as the graph"
            f" takes them, {dtype} (B, K, {math.prod(size)})",
        )
    return np.ascontiguousarray(patches, dtype=dtype)


def first_frames(images: Array, ids_keep: Array, bundle: Bundle) -> dict[str, Array]:
    """Images as `image_batch` gives them, each as the first frame of a stream of its own (see `cache.Sequences`)."""
    pixels = images if bundle.image_dtype == "uint8" else images.transpose(0, 2, 3, 1)
    B, K = ids_keep.shape
    patches = take_patches(pixels, ids_keep, bundle.model["patch_size"]).reshape(B, K, -1)
    return {PATCHES: patches, IDS_KEEP: ids_keep, UPDATES: np.full((B, 1), K, np.int64)}


def token_batch(bundle: Bundle, keep: Keep | None, num_keep: NumKeep | None, batch: int) -> dict[str, Array]:
    """The visible patches as the graph's inputs beside the images: none, `ids_keep`, or `ids_keep` and `num_keep`.

    Args:
        keep: see `Backbone`; None keeps every patch.
        num_keep: how many indices of each row of a padded `keep` are real.
        batch: number of images, B.

    Raises:
        ConfigError: patches that the graph cannot take.
    """
    mode, (least, most) = bundle.token_mode, bundle.keep_range
    if num_keep is not None and mode != "ragged":
        raise ConfigError(f"num_keep cannot be used with token mode '{mode}'", hint="export with --tokens ragged")
    if mode == "full":
        if keep is not None:
            raise ConfigError(
                "this bundle's graph takes every patch, so keep cannot be used", hint="export with --tokens visible"
            )
        return {}
    if keep is None:
        if num_keep is not None:
            raise ConfigError("num_keep without keep", hint="pass keep, the padded indices (B, K)")
        if most < bundle.num_patches:
            number = f"{most}" if least == most else f"{least} to {most}"
            raise ConfigError(
                f"this bundle's graph takes {number} of {bundle.num_patches} patches",
                hint=f"pass keep, the indices of {number} patches",
            )
        keep = np.arange(bundle.num_patches)
    keep = patch_indices(keep, bundle, num_keep)
    if num_keep is not None:
        ids, lengths = _given_rows(keep, num_keep, batch)
    else:
        ids, lengths = _padded_rows(keep, batch, ragged=mode == "ragged", length=bundle.fixed_keep)
    _check_lengths(ids.shape[1], lengths, bundle)
    _check_patches(ids, lengths, bundle.num_patches)
    inputs = {IDS_KEEP: np.ascontiguousarray(ids, dtype=np.int64), NUM_KEEP: lengths}
    return {name: inputs[name] for name in TOKEN_INPUTS[mode]}


def patch_indices(keep: Keep, bundle: Bundle, num_keep: NumKeep | None = None) -> Keep:
    """Ranges such as `0-48,60`, and boolean masks, as the indices that they stand for; indices as they are.

    Args:
        keep: a mask is `(N,)`, or `(rows, columns)` of the grid, for every image, or such a one for each.

    Raises:
        ConfigError: no such range, a mask of another shape, one that keeps nothing, or `num_keep` beside a mask.
    """
    if isinstance(keep, str):
        items = [item for part in keep.replace(" ", "").split(",") if part for item in expand_range(part)]
        try:
            return [int(item) for item in items]
        except ValueError as error:
            raise ConfigError(f"keep '{keep:.60}' is not a list of patches", hint="such as '0-48,60'") from error
    try:
        masks = np.asarray(keep)
    except ValueError:  # rows of unequal length: masks all have N values
        return keep
    if masks.dtype != np.bool_ or not masks.size:
        return keep
    if not masks.ndim:
        raise ConfigError("keep is one boolean, not one for each patch")
    if num_keep is not None:
        raise ConfigError("num_keep does not go with a mask, which says itself how many", hint="leave num_keep out")
    N, P = bundle.num_patches, bundle.model["patch_size"]
    grid = tuple(side // P for side in bundle.model["image_size"])
    flat = masks.reshape(*masks.shape[:-2], -1) if masks.shape[-2:] == grid else masks
    if flat.ndim > 2 or flat.shape[-1] != N:
        raise ConfigError(
            f"the mask has the shape {masks.shape}",
            hint=f"a mask is ({N},) or {grid} for every image, or such a one for each",
        )
    rows = [np.flatnonzero(row) for row in np.atleast_2d(flat)]
    if empty := [number for number, row in enumerate(rows) if not row.size]:
        raise ConfigError(f"mask {empty[0]} keeps no patch", hint="each image needs at least one")
    return rows[0] if flat.ndim == 1 else rows


def _given_rows(keep: Keep, num_keep: NumKeep, batch: int) -> tuple[Array, Array]:
    """Rows that the caller padded, and how many of each are real: `(B, K)` and `(B,)`; the padding may hold
    anything.
    """
    ids, lengths = _as_integers(keep, "keep"), _as_integers(num_keep, "num_keep")
    if ids.ndim != 2 or len(ids) != batch or lengths.shape != (batch,):
        raise ConfigError(
            f"keep has the shape {ids.shape} and num_keep {lengths.shape} for {batch} images",
            hint="with num_keep (B,), keep is (B, K): a padded row for each",
        )
    outside = lengths[(lengths < 1) | (lengths > ids.shape[1])]
    if outside.size:
        raise ConfigError(
            f"num_keep has {outside[0]} for rows of {ids.shape[1]}",
            hint="each is at least 1 and at most the length of the rows",
        )
    return ids, lengths.astype(np.int64)


def _padded_rows(keep: Keep, batch: int, *, ragged: bool, length: int | None) -> tuple[Array, Array]:
    """A row for each image, padded with 0 to `length` or to the longest: `(B, K)` and how many of each are real
    `(B,)`.
    """
    if not _is_uneven(keep):
        ids = _as_integers(keep, "keep")
        rows = [ids] * batch if ids.ndim == 1 else list(ids) if ids.ndim == 2 else []
        shape = f"the shape {ids.shape}"
    elif not ragged:
        raise ConfigError(
            "keep has rows of unequal length",
            hint="give every image the same number of patches, or export with --tokens ragged",
        )
    else:
        rows = [_as_integers(row, "keep") for row in keep]
        shape = f"{len(rows)} rows"
    if len(rows) != batch or any(row.ndim != 1 or not row.size for row in rows):
        raise ConfigError(
            f"keep has {shape} for {batch} images",
            hint="give (K,) indices for every image, or a row for each; K is at least 1",
        )
    lengths = np.array([len(row) for row in rows], np.int64)
    longest = int(lengths.max())
    if (largest := max(int(row.max()) for row in rows)) > np.iinfo(np.int64).max:
        raise ConfigError(f"keep has {largest}, which is no index")
    ids = np.zeros((batch, max(longest, length or 0) if ragged else longest), np.int64)
    for padded, row in zip(ids, rows, strict=True):
        padded[: len(row)] = row
    return ids, lengths


def _check_lengths(width: int, lengths: Array, bundle: Bundle) -> None:
    """Whether the graph was checked for rows of this width and for these numbers of patches in them."""
    fixed, (least, most) = bundle.fixed_keep, bundle.keep_range
    if fixed is not None and width != fixed:
        raise ConfigError(
            f"keep has {width} patches an image, the graph is fixed to {fixed}",
            hint=f"export with --tokens {bundle.token_mode} for any number",
        )
    for number in (width, int(lengths.min())):
        if not least <= number <= most:
            raise ConfigError(
                f"keep has {number} patches an image, the graph was checked for {least} to {most}",
                hint="export with another --profile K",
            )


def _check_patches(ids: Array, lengths: Array, num_patches: int) -> None:
    real = np.arange(ids.shape[1]) < lengths[:, None]
    outside = ids[real & ((ids < 0) | (ids >= num_patches))]
    if outside.size:
        raise ConfigError(
            f"keep has the patch {outside[0]}", hint=f"patches are 0 to {num_patches - 1}, row by row from the top left"
        )
    ordered = np.sort(
        np.where(real, ids.astype(np.int64), np.arange(-ids.shape[1], 0)), axis=1
    )  # in padding, numbers that differ
    twice = ordered[:, 1:][ordered[:, 1:] == ordered[:, :-1]]
    if twice.size:
        raise ConfigError(f"keep has the patch {twice[0]} twice for one image", hint="list each patch once")


def _normalised(images: Array, preprocess: Preprocess, dtype: str, channel_order: ChannelOrder) -> Array:
    height, width = preprocess.image_size
    if dtype == "uint8":
        raise ConfigError(
            f"images are {images.dtype} {images.shape}, and this bundle's graph normalises them itself",
            hint="give the pixels as they are, uint8 (B, H, W, C)",
        )
    if images.ndim != 4 or images.shape[1:] != (preprocess.channels, height, width) or len(images) == 0:
        raise ConfigError(
            f"{images.dtype} images have the shape {images.shape}, not (B, {preprocess.channels}, {height}, {width})",
            hint=(
                f"{images.dtype} is taken as normalised already; give {'a list' if preprocess.pixel_max else 'uint8'}"
                " for images of any size"
            ),
        )
    return np.ascontiguousarray(in_rgb(images, channel_order, axis=1), dtype=dtype)


def _pixels(image: Any, index: int, preprocess: Preprocess, channel_order: ChannelOrder) -> Array:
    """One image, resized and cropped: `(H, W, C)`."""
    try:
        if isinstance(image, np.ndarray):
            if image.size == 0:
                raise ConfigError(f"no pixels in shape {image.shape}")
            return preprocess.crop(image, channel_order)
        if isinstance(image, VideoImage):
            return preprocess.crop(image)
        if is_image(image):
            from PIL import ImageOps

            return preprocess.crop(ImageOps.exif_transpose(image))
    except ConfigError as error:
        raise ConfigError(f"image {index}: {error}", hint=error.hint or _accepted(preprocess)) from error
    except (
        UnreadableImage,
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        IndexError,
        TypeError,
    ) as error:  # Pillow decodes late
        raise ConfigError(f"image {index} cannot be decoded: {' '.join(str(error).split())}") from error
    raise ConfigError(f"image {index} is of type {type(image).__name__}", hint=_accepted(preprocess))


def _accepted(preprocess: Preprocess) -> str:
    return _ACCEPTED if preprocess.pixel_max is None else _ACCEPTED_ARRAYS


def _is_uneven(keep: Keep) -> bool:
    """Whether it is a list of rows of which two differ in length."""
    if isinstance(keep, np.ndarray):
        return False
    try:
        return len({len(row) for row in keep}) > 1  # type: ignore[arg-type]  # numbers have no length
    except TypeError:
        return False


def _as_integers(values: Any, name: str) -> Array:
    try:
        numbers = np.asarray(values)
    except ValueError as error:  # NumPy's word for lists that form no array
        raise ConfigError(
            f"{name} is not a list of whole numbers", hint="give (K,) indices for every image, or a row for each"
        ) from error
    if np.ma.is_masked(values):
        raise ConfigError(f"{name} is an array of which numbers are masked", hint="leave them out")
    if numbers.size and numbers.dtype.kind not in "iu":
        raise ConfigError(f"{name} must be whole numbers, not {numbers.dtype}: {_first_other(numbers)!r:.60}")
    return numbers


def _first_other(values: Array) -> Any:
    """The first of these that is no whole number; where all are, such as in 3.0, the first."""
    items = values.reshape(-1)[:10_000].tolist()
    return next((item for item in items if not isinstance(item, float) or not item.is_integer()), items[0])
