"""Features and classes for image files, batch by batch; those that cannot be read are reported."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from mae_deploy.errors import CheckFailed, ConfigError
from mae_deploy.images.read import Array, readable
from mae_deploy.runtime.backbone import Backbone, Features
from mae_deploy.runtime.engines.base import results_in_order
from mae_deploy.runtime.inputs import Keep
from mae_deploy.seeding import random_patches


@dataclasses.dataclass(frozen=True, slots=True)
class Unreadable:
    """An image file that was left out."""

    path: Path
    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class _Batch:
    paths: list[Path]
    """Of those that could be read."""
    features: Features
    left_out: list[Unreadable]
    """Between the batch before and the end of this one."""
    done: int


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
            _check_num_keep(backbone, keep, num_keep)
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
        for batch in results_in_order(self._started(), self._backbone.engine.in_flight):
            self.done = batch.done
            self.unreadable += batch.left_out
            if batch.paths:
                yield batch.paths, batch.features
        if len(self.unreadable) == len(self._paths):
            first = self.unreadable[0]
            raise CheckFailed(
                f"none of {len(self._paths)} images could be read; the first: {first.path}: {first.reason}"
            )

    def _started(self) -> Iterator[Callable[[], _Batch]]:
        """Batches that the engine computes while the images of the next one are decoded; the last may have none."""
        preprocess = self._backbone.preprocess
        places = range(self._start, len(self._paths))
        images: list[tuple[int, Array]] = []  # cropped at once: a batch of whole photos would not fit a small device
        left_out: list[Unreadable] = []

        def leave_out(index: int, reason: str) -> None:
            path = self._paths[index]
            left_out.append(Unreadable(path, reason.removeprefix(f"{path}: ")))

        for index, pixels in readable(
            places,
            lambda index: preprocess.crop(preprocess.read(self._paths[index])),
            leave_out,
            ahead=self._batch_size,
        ):
            images.append((index, pixels))
            if len(images) == self._batch_size:
                yield self._run(images, left_out, index + 1)
                images, left_out = [], []
        yield self._run(images, left_out, len(self._paths))

    def _run(self, images: list[tuple[int, Array]], left_out: list[Unreadable], done: int) -> Callable[[], _Batch]:
        indices = [index for index, _ in images]
        paths = [self._paths[index] for index in indices]
        if not images:
            return lambda: _Batch(paths, Features(), left_out, done)
        keep = self._keep
        if self._num_keep is not None:
            keep = random_patches(self._backbone.num_patches, self._num_keep, indices, self._seed)
        pixels = np.stack([pixels for _, pixels in images])
        wait = self._backbone.start_cropped(pixels, keep, outputs=self._outputs)
        return lambda: _Batch(paths, wait(), left_out, done)


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


def _check_num_keep(backbone: Backbone, keep: Keep | None, num_keep: int) -> None:
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
