"""A part of the camera's frame: boxes, a polygon or a mask, in pixels or in shares of the frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mae_deploy.errors import ConfigError
from mae_deploy.images.read import Array
from mae_deploy.runtime.selection.base import Scene, Selection, Selector


@dataclass(frozen=True, slots=True)
class Region(Selection):
    """The patches that a part of the frame touches; none where the model sees nothing of it."""

    where: Any
    """A box `(left, top, right, bottom)`, a list of boxes, or a polygon `((x, y), …)` of three points or more, in
    pixels of the frame, or in shares of it where no number is above 1; or a bool mask `(H, W)` of the frame's size."""

    def start(self) -> Selector:
        """Found once for each size of frame."""
        found: dict[tuple[int, ...], Array] = {}

        def select(scene: Scene) -> Array:
            size = scene.frame_size or scene.pixels.shape[:2]
            key = (*size, *scene.pixels.shape)
            if key not in found:
                found.clear()
                found[key] = _touched(as_mask(self.where, (size[0], size[1])), scene)
            return found[key]

        return select


def as_mask(where: Any, size: tuple[int, int]) -> Array:
    """A region as bool `(H, W)`; see `Region.where`.

    Raises:
        ConfigError: it is none, or a mask of another size, or no part of it lies in the frame.
    """
    given = np.asarray(where)
    if given.dtype == bool:
        if given.shape != size:
            raise ConfigError(f"a mask of {given.shape} does not fit a frame of {size}", hint="give rows, then columns")
        mask = given
    elif given.dtype.kind in "iuf" and given.ndim == 1 and len(given) == 4:
        mask = _box(given, size)
    elif given.dtype.kind in "iuf" and given.ndim == 2 and given.shape[1] == 4 and len(given):
        mask = np.logical_or.reduce([_box(box, size) for box in given])
    elif given.dtype.kind in "iuf" and given.ndim == 2 and given.shape[1] == 2 and len(given) >= 3:
        mask = _polygon(_in_pixels(given, size), size)
    else:
        raise ConfigError(
            f"a region of shape {given.shape} is none",
            hint="give a box (left, top, right, bottom), boxes, a polygon of (x, y), or a bool mask",
        )
    if not mask.any():
        raise ConfigError(f"no part of the region lies in a frame of {size[1]}x{size[0]}: {where}")
    return mask


def _box(box: Array, size: tuple[int, int]) -> Array:
    left, top, right, bottom = _in_pixels(box.reshape(2, 2), size).reshape(4)
    if not (left < right and top < bottom):
        raise ConfigError(f"the box {box.tolist()} is empty", hint="give left, top, right, bottom")
    mask = np.zeros(size, bool)
    rows = slice(max(0, int(np.floor(top))), max(0, int(np.ceil(bottom))))
    columns = slice(max(0, int(np.floor(left))), max(0, int(np.ceil(right))))
    mask[rows, columns] = True
    return mask


def _in_pixels(points: Array, size: tuple[int, int]) -> Array:
    """Points `(x, y)`; they are shares of the frame where no number is above 1."""
    if points.max() > 1:
        return points.astype(np.float64)
    return points * np.array([size[1], size[0]], np.float64)


def _polygon(points: Array, size: tuple[int, int]) -> Array:
    """The pixels whose middle lies inside, by the even-odd rule; of a polygon without any, those under its corners."""
    y, x = np.mgrid[0.5 : size[0], 0.5 : size[1]]
    mask = np.zeros(size, bool)
    for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
        if y0 != y1:
            crosses = (y0 <= y) != (y1 <= y)
            mask ^= crosses & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
    if not mask.any():
        corners = np.floor(points).astype(int)
        x, y = corners[((corners >= 0) & (corners < (size[1], size[0]))).all(axis=1)].T
        mask[y, x] = True
    return mask


def _touched(mask: Array, scene: Scene) -> Array:
    if scene.patches is not None:
        ids = scene.patches(mask)
        touched = np.zeros(scene.num_patches)
        if ids is not None:
            touched[ids] = 1
        return touched
    rows, columns = scene.grid
    P = scene.patch_size
    found: Array = mask.reshape(rows, P, columns, P).any(axis=(1, 3)).reshape(-1).astype(np.float64)
    return found
