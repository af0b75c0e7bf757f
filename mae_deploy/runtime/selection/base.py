"""What a rule is: a number for each patch, 0 where it need not be computed, and the larger the more it matters.

A `Selection` says what is wanted and can be written down once for many cameras; `start` makes the `Selector` of one,
which remembers what it saw.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from mae_deploy.errors import ConfigError
from mae_deploy.images.read import Array
from mae_deploy.runtime.selection.difference import block_difference, grey


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What is known of a camera before its next frame is computed. N patches in rows and columns, side P."""

    pixels: Array
    """The frame as the model sees it, `(rows * P, columns * P, C)`, from 0 to 255."""
    patch_size: int
    """P."""
    index: int = 0
    """Number of the frame, from 0."""
    computed: Array | None = None
    """As `pixels`: each patch as it was when it was last computed; None before anything was."""
    computed_grey: Array | None = None
    """The mean of the channels of `computed`, where it is known."""
    age: Array | None = None
    """`(N,)` int: how many frames ago each patch was computed, 1 for the last frame; None before anything was."""
    tokens: Array | None = None
    """`(N, D)`: the patches' tokens of the last frame; None where the model gives none, or before anything was."""
    frame_size: tuple[int, int] | None = None
    """Height and width of the camera's frame, of which `pixels` is what the model sees; None: those of `pixels`."""
    ease: float = 1.0
    """By how much more patches may differ than a rule allows: above 1 where tokens are nearer than they need be."""
    patches: Callable[[Array], Array | None] | None = field(default=None, repr=False)
    """The patches that a part of the camera's frame touches, by its bool mask `(H, W)`, as `Backbone.patches` gives
    them: indices, or None where the model sees nothing of it. None: `pixels` is the whole frame."""

    @cached_property
    def grey(self) -> Array:
        """The mean of the channels of `pixels`, float32 `(rows * P, columns * P)`."""
        return grey(self.pixels)

    @cached_property
    def difference(self) -> Array | None:
        """`(N,)`: the mean absolute grey difference of each patch to what was last computed of it; None before anything
        was.
        """
        if self.computed is None:
            return None
        before = grey(self.computed) if self.computed_grey is None else self.computed_grey
        return block_difference(self.grey, before, self.patch_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.pixels.shape[0] // self.patch_size, self.pixels.shape[1] // self.patch_size

    @property
    def num_patches(self) -> int:
        """N."""
        rows, columns = self.grid
        return rows * columns


Selector = Callable[[Scene], Array]
"""Gives `(N,)`: 0 where a patch need not be computed, else how much it matters."""


class Selection(ABC):
    """A rule; `first | second` takes what either wants, `first & second` what both want."""

    @abstractmethod
    def start(self) -> Selector:
        """The rule for one camera, which has seen nothing yet."""

    def __or__(self, other: Selection) -> Selection:
        return Combined(np.maximum, self, other)

    def __and__(self, other: Selection) -> Selection:
        return Combined(np.minimum, self, other)


@dataclass(frozen=True, slots=True)
class Combined(Selection):
    """Two rules as one; numbers below 0 do not exist, so the larger is either and the smaller is both."""

    join: Callable[[Array, Array], Array]
    first: Selection
    second: Selection

    def start(self) -> Selector:
        """Both are asked at every frame, so that neither misses one."""
        first, second = self.first.start(), self.second.start()
        return lambda scene: self.join(first(scene), second(scene))


def share(value: float, name: str) -> float:
    """A share of the patches, above 0 and at most 1.

    Raises:
        ConfigError: it is not.
    """
    if not 0 < value <= 1:
        raise ConfigError(f"{name} must be above 0 and at most 1, not {value}")
    return value


def count(value: int, name: str) -> int:
    """A whole number from 1 on.

    Raises:
        ConfigError: it is not.
    """
    if value < 1:
        raise ConfigError(f"{name} must be at least 1, not {value}")
    return value


def largest(scores: Array, most: int) -> Array:
    """The scores `(N,)` with all but the `most` largest set to 0; of equal ones, those with the lowest index stay."""
    if np.count_nonzero(scores) <= most:
        return scores
    kept = np.zeros_like(scores)
    ids = np.argsort(-scores, kind="stable")[:most]
    kept[ids] = scores[ids]
    return kept
