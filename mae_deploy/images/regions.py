"""Which patches of the input a region of an image falls on, under the crop and resize that the image goes through."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mae_deploy.errors import ConfigError
from mae_deploy.images.arrays import Array
from mae_deploy.images.preprocess import Preprocess

Region = Array | Sequence[float] | Sequence[Sequence[float]]
"""A box, several, or a mask; see `patches_of`."""

_ACCEPTED = "a region is a box (left, top, right, bottom) in pixels, a list of boxes, or a mask of the image's (H, W)"


def patches_of(preprocess: Preprocess, patch_size: int, image_shape: Sequence[int], region: Region) -> Array | None:
    """The patches that see any of a region, in ascending order: int64 `(K,)`; None where none does, because the region
    is empty or in a part of the image that the crop hides.

    Args:
        image_shape: the array's shape, `(H, W)` or `(H, W, C)`.
        region: a box `(left, top, right, bottom)` in the image's pixels, where right and bottom are no part of it;
            several boxes `(n, 4)`, one box a row; or a mask `(H, W)`, which is not 0 in the region. What is outside of
            the image is passed over.

    Raises:
        ConfigError: neither a box nor a mask of this image, or a box that ends before it begins.
    """
    height, width = (int(side) for side in image_shape[:2])
    placed = preprocess.place((width, height))
    rows, columns = (
        _edges(preprocess.image_size[1 - axis], patch_size, placed.part[axis::2], placed.size[axis], placed.box[axis])
        for axis in (1, 0)
    )
    values = np.asarray(region)
    if values.size == 0:
        return None
    if values.shape == (height, width):
        seen = _under_mask(values != 0, rows, columns)
    elif values.ndim in (1, 2) and values.shape[-1] == 4:
        boxes = _checked(values.reshape(-1, 4))
        seen = np.any([np.outer(_within(rows, box[1::2]), _within(columns, box[0::2])) for box in boxes], axis=0)
    else:
        raise ConfigError(f"the region has the shape {values.shape} for an image {height}x{width}", hint=_ACCEPTED)
    patches = np.flatnonzero(seen)
    return patches if patches.size else None


def _edges(side: int, patch_size: int, part: tuple[int, ...], resized: int, start: int) -> Array:
    """Where the patches of a row or a column begin in the image, and where the last ends: `(n + 1,)`. Those that lie
    beside the image have no extent.
    """
    inside = start + np.arange(0, side + 1, patch_size)
    edges: Array = np.clip(part[0] + inside * (part[1] - part[0]) / resized, part[0], part[1])
    return edges


def _within(edges: Array, span: Array) -> Array:
    """Which patches a span overlaps: `(n,)`."""
    begin, end = max(span[0], edges[0]), min(span[1], edges[-1])
    overlapped: Array = (edges[1:] > begin) & (edges[:-1] < end) & (begin < end)
    return overlapped


def _under_mask(mask: Array, rows: Array, columns: Array) -> Array:
    """Which patches see a pixel of the mask: `(rows, columns)`."""
    bands = np.stack([mask[begin:end].any(axis=0) for begin, end in _pixels(rows)])
    return np.stack([bands[:, begin:end].any(axis=1) for begin, end in _pixels(columns)], axis=1)


def _pixels(edges: Array) -> list[tuple[int, int]]:
    """The first pixel that a patch sees any of, and the one after the last."""
    first, last = np.floor(edges[:-1]).astype(int), np.ceil(edges[1:]).astype(int)
    return [
        (begin, end) if seen else (0, 0) for begin, end, seen in zip(first, last, edges[1:] > edges[:-1], strict=True)
    ]


def _checked(boxes: Array) -> Array:
    if boxes.dtype.kind not in "iuf" or np.isnan(boxes).any():
        raise ConfigError(f"the box {tuple(boxes[0].tolist())} is not of numbers", hint=_ACCEPTED)
    backwards = boxes[(boxes[:, 2] < boxes[:, 0]) | (boxes[:, 3] < boxes[:, 1])]
    if backwards.size:
        raise ConfigError(f"the box {tuple(backwards[0].tolist())} ends before it begins", hint=_ACCEPTED)
    return boxes
