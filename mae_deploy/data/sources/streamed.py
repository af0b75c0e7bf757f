"""Tar shards that can only be read from front to back, from URLs, `pipe:` commands and compressed files, by the
WebDataset library. No torch here.
"""

from __future__ import annotations

import contextlib
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from tarfile import EOFHeaderError  # type: ignore[attr-defined]
from typing import Any

from mae_deploy.data.sources.members import (
    BESIDE,
    TWICE,
    arrays_beside,
    group_key,
    kind_of,
    kind_of_member,
    label_of,
    label_stem,
)
from mae_deploy.data.sources.shards import read_label
from mae_deploy.errors import ConfigError
from mae_deploy.file_kinds import TarMember
from mae_deploy.images.left_out import LeftOut

_TWICE_USED = "that came before under the same name, in a stream both used"

_LARGEST_SAMPLE = 64
"""Members that are held at a time to find labels among them: `scan.2023.000.jpg`, `scan.2023.001.jpg`, … are one sample
to WebDataset, and could be a whole shard.
"""


@dataclass(frozen=True, slots=True)
class Raw:
    """One image as the shard holds it."""

    name: str
    content: bytes
    label: int


@dataclass(slots=True)
class Said:
    """What there is to say since it was last taken."""

    errors: list[str] = field(default_factory=list)
    left_out: LeftOut = field(default_factory=LeftOut)

    def take(self) -> tuple[list[str], LeftOut]:
        """It, which is then forgotten here."""
        taken = self.errors, self.left_out
        self.errors, self.left_out = [], LeftOut()
        return taken


def read_shards(urls: Iterator[str], said: Said) -> Iterator[Raw]:
    """The images of some shards, one shard after the other; a broken shard is named, and left where it breaks."""
    for url in urls:
        try:
            yield from read_shard(url, said)
        except Exception as error:  # of any kind, from the network or a command
            said.errors.append(f"{url}: {' '.join(str(error).split())}")


class _Member(TarMember):
    """A member, or the mark behind the last one."""

    @classmethod
    def fromtarfile(cls, archive: Any) -> Any:
        try:
            return super().fromtarfile(archive)
        except EOFHeaderError:
            archive.ended = True
            raise


class _Tar(tarfile.TarFile):
    """A tar that knows whether its mark came, which `tarfile` does not say."""

    tarinfo = _Member
    ended = False


def read_shard(url: str, said: Said, *, whole: bool = False) -> Iterator[Raw]:
    """The images of a shard, those before the place where it breaks too.

    Args:
        whole: a shard without the mark that ends a tar breaks there: a connection that was closed in between looks like
            an end.

    Raises:
        Exception: of any kind, from the network or a command.
    """
    from webdataset.gopen import gopen

    names, place, sample = set[str](), "", dict[str, bytes]()
    broken: Exception | None = None
    try:
        with _closing(gopen(url)) as stream, _Tar.open(fileobj=stream, mode="r|*") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # else it keeps every header
                if member.isdir():
                    continue
                name, kind = kind_of_member(member, said.left_out)
                if kind not in ("image", "label"):
                    continue
                if sample and (group_key(name) != place or len(sample) == _LARGEST_SAMPLE):
                    yield from _images_of(url, sample, said)
                    sample = {}
                if name in names:
                    said.left_out.add(TWICE if name in sample else _TWICE_USED, name)
                names.add(name)
                place, sample[name] = group_key(name), _content(tar, member)
            if whole and not tar.ended:
                raise EOFError("it ends before the mark that ends a tar")
    except Exception as error:
        broken = error
    yield from _images_of(url, sample, said)
    if broken is not None:
        raise broken


@contextlib.contextmanager
def _closing(stream: Any) -> Iterator[Any]:
    """webdataset raises where a command is stopped before its end, as one that is not read further is."""
    try:
        yield stream
    finally:
        with contextlib.suppress(Exception):
            stream.close()


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None  # a regular file
    return file.read()


def _images_of(url: str, sample: dict[str, bytes], said: Said) -> Iterator[Raw]:
    """The images among members that follow one another and are called the same up to the first dot."""
    labels: dict[str, int] = {}
    for name in (name for name in sample if kind_of(name) == "label"):
        try:
            labels[label_stem(name)] = read_label(sample[name], f"{url}/{name}")
        except ConfigError as error:
            said.errors.append(str(error))
    images = [name for name in sample if kind_of(name) == "image"]
    beside = arrays_beside(images)
    for name in images:
        if name in beside:
            said.left_out.add(BESIDE, name)
        else:
            yield Raw(f"{url}/{name}", sample[name], label_of(name, labels))
