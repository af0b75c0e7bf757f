"""Folders of images, labelled or not; unreadable files are named, not fatal."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from mae_deploy.data.transforms import Transform
from mae_deploy.errors import ConfigError
from mae_deploy.preprocess import UnreadableImage, find_images, read_image
from mae_deploy.seeding import derive_seed, seed_everything

UNLABELLED = -1
"""The label of an image that has none."""

_REPLACEMENTS = 64
"""Neighbours that are tried in the place of an unreadable training image."""


@dataclass(frozen=True, slots=True)
class ImageList:
    """Image files with their labels, in a stable order."""

    root: Path
    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    class_names: tuple[str, ...] | None = None

    def fingerprint(self) -> dict[str, int | str]:
        """Number of files and a hash of their names, sizes and labels: tells two data sets apart without reading them."""
        digest = hashlib.sha256()
        for path, label in zip(self.paths, self.labels, strict=True):
            size = path.stat().st_size if path.exists() else -1  # a broken link: whoever reads it reports it
            digest.update(b"%b\0%d\0%d\n" % (os.fsencode(path.relative_to(self.root).as_posix()), size, label))
        return {"images": len(self.paths), "sha256": digest.hexdigest()}


def unlabelled_images(root: Path) -> ImageList:
    """Every image at or below a folder.

    Raises:
        ConfigError: there is none.
    """
    paths = find_images(root)
    return ImageList(root.parent if root.is_file() else root, tuple(paths), (UNLABELLED,) * len(paths))


def labelled_images(root: Path, split: str, class_names: tuple[str, ...] | None = None) -> ImageList:
    """The images of `root/split/<class>/…`, classes in alphabetical order or in that of `class_names`.

    Raises:
        ConfigError: no such folder, no classes, or a class that is not among `class_names`.
    """
    folder = root / split
    found = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")) if folder.is_dir() else []
    if not found:
        raise ConfigError(f"no class folders in {folder}", hint="labelled data is DATA/train/<class>/… and DATA/val/<class>/…")
    names = class_names or tuple(found)
    if unknown := [name for name in found if name not in names]:
        raise ConfigError(f"{folder / unknown[0]} is not one of the {len(names)} classes: {', '.join(names[:8])}{' …' if len(names) > 8 else ''}")
    paths: list[Path] = []
    labels: list[int] = []
    for name in found:
        images = find_images(folder / name)
        paths += images
        labels += [names.index(name)] * len(images)
    return ImageList(folder, tuple(paths), tuple(labels), names)


class Key(NamedTuple):
    """One draw of one image: its augmentation depends on nothing else, so any worker gives the same sample."""

    epoch: int
    item: int


class Sample(NamedTuple):
    """An image, its label, and the unreadable files that were met on the way."""

    image: Tensor | None
    """uint8 `(C, H, W)`; None where it cannot be read."""
    label: int
    unreadable: tuple[str, ...]


class Batch(NamedTuple):
    """Samples stacked."""

    images: Tensor
    """uint8 `(B, C, H, W)`."""
    labels: Tensor
    """int64 `(B,)`."""
    unreadable: tuple[str, ...]


class ImageDataset(Dataset[Sample]):
    """Decode, augment, hand over as uint8.

    Args:
        replace_unreadable: put the next readable image in the place of a broken one (training); otherwise the sample
            comes without an image (evaluation must not count one image twice).
        cache: keep decoded images in memory.
    """

    def __init__(self, images: ImageList, transform: Transform, *, channels: int, seed: int, replace_unreadable: bool, cache: bool = False) -> None:
        self.images = images
        self.transform = transform
        self.channels = channels
        self.seed = seed
        self.replace_unreadable = replace_unreadable
        self._cache: dict[int, Image.Image] | None = {} if cache else None

    def __len__(self) -> int:
        """Number of files."""
        return len(self.images.paths)

    def __getitem__(self, key: Key) -> Sample:
        """Draw one sample; without an image where it, or every one of its would-be replacements, is unreadable."""
        unreadable: list[str] = []
        for offset in range(min(len(self), _REPLACEMENTS) if self.replace_unreadable else 1):
            index = (key.item + offset) % len(self)
            try:
                image = self._read(index)
            except UnreadableImage as error:
                unreadable.append(str(error))
                continue
            seed_everything(derive_seed(self.seed, "augment", key.epoch, key.item))
            return Sample(self.transform(image), self.images.labels[index], tuple(unreadable))
        # Not raised: an error in a worker process arrives as a page of traceback.
        return Sample(None, self.images.labels[key.item], tuple(unreadable))

    def _read(self, index: int) -> Image.Image:
        if self._cache is None:
            return read_image(self.images.paths[index], self.channels)
        if index not in self._cache:
            self._cache[index] = read_image(self.images.paths[index], self.channels)
        return self._cache[index]


def collate(samples: list[Sample]) -> Batch:
    """Stack the samples that have an image."""
    readable = [(sample.image, sample.label) for sample in samples if sample.image is not None]
    images = torch.stack([image for image, _ in readable]) if readable else torch.empty(0, 0, 0, 0, dtype=torch.uint8)
    labels = torch.tensor([label for _, label in readable], dtype=torch.int64)
    return Batch(images, labels, tuple(line for sample in samples for line in sample.unreadable))
