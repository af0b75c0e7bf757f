"""Rules that look at other things than motion: when, what the last frame's tokens say, and how many."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mae_deploy.errors import ConfigError
from mae_deploy.images.read import Array
from mae_deploy.runtime.selection.base import Scene, Selection, Selector, count, largest, share


@dataclass(frozen=True, kw_only=True, slots=True)
class Saliency(Selection):
    """The patches whose tokens at the last frame were farthest from the mean of all; all before there are tokens."""

    keep: float = 0.25
    """How many, as a share of all."""

    def __post_init__(self) -> None:
        share(self.keep, "keep")

    def start(self) -> Selector:
        """It remembers nothing."""
        return self._select

    def _select(self, scene: Scene) -> Array:
        if scene.tokens is None:
            return np.ones(scene.num_patches)
        distance = np.linalg.norm(scene.tokens - scene.tokens.mean(axis=0), axis=1)
        return largest(distance / (distance.max() or 1) + 1e-6, max(1, round(self.keep * len(distance))))


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid(Selection):
    """Every `step`-th patch of every `step`-th row, moved on by one at each frame: after `step * step` frames, all."""

    step: int = 2

    def __post_init__(self) -> None:
        count(self.step, "step")

    def start(self) -> Selector:
        """It counts the frames that it is asked about."""
        asked = 0

        def select(scene: Scene) -> Array:
            nonlocal asked
            down, right = divmod(asked % self.step**2, self.step)
            asked += 1
            chosen = np.zeros(scene.grid)
            chosen[down :: self.step, right :: self.step] = 1
            return chosen.reshape(-1)

        return select


@dataclass(frozen=True, kw_only=True, slots=True)
class Random(Selection):
    """A share of the patches, others at each frame."""

    keep: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        share(self.keep, "keep")

    def start(self) -> Selector:
        """The same patches for the same seed."""
        rng = np.random.default_rng(self.seed)

        def select(scene: Scene) -> Array:
            N = scene.num_patches
            chosen = np.zeros(N)
            chosen[rng.permutation(N)[: max(1, round(self.keep * N))]] = 1
            return chosen

        return select


@dataclass(frozen=True, kw_only=True, slots=True)
class Oldest(Selection):
    """The share of the patches that was not computed for longest: over `1 / keep` frames, all in turn."""

    keep: float = 0.1

    def __post_init__(self) -> None:
        share(self.keep, "keep")

    def start(self) -> Selector:
        """It remembers nothing."""
        return self._select

    def _select(self, scene: Scene) -> Array:
        if scene.age is None:
            return np.ones(scene.num_patches)
        age = scene.age / max(1, int(scene.age.max()))
        return largest(age, max(1, round(self.keep * len(age))))


@dataclass(frozen=True, slots=True)
class Every(Selection):
    """All patches at every `frames`-th frame, the first one included, and none between."""

    frames: int

    def __post_init__(self) -> None:
        count(self.frames, "frames")

    def start(self) -> Selector:
        """It goes by the frame's number."""
        return lambda scene: np.full(scene.num_patches, float(scene.index % self.frames == 0))


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget(Selection):
    """Of what another rule wants, what matters most, up to a number of patches."""

    of: Selection
    at_most: float
    """A number of patches, or below 1 a share of all. What is left out still differs at the next frame."""

    def __post_init__(self) -> None:
        if not self.at_most > 0 or (self.at_most >= 1 and self.at_most != int(self.at_most)):
            raise ConfigError(f"at_most must be a number of patches, or a share above 0, not {self.at_most}")

    def start(self) -> Selector:
        """The other rule is asked at every frame."""
        select = self.of.start()

        def limited(scene: Scene) -> Array:
            N = scene.num_patches
            most = int(self.at_most) if self.at_most >= 1 else max(1, round(self.at_most * N))
            return largest(select(scene), most)

        return limited
