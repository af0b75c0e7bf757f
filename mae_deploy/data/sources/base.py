"""Where images come from: anything that can be read in any order, labelled or not."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from mae_deploy.data.decode import Shrink
from mae_deploy.errors import ConfigError
from mae_deploy.images.read import Array, UnreadableImage

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

    def read(
        self, index: int, channels: int, pixel_max: float | None = None, shrink: Shrink | None = None
    ) -> Image.Image | Array:
        """Decode one image; see `read_image`.

        Raises:
            UnreadableImage: the message names it and says why.
        """
        ...

    def fingerprint(self) -> dict[str, int | str]:
        """Number of images and a hash of their names, sizes and labels: tells two data sets apart without reading
        them.
        """
        ...


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

    def read(
        self, index: int, channels: int, pixel_max: float | None = None, shrink: Shrink | None = None
    ) -> Image.Image | Array:
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


def match_classes(
    numbers: Array, own: tuple[str, ...] | None, wanted: tuple[str, ...] | None, name: str
) -> tuple[Array, tuple[str, ...]]:
    """Labels in the order of the classes that are wanted, or else of the data's own, and the classes' names.

    Args:
        own: the data's classes in the order of its numbers; None: the numbers have no names.

    Raises:
        ConfigError: an image without a label, a number without a class, or a class that is not wanted.
    """
    if (numbers < 0).any():
        raise ConfigError(f"{int((numbers < 0).sum())} of the {len(numbers)} images of {name} have no label")
    if own is None:
        own = (
            wanted
            if wanted is not None and all(known.isdigit() for known in wanted)
            else tuple(map(str, range(int(numbers.max()) + 1)))
        )
    if numbers.max() >= len(own):
        raise ConfigError(f"{name} has a label {int(numbers.max())}, but there are {len(own)} classes")
    if wanted is None or own == wanted:
        return numbers, own
    if unknown := [own[number] for number in np.unique(numbers) if own[number] not in wanted]:
        raise ConfigError(
            f"class {unknown[0]} of {name} is not one of the {len(wanted)} classes:"
            f" {', '.join(wanted[:8])}{' …' if len(wanted) > 8 else ''}"
        )
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
