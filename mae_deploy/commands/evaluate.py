"""`mae-deploy eval`: top-1 and top-5 of a checkpoint or a bundle on labelled images; torch is needed for checkpoints only."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.table import Table
from rich.text import Text

from mae_deploy.commands.config import EvalConfig
from mae_deploy.data.find import labelled_images
from mae_deploy.data.sources import ImageSource
from mae_deploy.errors import CheckFailed, ConfigError, import_optional
from mae_deploy.files import atomic_path, refuse_to_overwrite
from mae_deploy.options import Result
from mae_deploy.preprocess import Array, UnreadableImage
from mae_deploy.progress import notice, progress
from mae_deploy.runtime.accuracy import Accuracy
from mae_deploy.runtime.backbone import Backbone
from mae_deploy.runtime.manifest import MANIFEST_FILE

_LOGITS = "logits"
_BATCH = 64


class Classifier(Protocol):
    """What gives logits for images."""

    description: str
    num_classes: int
    class_names: tuple[str, ...] | None
    unreadable: list[str]

    def logits(self, images: ImageSource) -> Iterator[tuple[Array, Array]]:
        """`(B, classes)` and labels `(B,)`, for the images that can be read."""
        ...


def run(config: EvalConfig) -> Result:
    """Count what a classifier gets right.

    Raises:
        ConfigError: no classifier, no labelled images, or classes that are not the classifier's.
        CheckFailed: no image can be read, or logits that are no numbers.
        MissingDependency: a checkpoint without torch, or an engine or device that is absent.
    """
    if config.confusion is not None:
        refuse_to_overwrite(config.confusion, option="--confusion")
    classifier: Classifier = _Bundle(config) if (config.model / MANIFEST_FILE).is_file() else _Checkpoint(config)
    images = _images(config.data, classifier)
    accuracy = Accuracy(classifier.num_classes)
    for logits, labels in classifier.logits(images):
        accuracy.add(logits, labels)
    if accuracy.count == 0:
        raise CheckFailed(f"no readable image in {images.name}")
    names = images.class_names or ()
    if config.confusion is not None:
        _write_confusion(config.confusion, names, accuracy)
    data = {
        "model": str(config.model),
        "on": classifier.description,
        "data": images.name,
        "images": accuracy.count,
        **accuracy.summary(),
        "classes": accuracy.per_class(names),
        "unreadable": classifier.unreadable,
        "confusion": None if config.confusion is None else str(config.confusion),
    }
    return Result(data, _table(data))


def _images(data: Path, classifier: Classifier) -> ImageSource:
    """The labelled images, their labels in the order of the classifier's logits."""
    has_val = any((data / name).is_dir() or any(data.glob(f"{name}-*")) or any(data.glob(f"data/{name}-*")) for name in ("val", "validation"))
    root, split = (data, "val") if has_val else (data.parent, data.name)
    images = labelled_images(root, split, classifier.class_names)
    found = len(images.class_names or ())
    if found != classifier.num_classes:
        raise ConfigError(
            f"{images.name} has {found} classes, the classifier {classifier.num_classes}, whose names it does not know",
            hint="without names, there must be a folder for each class, in the order of the logits",
        )
    return images


class _Bundle:
    """A bundle on its engine."""

    def __init__(self, config: EvalConfig) -> None:
        self._backbone = Backbone.load(config.model, config.engine, device=config.device, threads=config.threads, affinity=config.affinity)
        bundle = self._backbone.bundle
        entry = next((entry for entry in bundle.manifest["graph"]["outputs"] if entry["name"] == _LOGITS), None)
        if entry is None:
            raise ConfigError(f"{config.model} has no logits, only {', '.join(bundle.output_names)}", hint="export a fine-tuned checkpoint")
        self.description = f"{bundle.precision} on {self._backbone.engine.name}"
        self.num_classes = int(entry["shape"][-1])
        self.class_names = tuple(bundle.class_names) if bundle.class_names is not None else None
        self.unreadable: list[str] = []
        self._batch_size = config.batch_size or bundle.fixed_batch or _BATCH

    def logits(self, images: ImageSource) -> Iterator[tuple[Array, Array]]:
        """Images are read by a few threads, cropped as the bundle says, and run in batches."""
        labels = np.asarray(images.labels)
        with self._backbone as backbone, ThreadPoolExecutor() as pool, progress("eval", len(images)) as bar:
            for first in range(0, len(images), self._batch_size):
                indices = range(first, min(first + self._batch_size, len(images)))
                read = [(index, pixels) for index, pixels in zip(indices, pool.map(lambda index: self._read(images, index), indices), strict=True)]
                kept = [(index, pixels) for index, pixels in read if not isinstance(pixels, str)]
                for _, why in read:
                    if isinstance(why, str):
                        _leave_out(self.unreadable, why)
                if kept:
                    found = backbone.run_cropped(np.stack([pixels for _, pixels in kept]), outputs=[_LOGITS])
                    yield found[_LOGITS].astype(np.float32), labels[[index for index, _ in kept]]
                bar.advance(len(indices))

    def _read(self, images: ImageSource, index: int) -> Array | str:
        preprocess = self._backbone.preprocess
        try:
            return preprocess.crop(images.read(index, preprocess.channels, preprocess.pixel_max))
        except UnreadableImage as error:
            return str(error)


class _Checkpoint:
    """A classifier in torch."""

    def __init__(self, config: EvalConfig) -> None:
        self._features = import_optional("mae_deploy.pretrain.features", extra="train")
        loaded = self._features.read_weights(config.model)
        metadata = loaded.metadata
        if metadata.kind != "classifier":
            raise ConfigError(f"{config.model} is a {metadata.kind} without a head", hint="fine-tune it first, or judge it by linprobe or knn")
        self._source: Any = self._features.classifier_logits(loaded, config.precision, config.device)
        self._config = config
        self.description = f"torch on {self._source.device}"
        self.num_classes = int(metadata.num_classes or 0)
        self.class_names: tuple[str, ...] | None = metadata.class_names
        self.unreadable: list[str] = []

    def logits(self, images: ImageSource) -> Iterator[tuple[Array, Array]]:
        """All at once."""
        settings = self._features.FeatureConfig(batch_size=self._config.batch_size or _BATCH, num_workers=self._config.num_workers, max_corrupt=len(images))
        found = self._features.extract(self._source, images, settings, title="eval")
        self.unreadable += found.unreadable
        yield found.features.numpy(), found.labels.numpy()


def _leave_out(unreadable: list[str], line: str) -> None:
    unreadable.append(line)
    notice("left out", line)


def _write_confusion(path: Path, names: tuple[str, ...], accuracy: Accuracy) -> None:
    with atomic_path(path) as aside, aside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["true class", *names])
        writer.writerows([name, *row] for name, row in zip(names, accuracy.confusion.tolist(), strict=True))


def _table(data: dict[str, Any]) -> Table:
    """The whole in the last row, behind the classes."""
    table = Table("class", "images", "top-1", title=Text(f"{data['model']}, {data['on']}"))
    for name, found in data["classes"].items():
        table.add_row(Text(name), str(found["images"]), "-" if found["top1"] is None else f"{found['top1']:.1f} %")
    table.add_section()
    table.add_row("all", str(data["images"]), f"{data['top1']:.2f} %, top-5 {data['top5']:.2f} %")
    return table
