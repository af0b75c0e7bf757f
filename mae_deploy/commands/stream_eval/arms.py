"""What is compared: every frame whole, some frames whole, changed patches with and without their context, a stream.

N patches of side P; K of them are computed of a frame.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mae_deploy.images.read import Array
from mae_deploy.runtime.backbone import Backbone
from mae_deploy.runtime.flops import flops_per_image
from mae_deploy.runtime.selection import Motion
from mae_deploy.runtime.selection.base import Scene
from mae_deploy.runtime.selection.difference import grey
from mae_deploy.runtime.streams.stream import Stream
from mae_deploy.runtime.streams.whole import whole_features


@dataclass(frozen=True, slots=True)
class Answer:
    """An arm's features of the whole frame, each `(1, …)`, and what they cost."""

    features: Mapping[str, Array]
    cost: float
    """Operations as a share of those of a whole frame."""
    whole: bool = False
    """Whether all patches were computed."""


class Arm(ABC):
    """Follows a camera from its first frame on."""

    @abstractmethod
    def __call__(self, frame: Any) -> Answer:
        """The features of the next frame."""


class Whole(Arm):
    """Every frame."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone

    def __call__(self, frame: Any) -> Answer:
        """By the ordinary way of an image."""
        return Answer(self._backbone(frame), 1.0, whole=True)


class Streamed(Arm):
    """A stream as it comes."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def __call__(self, frame: Any) -> Answer:
        """With its refreshes, bypasses and audits."""
        seen = self._stream(frame)
        return Answer(seen, seen.cost, whole=len(seen.keep) == len(seen.age) or seen.snr is not None)


class Changed:
    """The patches that changed by more than a threshold since they were computed; remembers what was."""

    def __init__(self, threshold: float, patch_size: int) -> None:
        self._select = Motion(threshold=threshold, noise=0, hysteresis=1).start()
        self._patch_size = patch_size
        self._computed: Array | None = None

    def __call__(self, seen: Array) -> Array:
        """Their indices `(K,)` in a grey frame `(H, W, 1)`, which counts as computed there."""
        scores = self._select(Scene(pixels=seen, patch_size=self._patch_size, computed=self._computed))
        ids = np.flatnonzero(scores)
        computed = self._computed = seen.copy() if self._computed is None else self._computed
        P, (rows, columns) = self._patch_size, (side // self._patch_size for side in seen.shape[:2])
        row, column = np.divmod(ids, columns)
        shape = (rows, P, columns, P)
        computed.reshape(shape)[row, :, column] = seen.reshape(shape)[row, :, column]
        return ids


class ChangedPatches(Arm):
    """The changed patches alone, and nothing else: neither refreshed nor shifted, and never the whole frame."""

    def __init__(self, backbone: Backbone, threshold: float, *, context: bool) -> None:
        """Begin.

        Args:
            context: they attend to the cached keys and values of all patches, as published; else to one another alone,
                as in a visible-token graph, and their tokens are pasted among those of before.
        """
        self._backbone, self._context = backbone, context
        self._patch_size = backbone.bundle.model["patch_size"]
        self._changed = Changed(threshold, self._patch_size)
        self._cache = backbone.new_cache()
        self._features: dict[str, Array] = {}

    def __call__(self, frame: Any) -> Answer:
        """The first frame is computed whole."""
        backbone, cache = self._backbone, self._cache
        image = backbone.preprocess.converted(frame)
        ids = self._changed(grey(backbone.preprocess.crop_roughly(image))[..., None])
        if not len(ids):
            return Answer(self._features, 0.0)
        if not self._context:
            cache.computed[:] = False
        patches = backbone.preprocess.crop_patches(image, ids, self._patch_size)
        outputs = backbone.update(cache, patches[None], ids)
        self._features = whole_features(outputs, ids, self._features, cache, backbone.bundle.manifest)
        whole = len(ids) == backbone.num_patches
        return Answer(self._features, update_cost(backbone, len(ids), context=self._context), whole=whole)


class Held(Arm):
    """Some frames whole, evenly spread, at a share of them; between them, the features of the last one.

    It is given the true features, so that many shares cost no more than one.
    """

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._due = 1.0
        self._features: Mapping[str, Array] = {}

    def __call__(self, frame: Mapping[str, Array]) -> Answer:
        """`frame` holds its true features."""
        self._due, last = self._due % 1 + self.rate, self._due
        if last < 1:
            return Answer(self._features, 0.0)
        self._features = frame
        return Answer(frame, 1.0, whole=True)


class Costs:
    """What changed patches would cost at several thresholds, found from pixels alone."""

    def __init__(self, backbone: Backbone, thresholds: Sequence[float]) -> None:
        self.thresholds = thresholds
        self._backbone = backbone
        self._rules = [Changed(threshold, backbone.bundle.model["patch_size"]) for threshold in thresholds]
        self._counts: list[list[int]] = [[] for _ in thresholds]

    def add(self, frame: Any) -> None:
        """One frame."""
        preprocess = self._backbone.preprocess
        seen = grey(preprocess.crop_roughly(preprocess.converted(frame)))[..., None]
        for rule, counts in zip(self._rules, self._counts, strict=True):
            counts.append(len(rule(seen)))

    def threshold(self, cost: float, *, context: bool) -> float:
        """The threshold at which they cost so much, between the two nearest; the least or the largest, where none
        does.
        """
        found = [
            float(np.mean([update_cost(self._backbone, count, context=context) for count in counts]))
            for counts in self._counts
        ]
        # np.interp wants ascending costs, and those of larger thresholds are lower.
        return float(np.exp(np.interp(cost, found[::-1], np.log(self.thresholds[::-1]))))


def update_cost(backbone: Backbone, count: int, *, context: bool) -> float:
    """Operations of so many patches, as a share of those of a whole frame."""
    if not count:
        return 0.0
    manifest = backbone.bundle.manifest
    graph: Any = manifest if context else {**manifest, "token_mode": "visible"}
    whole = flops_per_image(manifest, backbone.num_patches) or 1
    return (flops_per_image(graph, count) or 0) / whole
