"""How far two frames differ, patch by patch."""

from __future__ import annotations

import numpy as np

from mae_deploy.images.read import Array


def grey(pixels: Array) -> Array:
    """The mean of the channels, float32 `(H, W)`; channel by channel, since NumPy's mean over so short an axis takes 60
    times as long.
    """
    total: Array = pixels[..., 0].astype(np.float32)
    for channel in range(1, pixels.shape[2]):
        total += pixels[..., channel]
    total /= pixels.shape[2]
    return total


def block_difference(first: Array, second: Array, patch_size: int) -> Array:
    """The mean absolute difference of two grey images `(H, W)` in each patch, `(N,)`."""
    P, (rows, columns) = patch_size, (side // patch_size for side in first.shape)
    difference = first - second
    np.abs(difference, out=difference)
    by_rows = difference.reshape(rows, P, columns * P).sum(axis=1)
    found: Array = by_rows.reshape(rows * columns, P).sum(axis=1) / np.float32(P * P)
    return found
