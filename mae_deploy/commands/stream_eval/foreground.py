"""What a background subtractor finds in a fixed camera's frames: labels that no one had to draw."""

from __future__ import annotations

import numpy as np

from mae_deploy.images.read import Array

_SAMPLED = 31
"""Frames, spread over the video, whose median the background begins with."""
_LEAST = 14.0
"""Grey levels from which a pixel is foreground, where its own noise does not ask for more."""
_TIMES = 4.0
"""It must also be so many times the pixel's usual difference."""
_SHARE = 0.15
"""Share of a patch's pixels from which the patch is."""


def foreground(greys: Array, patch_size: int) -> Array:
    """Which patches show something in front of the background: bool `(F, N)` of grey frames `(F, H, W)`.

    The background begins with the median of frames from the whole video, so that nothing that stands at the beginning
    leaves a ghost, and follows as a running median: where a pixel is background, it moves by one grey level towards
    the frame (Manzanera and Richefeu, 2004, "A robust and computationally efficient motion detection algorithm based on
    sigma-delta background estimation").
    """
    frames, height, width = greys.shape
    sampled = greys[np.linspace(0, frames - 1, min(frames, _SAMPLED)).round().astype(int)].astype(np.float32)
    background = np.median(sampled, axis=0)
    noise = np.median(np.abs(sampled - background), axis=0)
    found = np.zeros((frames, height, width), bool)
    for index, grey in enumerate(greys):
        difference = np.abs(grey - background)
        found[index] = difference > np.maximum(_LEAST, _TIMES * noise)
        background += np.where(found[index], 0, np.sign(grey - background))
    rows, columns = height // patch_size, width // patch_size
    shares = found.reshape(frames, rows, patch_size, columns, patch_size).mean(axis=(2, 4))
    patches: Array = (shares > _SHARE).reshape(frames, rows * columns)
    return patches
