"""What is embedded, in parts that are read alone: pieces of folders, shards and tables; streamed shards; videos."""

from __future__ import annotations

import glob
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mae_deploy.data.config import Columns
from mae_deploy.data.sources.base import ImageSource
from mae_deploy.data.sources.open import unlabelled_images
from mae_deploy.data.sources.patterns import expand, is_streamed
from mae_deploy.data.sources.streamed import Raw, Said, read_shard
from mae_deploy.errors import ConfigError, MaeDeployError, MissingDependency, import_optional
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.images.read import UnreadableImage, read_image
from mae_deploy.progress import notice
from mae_deploy.runtime.video.frame import Frame
from mae_deploy.runtime.video.source import open_video

VIDEO_SUFFIXES = (".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv")

_PLACES = 32
"""Bits of an id that count the images of a streamed shard or the frames of a video; those above count the files."""


@dataclass(frozen=True, slots=True)
class Item:
    """One image."""

    id: int
    """Of folders, shards and tables its number in their order; else that of its file, times 2³², and its place in it,
    of a frame its number in the video."""
    key: str
    """Its file, or its name in its shard, table or video."""
    read: Callable[[Preprocess], Any]
    """What `Preprocess.crop` takes; raises UnreadableImage."""


class Collection(ABC):
    """Images in parts."""

    name: str
    num_parts: int
    num_images: int | None = None
    """None: nobody has counted."""
    sequential: bool = True
    """Whether a part is read from front to back, and may fill several shards."""

    @abstractmethod
    def fingerprint(self) -> dict[str, int | str]:
        """Tells two collections apart without reading them."""

    @abstractmethod
    def items(self, part: int) -> Iterator[Item]:
        """The images of a part in their order.

        Raises:
            MaeDeployError: it breaks off.
        """


class Indexed(Collection):
    """A folder, shards or tables on disk, which are read in any order: each part is a shard of features."""

    sequential = False

    def __init__(self, source: ImageSource, shard_images: int) -> None:
        self.source, self.name, self._size = source, source.name, shard_images
        self.num_images = len(source)
        self.num_parts = -(-len(source) // shard_images)

    def fingerprint(self) -> dict[str, int | str]:
        """Of names and sizes."""
        return self.source.fingerprint()

    def items(self, part: int) -> Iterator[Item]:
        """See `Collection`."""
        for index in range(part * self._size, min((part + 1) * self._size, len(self.source))):
            yield self.item(index)

    def item(self, index: int) -> Item:
        """An image by its id."""
        return Item(index, self.source.key(index), partial(self._read, index))

    def _read(self, index: int, spec: Preprocess) -> Any:
        return self.source.read(index, spec.channels, spec.pixel_max)


class Streams(Collection):
    """Tar shards that can only be read from front to back; each is a part."""

    def __init__(self, data: str) -> None:
        import_optional("webdataset", extra="train")
        self.name, self._urls = data, expand(data)
        self.num_parts = len(self._urls)

    def fingerprint(self) -> dict[str, int | str]:
        """Of the shards' names."""
        return {"shards": len(self._urls), "sha256": hashlib.sha256("\0".join(self._urls).encode()).hexdigest()}

    def items(self, part: int) -> Iterator[Item]:
        """See `Collection`."""
        url, place = self._urls[part], -1
        try:
            for place, raw in enumerate(read_shard(url, Said(), whole=True)):
                yield Item(part << _PLACES | place, raw.name, partial(_decode, raw))
        except Exception as error:  # of any kind, from the network or a command
            reason = " ".join(str(error).split())
            raise MaeDeployError(f"{url} breaks off after {place + 1} images: {reason}") from error


class Videos(Collection):
    """Every so many-th frame of some videos; each is a part."""

    def __init__(self, name: str, paths: list[str], every: int) -> None:
        self.name, self._paths, self.every = name, paths, every
        self.num_parts = len(paths)

    def fingerprint(self) -> dict[str, int | str]:
        """Of names and sizes."""
        digest = hashlib.sha256()
        for path in self._paths:
            digest.update(os.fsencode(path) + b"\0%d\n" % (os.path.getsize(path) if os.path.isfile(path) else -1))
        return {"videos": len(self._paths), "sha256": digest.hexdigest()}

    def items(self, part: int) -> Iterator[Item]:
        """See `Collection`. What cannot be decoded is an image that cannot be read, after the frames before it."""
        path, index = self._paths[part], -1
        try:
            with open_video(path, every=self.every) as video:
                for frame in video:
                    index = frame.index
                    yield self._item(part, frame)
        except MissingDependency:
            raise
        except MaeDeployError as error:
            yield Item(part << _PLACES | index + 1, path, partial(_unreadable, str(error)))

    def frame(self, id: int) -> Item:
        """A frame by its id, for which the video is decoded up to there."""
        part, index = id >> _PLACES, id & ((1 << _PLACES) - 1)
        with open_video(self._paths[part]) as video:
            return self._item(part, next(frame for frame in video if frame.index == index))

    def _item(self, part: int, frame: Frame) -> Item:
        return Item(part << _PLACES | frame.index, f"{self._paths[part]}#{frame.index}", lambda _: frame.image)


def open_collection(data: str, columns: Columns, *, every: int | None, shard_images: int) -> Collection:
    """What DATA stands for: what training reads, or videos: a file, a URL, a pattern, or a folder of them.

    Args:
        every: DATA is videos, of which every so many-th frame is taken; None: videos are taken where there is no image,
            and of them every frame.

    Raises:
        ConfigError: there is none, or a folder holds two kinds.
    """
    if is_streamed(data) and not _is_video(data) and every is None:
        return Streams(data)
    if every is not None or not Path(data).is_dir():  # only these may be videos first: a folder is not walked twice
        if videos := _videos(data):
            return Videos(data, videos, every or 1)
        if every is not None:
            raise ConfigError(f"--every {every} is for videos, and {data} has none", hint=" ".join(VIDEO_SUFFIXES))
    try:
        return Indexed(unlabelled_images(data, columns), shard_images)
    except ConfigError:
        if not (videos := _videos(data)):
            raise
    return Videos(data, videos, 1)


def announce(collection: Collection) -> None:
    """The line at the start of a command: what was found, and what was left out."""
    left_out = collection.source.left_out if isinstance(collection, Indexed) else None
    kind = {Streams: "streamed shard", Videos: "video"}.get(type(collection), "image")
    count = collection.num_parts if collection.num_images is None else collection.num_images
    rest = f"; left out: {left_out}" if left_out else ""
    notice("data:", f"{collection.name}: {count} {kind}{'s' * (count != 1)}{rest}")


def _videos(data: str) -> list[str]:
    path = Path(data)
    if path.is_dir():
        below = (os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names)
        return sorted(name for name in below if _is_video(name))
    if not path.exists() and glob.has_magic(data):
        return sorted(name for name in glob.glob(data, recursive=True) if _is_video(name))
    return [data] if _is_video(data) else []


def _is_video(name: str) -> bool:
    return name.lower().endswith(VIDEO_SUFFIXES) and not os.path.basename(name).startswith(".")


def _decode(raw: Raw, spec: Preprocess) -> Any:
    return read_image(Path(raw.name), spec.channels, spec.pixel_max, content=raw.content)


def _unreadable(reason: str, _: Preprocess) -> Any:
    raise UnreadableImage(reason)
