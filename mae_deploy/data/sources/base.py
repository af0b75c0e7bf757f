"""Where images come from: anything that can be read in any order, labelled or not."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from mae_deploy.data.decode import Shrink, decode
from mae_deploy.errors import ConfigError
from mae_deploy.images.preprocess import Array, UnreadableImage, find_images, read_image

UNLABELLED = -1
"""The label of an image that has none."""


class Numbers(Sequence[int]):
    """An array of numbers as a sequence of Python's."""

    def __init__(self, values: Array) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: Any) -> Any:
        return int(self._values[index]) if not isinstance(index, slice) else self._values[index].tolist()


class ImageSource(Protocol):
    """Images in a stable order: files, members of tar shards, rows of a table."""

    @property
    def name(self) -> str:
        """The folder or pattern, for messages."""
        ...

    @property
    def labels(self) -> Sequence[int]:
        """The label of each image, or `UNLABELLED`."""
        ...

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The classes' names in the order of the labels, where there are labels."""
        ...

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """The image's file, or its name in its shard or table."""
        ...

    def raw(self, index: int) -> bytes:
        """The image's file as it is.

        Raises:
            UnreadableImage: it is not there.
        """
        ...

    def read(self, index: int, channels: int, pixel_max: float | None = None, shrink: Shrink | None = None) -> Image.Image | Array:
        """Decode one image; see `read_image`.

        Raises:
            UnreadableImage: the message names it and says why.
        """
        ...

    def fingerprint(self) -> dict[str, int | str]:
        """Number of images and a hash of their names, sizes and labels: tells two data sets apart without reading them."""
        ...


@dataclass(frozen=True, slots=True)
class ImageList:
    """Image files with their labels, in a stable order."""

    root: Path
    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    class_names: tuple[str, ...] | None = None

    @property
    def name(self) -> str:
        """The folder."""
        return str(self.root)

    def __len__(self) -> int:
        """Number of files."""
        return len(self.paths)

    def key(self, index: int) -> str:
        """The file."""
        return str(self.paths[index])

    def raw(self, index: int) -> bytes:
        """The file's bytes."""
        return read_file(self.paths[index])

    def read(self, index: int, channels: int, pixel_max: float | None = None, shrink: Shrink | None = None) -> Image.Image | Array:
        """Decode one file."""
        return read_image(self.paths[index], channels, pixel_max) if shrink is None else decode(self.key(index), self.raw(index), channels, pixel_max, shrink)

    def fingerprint(self) -> dict[str, int | str]:
        """Number of files and a hash of their names, sizes and labels: tells two data sets apart without reading them."""
        digest = hashlib.sha256()
        for path, label in zip(self.paths, self.labels, strict=True):
            size = path.stat().st_size if path.exists() else -1  # a broken link: whoever reads it reports it
            digest.update(b"%b\0%d\0%d\n" % (os.fsencode(path.relative_to(self.root).as_posix()), size, label))
        return {"images": len(self.paths), "sha256": digest.hexdigest()}


class Joined:
    """Several sources one after the other; labels and classes are those of each, as they are."""

    def __init__(self, *parts: ImageSource) -> None:
        self.parts = parts
        self.name = " and ".join(part.name for part in parts)
        self.labels: Sequence[int] = [label for part in parts for label in part.labels]
        self.class_names = parts[0].class_names

    def __len__(self) -> int:
        """Number of images in all."""
        return len(self.labels)

    def key(self, index: int) -> str:
        """The image's name in its own source."""
        part, within = self._find(index)
        return part.key(within)

    def raw(self, index: int) -> bytes:
        """The image's file as it is."""
        part, within = self._find(index)
        return part.raw(within)

    def read(self, index: int, channels: int, pixel_max: float | None = None, shrink: Shrink | None = None) -> Image.Image | Array:
        """Decode one image."""
        part, within = self._find(index)
        return part.read(within, channels, pixel_max, shrink)

    def fingerprint(self) -> dict[str, int | str]:
        """Number of images, and a hash of the parts' hashes."""
        parts = "".join(str(part.fingerprint()["sha256"]) for part in self.parts)
        return {"images": len(self), "sha256": hashlib.sha256(parts.encode()).hexdigest()}

    def _find(self, index: int) -> tuple[ImageSource, int]:
        for part in self.parts:
            if index < len(part):
                return part, index
            index -= len(part)
        raise IndexError(index)


def image_files(root: Path) -> ImageList:
    """Every image at or below a folder.

    Raises:
        ConfigError: there is none.
    """
    paths = find_images(root)
    return ImageList(root.parent if root.is_file() else root, tuple(paths), (UNLABELLED,) * len(paths))


def labelled_files(folder: Path, class_names: tuple[str, ...] | None = None) -> ImageList:
    """The images of `folder/<class>/…`, classes in alphabetical order or in that of `class_names`.

    Raises:
        ConfigError: no such folder, no classes, or a class that is not among `class_names`.
    """
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


def match_classes(numbers: Array, own: tuple[str, ...] | None, wanted: tuple[str, ...] | None, name: str) -> tuple[Array, tuple[str, ...]]:
    """Labels in the order of the classes that are wanted, or else of the data's own, and the classes' names.

    Args:
        own: the data's classes in the order of its numbers; None: the numbers have no names.

    Raises:
        ConfigError: an image without a label, a number without a class, or a class that is not wanted.
    """
    if (numbers < 0).any():
        raise ConfigError(f"{int((numbers < 0).sum())} of the {len(numbers)} images of {name} have no label")
    if own is None:
        own = wanted if wanted is not None and all(known.isdigit() for known in wanted) else tuple(map(str, range(int(numbers.max()) + 1)))
    if numbers.max() >= len(own):
        raise ConfigError(f"{name} has a label {int(numbers.max())}, but there are {len(own)} classes")
    if wanted is None or own == wanted:
        return numbers, own
    if unknown := [own[number] for number in np.unique(numbers) if own[number] not in wanted]:
        raise ConfigError(f"class {unknown[0]} of {name} is not one of the {len(wanted)} classes: {', '.join(wanted[:8])}{' …' if len(wanted) > 8 else ''}")
    return np.array([wanted.index(known) if known in wanted else UNLABELLED for known in own])[numbers], wanted


def read_file(path: Path) -> bytes:
    """A file's bytes.

    Raises:
        UnreadableImage: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise UnreadableImage(f"{path}: {error.strerror}") from error
