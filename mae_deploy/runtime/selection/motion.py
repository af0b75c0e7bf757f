"""What has changed since it was computed: block differences against a threshold of each patch's own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mae_deploy.errors import ConfigError
from mae_deploy.images.read import Array
from mae_deploy.runtime.selection.base import Scene, Selection, Selector
from mae_deploy.runtime.selection.difference import block_difference

_RISE, _FALL = 0.05, 0.2
"""How fast a patch's noise follows a difference above and below it: motion is rare and large, quiet is the rule."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Motion(Selection):
    """Patches whose mean absolute grey difference to what was last computed of them exceeds a threshold.

    Compared with the last *computed* pixels, not with the last frame, so that slow change is seen once it has added up.
    """

    threshold: float = 6.0
    """The least difference that counts, from 0 to 255."""
    noise: float = 1.5
    """It counts only above so many times the patch's own noise, the usual difference between two frames there."""
    hysteresis: float = 0.6
    """A patch that was taken at the last frame is taken above this share of its threshold."""
    dilation: int = 0
    """Take the patches around as well, so many in each direction."""

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise ConfigError(f"threshold must be above 0, not {self.threshold}")
        if self.noise < 0 or self.dilation < 0:
            raise ConfigError(f"noise and dilation must be at least 0, not {self.noise} and {self.dilation}")
        if not 0 < self.hysteresis <= 1:
            raise ConfigError(f"hysteresis must be above 0 and at most 1, not {self.hysteresis}")

    def start(self) -> Selector:
        """Each patch's noise is learned from the frames; before the second one it is 0."""
        return _MotionOfCamera(self)


class _MotionOfCamera:
    def __init__(self, rule: Motion) -> None:
        self._rule = rule
        self._last: Array | None = None
        self._noise: Array | None = None
        self._taken: Array | None = None

    def __call__(self, scene: Scene) -> Array:
        """All patches before anything was computed; then each one's difference over its threshold."""
        rule, means, difference = self._rule, scene.grey, scene.difference
        if self._last is None or self._last.shape != means.shape:
            self._noise = self._taken = None
        else:
            self._learn(block_difference(means, self._last, scene.patch_size))
        self._last = means
        if difference is None:
            self._taken = None
            return np.ones(scene.num_patches)
        threshold = np.full(scene.num_patches, rule.threshold * scene.ease)
        if self._noise is not None:
            threshold = np.maximum(threshold, rule.noise * self._noise)
        if self._taken is not None:
            threshold[self._taken] *= rule.hysteresis
        ratio = difference / threshold
        self._taken = ratio > 1
        return dilated(np.where(self._taken, ratio, 0), scene.grid, rule.dilation)

    def _learn(self, difference: Array) -> None:
        if self._noise is None:
            self._noise = np.zeros(len(difference))
        rate = np.where(difference > self._noise, _RISE, _FALL)
        self._noise += rate * (difference - self._noise)


def dilated(scores: Array, grid: tuple[int, int], by: int) -> Array:
    """Scores `(N,)`, each spread to the patches around it, so many in each direction."""
    if by == 0:
        return scores
    rows, columns = grid
    padded = np.pad(scores.reshape(grid), by)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * by + 1, 2 * by + 1))
    found: Array = windows.max(axis=(2, 3)).reshape(rows * columns)
    return found
