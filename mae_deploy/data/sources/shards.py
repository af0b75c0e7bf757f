"""Local tar shards (WebDataset), indexed by their headers and read at random: the same order, epochs and resumption as
folders.
"""

from __future__ import annotations

import hashlib
import posixpath
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mae_deploy.data.sources.base import UNLABELLED, Encoded, match_classes, numbers_of
from mae_deploy.data.sources.members import (
    BESIDE,
    TWICE,
    arrays_beside,
    clean_name,
    kind_of_member,
    label_of,
    label_stem,
)
from mae_deploy.data.sources.patterns import local_shards, missing_parts
from mae_deploy.errors import ConfigError
from mae_deploy.file_kinds import TarMember
from mae_deploy.files import read_json
from mae_deploy.images.left_out import LeftOut
from mae_deploy.images.read import Array, UnreadableImage
from mae_deploy.packages import upgrade
from mae_deploy.text import decode_text

_LONGEST_LABEL = 1000
"""Bytes of a member that holds a number."""

INDEX = "index.json"
"""Beside the shards, as `data pack` writes it: what would else be read from every header."""

CLASSES = "classes.json"
"""Names of the classes in the order of their numbers, beside the shards or above them."""

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar file and the images in it."""

    path: Path
    bytes: int
    names: list[str]
    """Members that are images, in order."""
    offsets: list[int]
    sizes: list[int]
    labels: list[int]
    left_out: LeftOut = field(default_factory=LeftOut)
    """Members that are no images; not in `index.json`."""

    def entry(self) -> dict[str, Any]:
        """As `index.json` holds it."""
        return {
            "name": self.path.name,
            "bytes": self.bytes,
            "images": len(self.names),
            "names": self.names,
            "offsets": self.offsets,
            "sizes": self.sizes,
            "labels": self.labels,
        }


class ShardSource(Encoded):
    """The images of some shards, in order.

    Args:
        name: what the user typed, for messages.
        labelled: read labels: the numbers of `.cls` members, else the folders that the members lie in.
        class_names: the classes that there may be, in the order of the labels.

    Raises:
        ConfigError: no image, a shard that is cut short or changed, no labels where they are asked for.
    """

    def __init__(
        self, name: str, paths: Sequence[Path], *, labelled: bool = False, class_names: tuple[str, ...] | None = None
    ) -> None:
        indices = {folder: _index(folder) for folder in {path.parent for path in paths}}
        shards = [_open(path, indices[path.parent].get(path.name)) for path in paths]
        if not any(shard.names for shard in shards):
            raise ConfigError(
                f"no images in the {len(shards)} shard(s) of {name}",
                hint="members are images such as 000001.jpg, with labels in 000001.cls",
            )
        self.name = name
        self.left_out = LeftOut()
        missing_parts(paths, self.left_out)
        for shard in shards:
            self.left_out.merge(shard.left_out)
            if not shard.names:
                self.left_out.add("shards without images", shard.path.name)
        self._paths = [shard.path for shard in shards]
        counts = [len(shard.names) for shard in shards]
        # Arrays, not lists: worker processes share their memory for as long as nobody counts references to a million
        # numbers.
        self._shard = np.repeat(np.arange(len(shards)), counts)
        self._names = np.array(
            [member.encode("utf-8", "surrogateescape") for shard in shards for member in shard.names]
        )
        self._offsets = np.array([offset for shard in shards for offset in shard.offsets], np.int64)
        self._sizes = np.array([size for shard in shards for size in shard.sizes], np.int64)
        numbers = np.array([label for shard in shards for label in shard.labels], np.int64)
        self.class_names: tuple[str, ...] | None = None
        if labelled:
            numbers, self.class_names = _classes(name, self._paths[0].parent, numbers, self._names, class_names)
        self._labels = numbers
        self._digest = _digest(shards, numbers)

    def key(self, index: int) -> str:
        """The shard's file and the member's name."""
        return f"{self._paths[self._shard[index]]}/{self._names[index].decode('utf-8', 'surrogateescape')}"

    def raw(self, index: int) -> bytes:
        """The member's bytes."""
        path, size = self._paths[self._shard[index]], int(self._sizes[index])
        try:
            with path.open("rb") as file:
                file.seek(int(self._offsets[index]))
                content = file.read(size)
        except OSError as error:
            raise UnreadableImage(f"{self.key(index)}: {error.strerror}") from error
        if len(content) < size:
            raise UnreadableImage(f"{self.key(index)}: the shard is cut short")
        return bytes(content)


def shard_images(data: str, *, labelled: bool = False, class_names: tuple[str, ...] | None = None) -> ShardSource:
    """The images of the local shards that a name, a pattern or a folder stands for."""
    return ShardSource(data, local_shards(data), labelled=labelled, class_names=class_names)


def scan(path: Path) -> Shard:
    """Read the headers of a tar file.

    Raises:
        ConfigError: it is cut short, or no tar file.
    """
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, int] = {}
    left_out = LeftOut()
    try:
        with tarfile.open(path, "r:", tarinfo=TarMember) as tar, path.open("rb") as file:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # else it keeps every header
                if member.isdir():
                    continue
                name, kind = kind_of_member(member, left_out)
                if kind == "label":
                    file.seek(member.offset_data)
                    labels[label_stem(name)] = read_label(
                        file.read(min(member.size, _LONGEST_LABEL)), f"{path}/{member.name}"
                    )
                elif kind == "image":
                    if name in images:
                        left_out.add(TWICE, name)
                    images[name] = (member.name, member.offset_data, member.size)
    # a header may lead to headers, each read within the one before
    except (tarfile.TarError, EOFError, ValueError, RecursionError) as error:
        found = f"after {len(images)} images " if images else ""
        raise ConfigError(
            f"{path} ends {found}in the middle, or is not a tar file ({error})",
            hint="copy or pack it again, or leave it out",
        ) from error
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    for name in sorted(arrays_beside(images)):
        left_out.add(BESIDE, name)
        del images[name]
    return Shard(
        path,
        path.stat().st_size,
        [name for name, _, _ in images.values()],
        [offset for _, offset, _ in images.values()],
        [size for _, _, size in images.values()],
        [label_of(name, labels) for name in images],
        left_out,
    )


def read_label(content: bytes, where: str) -> int:
    """The number in a `.cls` member.

    Raises:
        ConfigError: there is none, or one of more than 64 bits.
    """
    try:
        return int(np.int64(int(decode_text(content))))
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"{where} holds {content[:20]!r}, not the number of a class") from error


def _open(path: Path, entry: dict[str, Any] | None) -> Shard:
    """From `index.json` where it knows the shard, else from the headers."""
    if entry is None:
        return scan(path)
    if not path.is_file():
        raise ConfigError(f"no such shard: {path}")
    if path.stat().st_size != entry["bytes"]:
        raise ConfigError(
            f"{path} has {path.stat().st_size} bytes, not the {entry['bytes']} of {INDEX}: cut short or changed",
            hint=f"copy it again, or remove {INDEX}",
        )
    return Shard(path, entry["bytes"], entry["names"], entry["offsets"], entry["sizes"], entry["labels"])


def _index(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / INDEX
    if not path.is_file():
        return {}
    index = read_json(path)
    shards = index.get("shards") if isinstance(index, dict) and index.get("format") == FORMAT else None
    if not isinstance(shards, list) or not all(map(_is_entry, shards)):
        raise ConfigError(
            f"{path} is not an index of shards that this version reads",
            hint=f"{upgrade()}, or remove it: the shards are then indexed by their headers",
        )
    return {entry["name"]: entry for entry in shards}


def _is_entry(entry: Any) -> bool:
    """Whether a part of the index has of each image its name, label and place in a file of that length."""
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or type(entry.get("bytes")) is not int:
        return False
    names, *numbers = (entry.get(key) for key in ("names", "offsets", "sizes", "labels"))
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return False
    if any(not isinstance(values, list) or len(values) != len(names) for values in numbers):
        return False
    return all(
        type(offset) is type(size) is type(label) is int
        and 0 <= offset <= offset + size <= entry["bytes"]
        and UNLABELLED <= label < 1 << 63
        for offset, size, label in zip(*numbers, strict=True)
    )


def _classes(
    name: str, folder: Path, numbers: Array, names: Array, wanted: tuple[str, ...] | None
) -> tuple[Array, tuple[str, ...]]:
    """Labels in the order of `wanted`, or of the shards' own classes, and the classes' names."""
    own = _class_names(folder)
    if (numbers == UNLABELLED).all():
        folders = [
            posixpath.dirname(clean_name(member.decode("utf-8", "surrogateescape"))) for member in names.tolist()
        ]
        if not all(folders):
            raise ConfigError(
                f"the images of {name} have no labels",
                hint="give each a .cls member with its number, or put it below the name of its class",
            )
        numbers, own = numbers_of(folders, own)
    return match_classes(numbers, own, wanted, name)


def _class_names(folder: Path) -> tuple[str, ...] | None:
    for place in (folder, folder.parent):
        if (place / CLASSES).is_file():
            found = read_json(place / CLASSES)
            if not isinstance(found, list) or not all(isinstance(known, str) for known in found):
                raise ConfigError(f"{place / CLASSES} must be a list of names")
            return tuple(found)
    return None


def _digest(shards: Sequence[Shard], labels: Array) -> str:
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(b"%b\0%d\n" % (shard.path.name.encode("utf-8", "surrogateescape"), shard.bytes))
        digest.update("\0".join(shard.names).encode("utf-8", "surrogateescape"))
        digest.update(np.array(shard.sizes, "<i8").tobytes())
    digest.update(labels.astype("<i8").tobytes())
    return digest.hexdigest()
