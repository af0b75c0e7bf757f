"""Where images come from: anything that can be read in any order, labelled or not."""

from __future__ import annotations

import hashlib
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from mae_deploy.data.decode import Shrink, decode
from mae_deploy.errors import ConfigError
from mae_deploy.file_kinds import is_special
from mae_deploy.images.left_out import LeftOut
from mae_deploy.images.limits import TooManyPixels, check_bytes
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

    @property
    def left_out(self) -> LeftOut:
        """What was found beside the images and is not used."""
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


class Encoded(ABC):
    """Encoded images whose labels are held in memory: members of shards, rows of tables."""

    name: str
    left_out: LeftOut
    class_names: tuple[str, ...] | None
    _labels: Array
    _digest: str

    @property
    def labels(self) -> Sequence[int]:
        """The label of each image, or `UNLABELLED`."""
        return Numbers(self._labels)

    def __len__(self) -> int:
        """Number of images."""
        return len(self._labels)

    @abstractmethod
    def key(self, index: int) -> str:
        """See `ImageSource`."""

    @abstractmethod
    def raw(self, index: int) -> bytes:
        """See `ImageSource`."""

    def read(
        self, index: int, channels: int, pixel_max: float | None = None, shrink: Shrink | None = None
    ) -> Image.Image | Array:
        """Decode one image."""
        return decode(self.key(index), self.raw(index), channels, pixel_max, shrink)

    def fingerprint(self) -> dict[str, int | str]:
        """Number of images, and a hash of the names and sizes of the files and what is in them, and of the labels."""
        return {"images": len(self), "sha256": self._digest}


class Joined:
    """Several sources one after the other; labels and classes are those of each, as they are."""

    def __init__(self, *parts: ImageSource) -> None:
        self.parts = parts
        self.name = " and ".join(part.name for part in parts)
        self.labels: Sequence[int] = [label for part in parts for label in part.labels]
        self.class_names = parts[0].class_names
        self.left_out = LeftOut()
        for part in parts:
            self.left_out.merge(part.left_out)

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


class Chosen:
    """Some of the images of a source, in its order."""

    def __init__(self, source: ImageSource, indices: Sequence[int], name: str) -> None:
        self.source = source
        self.name = name
        self.labels: Sequence[int] = [source.labels[index] for index in indices]
        self.class_names = source.class_names
        self.left_out = source.left_out
        self._indices = np.array(indices, np.int64)

    def __len__(self) -> int:
        """Number of images."""
        return len(self._indices)

    def key(self, index: int) -> str:
        """The image's name in the source."""
        return self.source.key(int(self._indices[index]))

    def raw(self, index: int) -> bytes:
        """The image's file as it is."""
        return self.source.raw(int(self._indices[index]))

    def read(
        self, index: int, channels: int, pixel_max: float | None = None, shrink: Shrink | None = None
    ) -> Image.Image | Array:
        """Decode one image."""
        return self.source.read(int(self._indices[index]), channels, pixel_max, shrink)

    def fingerprint(self) -> dict[str, int | str]:
        """Number of images, and a hash of the source's hash and the choice."""
        whole = str(self.source.fingerprint()["sha256"]).encode()
        digest = hashlib.sha256(whole + self._indices.astype("<i8").tobytes())
        return {"images": len(self), "sha256": digest.hexdigest()}


def hold_out(source: ImageSource, share: float, rng: np.random.Generator) -> tuple[ImageSource, ImageSource]:
    """Split a labelled source: the rest, and `share` of each class at random, at least one image where there are two.

    Raises:
        ConfigError: no class has two images.
    """
    labels = np.asarray(source.labels)
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        (members,) = np.nonzero(labels == label)
        count = min(max(1, round(share * len(members))), len(members) - 1)
        held[rng.permutation(members)[:count]] = True
    if not held.any():
        raise ConfigError(f"--val-share {share:g}: no class of {source.name} has two images")
    rest, chosen = (np.nonzero(mask)[0].tolist() for mask in (~held, held))
    return Chosen(source, rest, source.name), Chosen(source, chosen, f"{share:g} of {source.name}")


def class_key(name: str) -> str:
    """What all spellings of a class have in common: macOS writes é as e and an accent, Linux as one character."""
    return unicodedata.normalize("NFC", name)


def distinct_classes(names: Iterable[str]) -> tuple[str, ...]:
    """Names in alphabetical order, of several spellings of a class the first."""
    spelt: dict[str, str] = {}
    for name in sorted(set(names)):
        spelt.setdefault(class_key(name), name)
    return tuple(spelt.values())


def class_positions(names: Sequence[str]) -> dict[str, int]:
    """The label of each class by its `class_key`."""
    return {class_key(name): number for number, name in reversed(list(enumerate(names)))}


def numbers_of(names: Sequence[str | None], own: tuple[str, ...] | None) -> tuple[Array, tuple[str, ...]]:
    """The number of each image's class or `UNLABELLED`, and the classes: `own`, or those that are there."""
    own = own or distinct_classes(name for name in names if name is not None)
    place = class_positions(own)
    numbers = [UNLABELLED if name is None else place.get(class_key(name), UNLABELLED) for name in names]
    return np.array(numbers, np.int64), own


def check_classes(found: Iterable[str], wanted: tuple[str, ...], describe: Callable[[str], str]) -> None:
    """Whether every class that was found is wanted.

    Args:
        describe: names a class and where it is.

    Raises:
        ConfigError: names one that is not.
    """
    known = class_positions(wanted)
    if unknown := [own for own in found if class_key(own) not in known]:
        raise ConfigError(
            f"{describe(unknown[0])} is not one of the {len(wanted)} classes:"
            f" {', '.join(wanted[:8])}{' …' if len(wanted) > 8 else ''}"
        )


def match_classes(
    numbers: Array, own: tuple[str, ...] | None, wanted: tuple[str, ...] | None, name: str
) -> tuple[Array, tuple[str, ...]]:
    """Labels in the order of the classes that are wanted, or else of the data's own, and the classes' names.

    Args:
        own: the data's classes in the order of its numbers; None: the numbers have no names.

    Raises:
        ConfigError: an image without a label, a number without a class or that may mean two, or a class that is not
            wanted.
    """
    if (numbers < 0).any():
        raise ConfigError(f"{int((numbers < 0).sum())} of the {len(numbers)} images of {name} have no label")
    if own is None:
        own = _names_of_numbers(numbers, wanted, name)
    if numbers.max() >= len(own):
        raise ConfigError(f"{name} has a label {int(numbers.max())}, but there are {len(own)} classes")
    if wanted is None or own == wanted:
        return numbers, own
    check_classes((own[number] for number in np.unique(numbers)), wanted, lambda known: f"class {known} of {name}")
    place = class_positions(wanted)
    return np.array([place.get(class_key(known), UNLABELLED) for known in own])[numbers], wanted


def _names_of_numbers(numbers: Array, wanted: tuple[str, ...] | None, name: str) -> tuple[str, ...]:
    """The class of each number from 0 on, where the data has no names: beside classes that are called by numbers, as
    folders may be, the one that is called so, "10" or "010", and not the one that stands there in their alphabetical
    order.

    Raises:
        ConfigError: the number may be the name of one class and the place of another.
    """
    plain = tuple(map(str, range(int(numbers.max()) + 1)))
    if wanted is None or not all(known.isdecimal() for known in wanted):
        return plain
    present, values = np.unique(numbers).tolist(), [int(known) for known in wanted]
    called = dict(zip(values, wanted, strict=True))
    by_name = [called.get(number) for number in present]
    ordered = [known for _, known in sorted(zip(values, wanted, strict=True))]
    by_place = [ordered[number] if number < len(ordered) else None for number in present]
    alphabetical = [wanted[number] if number < len(wanted) else None for number in present]
    named, placed = None not in by_name, None not in by_place
    if named and len(called) == len(wanted) and (not placed or by_name == by_place):
        return tuple(called.get(number, known) for number, known in enumerate(plain))
    if not named and (not placed or by_place == alphabetical):
        return wanted
    raise ConfigError(
        f"{name} has the labels {present[0]} to {present[-1]}, which may be the names or the places of the classes"
        f" {', '.join(wanted[:8])}{' …' if len(wanted) > 8 else ''}",
        hint="write the classes' names in the order of the labels: classes.json beside shards, a ClassLabel in tables",
    )


def read_file(path: Path) -> bytes:
    """A file's bytes.

    Raises:
        UnreadableImage: it cannot be read.
    """
    try:
        if is_special(path):
            raise UnreadableImage(f"{path}: it is no file")
        check_bytes(path.stat().st_size)
        return path.read_bytes()
    except (OSError, TooManyPixels) as error:
        raise UnreadableImage(f"{path}: {getattr(error, 'strerror', error)}") from error
