"""Features and classes of images, batch by batch; those that cannot be read are reported."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from mae_deploy.errors import CheckFailed, ConfigError
from mae_deploy.images.read import Array, readable
from mae_deploy.runtime.backbone import Backbone, Features
from mae_deploy.runtime.engines.base import results_in_order
from mae_deploy.runtime.inputs import Keep
from mae_deploy.seeding import random_patches

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True, slots=True)
class Unreadable:
    """An image file that was left out."""

    path: Path
    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class Batch(Generic[Item]):
    """Features of some images."""

    items: list[Item]
    """Those that could be read."""
    features: Features
    left_out: list[tuple[Item, str]]
    """Those between the batch before and the end of this one that could not be read, and why."""


def batches(
    backbone: Backbone,
    items: Iterable[Item],
    read: Callable[[Item], Array],
    *,
    batch_size: int,
    keep: Callable[[list[Item]], Keep | None] = lambda _: None,
    outputs: Sequence[str] | None = None,
) -> Iterator[Batch[Item]]:
    """Features of images, batch by batch, which the engine computes while the images of the next one are decoded; of
    the last one, none may have been readable.

    Args:
        read: an image as `Preprocess.crop` gives it, so that a batch of whole photos is never held; called in a few
            threads.
        keep: the visible patches of a batch, as for `Backbone`.

    Raises:
        ConfigError: `keep` or `outputs` do not fit the bundle.
    """

    def run(found: list[tuple[Item, Array]], left_out: list[tuple[Item, str]]) -> Callable[[], Batch[Item]]:
        items = [item for item, _ in found]
        if not found:
            return lambda: Batch(items, Features(), left_out)
        pixels = np.stack([pixels for _, pixels in found])
        wait = backbone.start_cropped(pixels, keep(items), outputs=outputs)
        return lambda: Batch(items, wait(), left_out)

    def started() -> Iterator[Callable[[], Batch[Item]]]:
        found: list[tuple[Item, Array]] = []
        left_out: list[tuple[Item, str]] = []

        def leave_out(item: Item, reason: str) -> None:
            left_out.append((item, reason))

        for item, pixels in readable(items, read, leave_out, ahead=batch_size):
            found.append((item, pixels))
            if len(found) == batch_size:
                yield run(found, left_out)
                found, left_out = [], []
        yield run(found, left_out)

    yield from results_in_order(started(), backbone.engine.in_flight)


class Predictions:
    """Features of image files, batch by batch: iterate over `(paths, features)`, then look at `unreadable`."""

    def __init__(
        self,
        backbone: Backbone,
        paths: Sequence[str | os.PathLike[str]],
        *,
        batch_size: int | None = None,
        keep: Keep | None = None,
        num_keep: int | None = None,
        seed: int = 0,
        outputs: Sequence[str] | None = None,
        start: int = 0,
    ) -> None:
        """Read and run `paths` in batches of `batch_size`: by default the graph's fixed batch, or 8.

        Args:
            keep: the visible patches of every image, as for `Backbone`: `(K,)`.
            num_keep: instead of `keep`, this many patches of each image at random. The choice depends on `seed` and the
                file's place in `paths` alone: neither the batch size nor an unreadable file changes it.
            outputs: names of the outputs to compute; None for all.
            start: go on with the path of this number, where an earlier call has come to.

        Raises:
            ConfigError: no paths, a batch size below 1, or both `keep` and `num_keep`, or one that the bundle cannot
                take.
        """
        batch_size = (backbone.bundle.fixed_batch or 8) if batch_size is None else batch_size
        if not paths or batch_size < 1:
            raise ConfigError(f"nothing to predict: {len(paths)} images in batches of {batch_size}")
        if num_keep is not None:
            check_num_keep(backbone, keep, num_keep)
        self.unreadable: list[Unreadable] = []
        self._backbone, self._paths, self._batch_size = backbone, [Path(path) for path in paths], batch_size
        self._keep, self._num_keep, self._seed, self._outputs = keep, num_keep, seed, outputs
        self._start = start
        self.done = start
        """How many of `paths` are behind us, those that could not be read too."""

    def __iter__(self) -> Iterator[tuple[list[Path], Features]]:
        """Yield the paths that could be read and their features.

        Raises:
            CheckFailed: not one image could be read.
            ConfigError: `keep` or `outputs` do not fit the bundle.
        """
        self.unreadable.clear()
        self.done = self._start
        preprocess, places = self._backbone.preprocess, range(self._start, len(self._paths))
        for batch in batches(
            self._backbone,
            places,
            lambda place: preprocess.crop(preprocess.read(self._paths[place])),
            batch_size=self._batch_size,
            keep=self._kept,
            outputs=self._outputs,
        ):
            behind = [*batch.items, *(place for place, _ in batch.left_out)]
            self.done = max(behind, default=self.done - 1) + 1
            for place, reason in batch.left_out:
                path = self._paths[place]
                self.unreadable.append(Unreadable(path, reason.removeprefix(f"{path}: ")))
            if batch.items:
                yield [self._paths[place] for place in batch.items], batch.features
        if len(self.unreadable) == len(self._paths):
            first = self.unreadable[0]
            raise CheckFailed(
                f"none of {len(self._paths)} images could be read; the first: {first.path}: {first.reason}"
            )

    def _kept(self, places: list[int]) -> Keep | None:
        if self._num_keep is None:
            return self._keep
        return random_patches(self._backbone.num_patches, self._num_keep, places, self._seed)


def top_k(logits: Array, class_names: Sequence[str] | None, k: int = 5) -> list[list[tuple[str, float]]]:
    """The `k` most likely classes of each row of `logits (B, classes)` with their softmax probabilities, best first.

    Without names a class is its index; with fewer than `k` classes all are given.

    Raises:
        ConfigError: `k` below 1, or another number of names than classes.
        CheckFailed: logits that are not finite.
    """
    names, (classes, shares) = class_labels(class_names, logits.shape[-1]), rank(logits, k)
    return [
        [(names[int(index)], float(share)) for index, share in zip(row, of_row, strict=True)]
        for row, of_row in zip(classes.tolist(), shares.tolist(), strict=True)
    ]


def rank(logits: Array, k: int) -> tuple[Array, Array]:
    """The `k` most likely classes of each row of `logits (B, classes)` and their softmax probabilities, best first: two
    arrays `(B, k)`.

    Raises:
        ConfigError: `k` below 1.
        CheckFailed: logits that are not finite.
    """
    if k < 1:
        raise ConfigError(f"top-k needs k of at least 1, not {k}")
    if not np.isfinite(logits).all():
        raise CheckFailed("the logits have NaN or infinite values", hint="run 'mae-deploy verify' on the bundle")
    exponents = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    probabilities = exponents / exponents.sum(axis=1, keepdims=True)
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, :k]
    return best, np.take_along_axis(probabilities, best, axis=1)


def class_scores(features: Mapping[str, Array]) -> Array | None:
    """Logits `(B, classes)`, or what stands for them where there are probabilities only; None without either."""
    if "logits" in features or "probs" not in features:
        return features.get("logits")
    scores: Array = np.log(np.maximum(features["probs"].astype(np.float64), np.finfo(np.float64).tiny))
    return scores


def class_labels(class_names: Sequence[str] | None, num_classes: int) -> Sequence[str]:
    """The names of the classes; without, their numbers.

    Raises:
        ConfigError: another number of names than classes.
    """
    if class_names is not None and len(class_names) != num_classes:
        raise ConfigError(f"{len(class_names)} class names for {num_classes} logits")
    return class_names if class_names is not None else [str(index) for index in range(num_classes)]


def check_num_keep(backbone: Backbone, keep: Keep | None, num_keep: int) -> None:
    """Whether a bundle takes so many patches of an image.

    Raises:
        ConfigError: it does not, or `keep` is given too.
    """
    least, most = backbone.bundle.keep_range
    if keep is not None:
        raise ConfigError("keep and num_keep exclude one another")
    if backbone.bundle.token_mode == "full":
        raise ConfigError(
            "this bundle's graph takes every patch, so num_keep cannot be used", hint="export with --tokens visible"
        )
    if not least <= num_keep <= most:
        raise ConfigError(
            f"num_keep {num_keep} cannot be used",
            hint=f"this graph takes {most if least == most else f'{least} to {most}'} patches",
        )
