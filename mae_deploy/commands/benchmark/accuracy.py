"""What dropping patches costs: features of some patches against those of all, and top-1, on real images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mae_deploy.commands.benchmark.rows import BenchmarkRow, LoadedGraph
from mae_deploy.errors import CheckFailed
from mae_deploy.images.find import find_images
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.images.read import Array, readable
from mae_deploy.progress import notice
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.cache import runner
from mae_deploy.runtime.engines.base import run_in_chunks
from mae_deploy.runtime.inputs import first_frames, pixel_batch
from mae_deploy.runtime.manifest import IMAGES
from mae_deploy.seeding import random_patches

FEATURES = ("pooled", "cls")
"""The outputs that are compared; the first that a graph has."""


_CHUNK = 8
"""Images a call."""


@dataclass(frozen=True, slots=True)
class Accuracy:
    """What a graph is worth at one number of patches."""

    cosine: float | None = None
    """Mean over the images of the cosine with the features of all patches; None where those are not available, or
    without features."""
    top1: float | None = None
    """Share of the images whose most likely class is the right one; None without logits or labels."""


class AccuracyCheck:
    """Measures accuracy on the images of a folder, else on each bundle's golden samples."""

    def __init__(self, folder: Path | None, num_images: int, seed: int) -> None:
        """Find the images.

        Raises:
            ConfigError: no image is there.
        """
        self._photos = Photos(folder, num_images) if folder is not None else None
        self._seed = seed
        self._outputs: dict[tuple[LoadedGraph, int | None], dict[str, Array]] = {}
        self._references: dict[tuple[str, ...], Array] = {}

    @property
    def source(self) -> str:
        """Where the images come from."""
        return "golden samples" if self._photos is None else self._photos.source

    def accuracies(self, rows: Iterable[BenchmarkRow], after_row: Callable[[], object]) -> dict[BenchmarkRow, Accuracy]:
        """The accuracy of every row; rows that differ by the batch size alone are computed once.

        Raises:
            CheckFailed: not one image can be read.
        """
        found = {}
        # Graphs that can be given every patch come first, those in FP32 before the others: they may be the reference of
        # the rest.
        for row in sorted(rows, key=lambda row: (not row.loaded.takes_all, row.loaded.precision != "fp32")):
            bundle = row.subject.bundle
            found[row] = self._accuracy(row.loaded, row.keep, bundle) if bundle is not None else Accuracy()
            after_row()
        return found

    def _accuracy(self, loaded: LoadedGraph, keep: int | None, bundle: Bundle) -> Accuracy:
        outputs = self._run(loaded, keep, bundle)
        features = next((name for name in FEATURES if name in outputs), None)
        reference = self._reference(loaded, bundle, features) if features is not None else None
        labels = self._labels(bundle)
        return Accuracy(
            cosine=(
                _mean_cosine(outputs[features], reference) if features is not None and reference is not None else None
            ),
            top1=float((outputs[bundle.class_output or ""].argmax(1) == labels).mean()) if labels is not None else None,
        )

    def _reference(self, loaded: LoadedGraph, bundle: Bundle, features: str) -> Array | None:
        """The features of all patches: by the first graph of the same weights and images that can be given them, in
        FP32 where there is one.
        """
        subject = loaded.subject
        shared = (_weights(bundle), features, hashlib.sha256(self._pixels(bundle).tobytes()).hexdigest())
        if shared not in self._references and loaded.takes_all:
            self._references[shared] = self._run(
                loaded, subject.num_patches if subject.keep is not None else None, bundle
            )[features]
        return self._references.get(shared)

    def _run(self, loaded: LoadedGraph, keep: int | None, bundle: Bundle) -> dict[str, Array]:
        """Features and logits of all images, as far as the graph has them."""
        if (loaded, keep) not in self._outputs:
            names = [name for name in (*FEATURES, bundle.class_output) if name in bundle.output_names]
            if bundle.token_mode == "cached" and self._photos is None:  # golden samples are streams, not images
                names = []
            self._outputs[loaded, keep] = self._compute(loaded, keep, bundle, names) if names else {}
        return self._outputs[loaded, keep]

    def _compute(self, loaded: LoadedGraph, keep: int | None, bundle: Bundle, names: Sequence[str]) -> dict[str, Array]:
        subject, pixels = loaded.subject, self._pixels(bundle)
        ids_keep = None if keep is None else random_patches(subject.num_patches, keep, range(len(pixels)), self._seed)
        size = subject.batch[0] if subject.batch is not None else _CHUNK
        batch = None if loaded.engine.profiles else size  # None: what the engine's profiles hold
        parts = []
        for start in range(0, len(pixels), size):
            images = pixels[start : start + size]
            if self._photos is not None:
                images = pixel_batch(images, bundle.preprocess, bundle.image_dtype)
            ids = None if ids_keep is None else ids_keep[start : start + len(images)]
            if ids is not None and bundle.token_mode == "cached":
                inputs = first_frames(images, ids, bundle)
            else:
                inputs = subject.feed(images, ids)
            runs = runner(loaded.engine, bundle.manifest)
            parts.append(run_in_chunks(runs, inputs, batch=batch, outputs=names))
        return {name: np.concatenate([part[name] for part in parts]) for name in names}

    def _pixels(self, bundle: Bundle) -> Array:
        """Photos, uint8 `(S, H, W, C)`, or golden samples as the graph takes them."""
        if self._photos is not None:
            return self._photos.read(bundle.preprocess)[0]
        return bundle.golden()[IMAGES]

    def _labels(self, bundle: Bundle) -> Array | None:
        return self._photos.labels(bundle) if self._photos is not None else None


class Photos:
    """The images of a folder, decoded once for each preprocessing."""

    def __init__(self, folder: Path, num_images: int) -> None:
        found = find_images(folder)
        count = min(num_images, len(found))
        self._folder = folder
        # Spread over the folder, so that not one class alone is seen.
        self._paths = [found[index * len(found) // count] for index in range(count)]
        self._read: dict[Preprocess, tuple[Array, list[Path]]] = {}
        self._reported: set[str] = set()

    @property
    def source(self) -> str:
        """How many images of which folder."""
        return f"{len(self._paths)} images of {self._folder}"

    def read(self, preprocess: Preprocess) -> tuple[Array, list[Path]]:
        """Pixels, uint8 `(S, H, W, C)`, and the files that they are from."""
        if preprocess not in self._read:
            found = dict(
                readable(
                    self._paths,
                    lambda path: preprocess.crop(preprocess.read(path)),
                    lambda _, reason: self._say("skipped", reason),
                )
            )
            if not found:
                raise CheckFailed(f"none of {self.source} can be read")
            self._read[preprocess] = np.stack(list(found.values())), list(found)
        return self._read[preprocess]

    def labels(self, bundle: Bundle) -> Array | None:
        """The class of each image, by the name of its folder below ours; None without logits, or if one is not a class
        of the bundle.
        """
        classes = bundle.class_names
        if classes is None or bundle.class_output is None:
            return None
        paths = self.read(bundle.preprocess)[1]
        below = self._folder.is_dir()
        folders = [path.relative_to(self._folder).parts[0] if below else path.parent.name for path in paths]
        if strangers := [name for name in folders if classes.count(name) != 1]:
            what = "the name of two classes" if strangers[0] in classes else "not named after a class"
            self._say("no top-1:", f"'{strangers[0]}' of {self._folder} is {what} of {bundle.path}")
            return None
        return np.asarray([classes.index(name) for name in folders])

    def _say(self, what: str, text: str) -> None:
        if text not in self._reported:
            self._reported.add(text)
            notice(what, text)


def _weights(bundle: Bundle) -> str:
    """What two bundles of the same weights have in common: the record of their checkpoint."""
    checkpoint = bundle.manifest["provenance"].get("checkpoint", str(bundle.path))
    return json.dumps([bundle.model, checkpoint], sort_keys=True, default=str)


def _mean_cosine(found: Array, reference: Array) -> float | None:
    """The mean of the cosines of two lists of vectors `(S, D)`; None where a value is not finite or a vector is
    zero.
    """
    a_SD, b_SD = found.astype(np.float64), reference.astype(np.float64)
    norms_S = np.linalg.norm(a_SD, axis=1) * np.linalg.norm(b_SD, axis=1)
    if not (np.isfinite(norms_S) & (norms_S > 0)).all():
        return None
    return float(np.clip(np.einsum("sd,sd->s", a_SD, b_SD) / norms_S, -1, 1).mean())
