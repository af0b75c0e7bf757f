"""`mae-deploy eval`: top-1 and top-5 of a checkpoint or a bundle on labelled images; torch is needed for checkpoints
only.
"""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from mae_deploy.data.class_order import check_distinct, check_order
from mae_deploy.data.sources.base import ImageSource
from mae_deploy.data.sources.open import labelled_val
from mae_deploy.data.sources.pixels import check_pixels
from mae_deploy.data.sources.splits import announce
from mae_deploy.errors import CheckFailed, ConfigError, import_optional
from mae_deploy.evaluation.accuracy import Accuracy
from mae_deploy.evaluation.config import EvalConfig
from mae_deploy.files import atomic_path, refuse_to_overwrite
from mae_deploy.images.read import Array, UnreadableImage
from mae_deploy.models.mask_config import keep_count
from mae_deploy.progress import notice, progress
from mae_deploy.reporting.tables import Column, Table
from mae_deploy.results import Result
from mae_deploy.runtime.backbone import Backbone
from mae_deploy.runtime.manifest import MANIFEST_FILE
from mae_deploy.seeding import random_patches

_BATCH = 64


class Classifier(Protocol):
    """What gives logits for images."""

    description: str
    num_classes: int
    class_names: tuple[str, ...] | None
    num_patches: int
    unreadable: list[str]

    def logits(self, images: ImageSource, keeps: Sequence[int | None]) -> Iterator[tuple[list[Array], Array]]:
        """`(B, classes)` with each number of patches (None: all), and labels `(B,)`, for the images that can be
        read.
        """
        ...


class Counted(NamedTuple):
    """What a classifier gets right."""

    data: dict[str, Any]
    """As `eval --json` prints it."""
    shares: list[Accuracy]
    """Of each share of the patches, image by image."""


def run_eval(config: EvalConfig) -> Result:
    """`count_right`, with a table."""
    data = count_right(config).data
    return Result(data, _class_table(data) if config.keep_ratio is None else _ratio_table(data))


def count_right(config: EvalConfig) -> Counted:
    """Count what a classifier gets right.

    Raises:
        ConfigError: no classifier, no labelled images, classes that are not the classifier's, or numbers of patches
            that it cannot take.
        CheckFailed: no image can be read, or logits that are not numbers.
        MissingDependency: a checkpoint without torch, or an engine or device that is absent.
    """
    if config.confusion is not None:
        refuse_to_overwrite(config.confusion, option="--confusion", file=True)
    classifier: Classifier = _Bundle(config) if (config.model / MANIFEST_FILE).is_file() else _Checkpoint(config)
    images = _images(config.data, config.val_split, classifier)
    counts = [keep_count(classifier.num_patches, ratio) for ratio in config.keep_ratio or (1.0,)]
    found = [Accuracy(classifier.num_classes) for _ in counts]
    for logits, labels in classifier.logits(
        images, [None if count == classifier.num_patches else count for count in counts]
    ):
        for accuracy, scores in zip(found, logits, strict=True):
            accuracy.add(scores, labels)
    first = found[0]
    if first.count == 0:
        raise CheckFailed(f"no readable image in {images.name}")
    names = images.class_names or ()
    if config.confusion is not None:
        _write_confusion(config.confusion, names, first)
    data = {
        "model": str(config.model),
        "on": classifier.description,
        "data": images.name,
        "images": first.count,
        **first.summary(),
        "classes": first.per_class(names),
        "unreadable": classifier.unreadable,
        "confusion": None if config.confusion is None else str(config.confusion),
    }
    if config.keep_ratio is not None:
        data["keep_ratios"] = [
            {"keep_ratio": ratio, "patches": count, **accuracy.summary()}
            for ratio, count, accuracy in zip(config.keep_ratio, counts, found, strict=True)
        ]
    return Counted(data, found)


def _images(data: Path, val_split: str | None, classifier: Classifier) -> ImageSource:
    """The labelled images, their labels in the order of the classifier's logits."""
    check_distinct(classifier.class_names or (), "the classifier", hint="import it again with --class-names FILE")
    images = labelled_val(data, classifier.class_names, val_split)
    announce(data, {"": images})
    found = len(images.class_names or ())
    if found != classifier.num_classes:
        raise ConfigError(
            f"{images.name} has {found} classes, the classifier {classifier.num_classes}, whose names it does not know",
            hint="without names, there must be a folder for each class, in the order of the logits",
        )
    if classifier.class_names is None:
        check_order(images, "the classifier")
    return images


class _Bundle:
    """A bundle on its engine."""

    def __init__(self, config: EvalConfig) -> None:
        self._backbone = Backbone.load(
            config.model, config.engine, device=config.device, threads=config.threads, affinity=config.affinity
        )
        bundle = self._backbone.bundle
        outputs = {entry["name"]: entry for entry in bundle.manifest["graph"]["outputs"]}
        entry = outputs.get(bundle.class_output or "")
        if entry is None:
            raise ConfigError(
                f"{config.model} has no logits and no probs, only {', '.join(bundle.output_names)}",
                hint="export a fine-tuned checkpoint",
            )
        self._output = entry["name"]
        self.description = f"{bundle.precision} on {self._backbone.engine.name}"
        self.num_classes, self.num_patches = int(entry["shape"][-1]), bundle.num_patches
        self.class_names = tuple(bundle.class_names) if bundle.class_names is not None else None
        self.unreadable: list[str] = []
        self._batch_size = config.batch_size or bundle.fixed_batch or _BATCH
        self._seed = config.seed

    def logits(self, images: ImageSource, keeps: Sequence[int | None]) -> Iterator[tuple[list[Array], Array]]:
        """Images are read by a few threads, cropped as the bundle says, and run in batches."""
        self._check(keeps)
        check_pixels(images, self._backbone.preprocess.channels, self._backbone.preprocess.pixel_max)
        labels, numbers = np.asarray(images.labels), itertools.count()
        with self._backbone as backbone, ThreadPoolExecutor() as pool, progress("eval", len(images)) as bar:
            for first in range(0, len(images), self._batch_size):
                indices = range(first, min(first + self._batch_size, len(images)))
                read = [
                    (index, pixels)
                    for index, pixels in zip(
                        indices, pool.map(lambda index: self._read(images, index), indices), strict=True
                    )
                ]
                kept = [(index, pixels) for index, pixels in read if not isinstance(pixels, str)]
                for _, why in read:
                    if isinstance(why, str):
                        _leave_out(self.unreadable, why)
                if kept:
                    pixels, items = np.stack([pixels for _, pixels in kept]), [next(numbers) for _ in kept]
                    ids = [
                        None if keep is None else random_patches(self.num_patches, keep, items, self._seed)
                        for keep in keeps
                    ]
                    found = [
                        backbone.run_cropped(pixels, ids_keep, outputs=[self._output])[self._output].astype(np.float32)
                        for ids_keep in ids
                    ]
                    yield found, labels[[index for index, _ in kept]]
                bar.advance(len(indices))

    def _check(self, keeps: Sequence[int | None]) -> None:
        """Whether the graph takes these numbers of patches."""
        bundle, N = self._backbone.bundle, self.num_patches
        least, most = bundle.keep_range
        if all(least <= (keep or N) <= most for keep in keeps):
            return
        if bundle.token_mode == "full":
            raise ConfigError(
                "--keep-ratio below 1, but this bundle's graph takes whole images", hint="export with --tokens visible"
            )
        taken = f"{most}" if least == most else f"{least} to {most}"
        share = math.ceil(10_000 * most / N) / 10_000  # of which `keep_count` makes no less
        raise ConfigError(
            f"this bundle's graph takes {taken} of {N} patches",
            hint=f"give a share that it takes, such as --keep-ratio {share:g}",
        )

    def _read(self, images: ImageSource, index: int) -> Array | str:
        preprocess = self._backbone.preprocess
        try:
            return preprocess.crop(images.read(index, preprocess.channels, preprocess.pixel_max))
        except UnreadableImage as error:
            return str(error)


class _Checkpoint:
    """A classifier in torch."""

    def __init__(self, config: EvalConfig) -> None:
        self._features = import_optional("mae_deploy.evaluation.features", extra="train")
        loaded = self._features.read_weights(config.model)
        metadata = loaded.metadata
        if metadata.kind != "classifier":
            raise ConfigError(
                f"{config.model} is a {metadata.kind} without a head",
                hint="fine-tune it first, or evaluate it by linprobe or knn",
            )
        self._loaded, self._config = loaded, config
        self.description = f"torch on {self._features.resolve_device(config.device)}"
        self.num_classes, self.num_patches = int(metadata.num_classes or 0), loaded.encoder_config.num_tokens
        self.class_names: tuple[str, ...] | None = metadata.class_names
        self.unreadable: list[str] = []

    def logits(self, images: ImageSource, keeps: Sequence[int | None]) -> Iterator[tuple[list[Array], Array]]:
        """All at once."""
        config = self._config
        source = self._features.classifier_logits(
            self._loaded, config.precision, config.device, keeps=keeps, seed=config.seed
        )
        settings = self._features.FeaturesConfig(
            batch_size=config.batch_size or _BATCH, num_workers=config.num_workers, max_corrupt=len(images)
        )
        found = self._features.extract(source, images, settings, title="eval")
        self.unreadable += found.unreadable
        yield np.split(found.features.numpy(), len(keeps), axis=1), found.labels.numpy()


def _leave_out(unreadable: list[str], line: str) -> None:
    unreadable.append(line)
    notice("left out", line)


def _write_confusion(path: Path, names: tuple[str, ...], accuracy: Accuracy) -> None:
    with atomic_path(path) as aside, aside.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["true class", *names])
        writer.writerows([name, *row] for name, row in zip(names, accuracy.confusion.tolist(), strict=True))


def _class_table(data: dict[str, Any]) -> Table:
    """A row for each class, and the whole below."""
    rows = [{"class": name, **found} for name, found in data["classes"].items()]
    columns = (Column("class", "class"), Column("images", "images"), Column("top-1", "top1", "{:.1f} %"))
    whole = f"all {data['images']} images: top-1 {data['top1']:.2f} %, top-5 {data['top5']:.2f} %"
    return Table(f"{data['model']}, {data['on']}", columns, rows, [whole])


def _ratio_table(data: dict[str, Any]) -> Table:
    """A row for each share of the patches."""
    columns = (
        Column("patches kept", "keep_ratio", "{:g}"),
        Column("patches", "patches"),
        Column("top-1", "top1", "{:.2f} %"),
        Column("top-5", "top5", "{:.2f} %"),
    )
    return Table(f"{data['model']}, {data['on']}, {data['images']} images", columns, data["keep_ratios"])
