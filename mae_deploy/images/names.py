"""What a command is given in place of images: files, folders, patterns, and lists of them."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mae_deploy.errors import ConfigError
from mae_deploy.file_kinds import read_whole
from mae_deploy.text import decode_text

_STDIN = "-"
_LIST = "@"
_SHOWN = 3
_PATH = 1000
"""Characters of a name that is shown whole."""
_LONGEST = 40


@dataclass(frozen=True, slots=True)
class Named:
    """A file or folder that is there."""

    path: Path
    matched: bool = False
    """Whether a pattern matched it: what is no image is then left out, as in a folder."""


def expand(names: Sequence[Path]) -> list[Named]:
    """The files and folders that are named, in order, each as often as it is named: by themselves, by a pattern with
    `*`, `?` or `[`, by `@list.txt`, a file with a path a line, or by `-`, such lines on standard input. The name of a
    file or folder that is there always stands for itself.

    Raises:
        ConfigError: one that is not there, a pattern that matches nothing, or a list that cannot be read.
    """
    return [named for name in names for named in _expanded(name)]


def described(names: Sequence[Path]) -> str:
    """The names for a message."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join("standard input" if str(name) == _STDIN else str(name) for name in names[:_SHOWN]) + more


def _expanded(name: Path) -> Iterator[Named]:
    text = str(name)
    if text == _STDIN:
        yield from _listed(sys.stdin.buffer.read() if sys.stdin is not None else b"", "standard input")
    elif os.path.exists(name):
        yield Named(name)
    elif text.startswith(_LIST):
        try:
            content = read_whole(Path(text[len(_LIST) :]), 1 << 30, pipes=True)
        except OSError as error:
            raise ConfigError(f"cannot read the list {text[len(_LIST) :]}: {error.strerror}") from error
        yield from _listed(content, text[len(_LIST) :])
    elif glob.has_magic(text):
        if not (found := sorted(glob.glob(text, recursive=True))):
            raise ConfigError(f"no file matches '{text}'", hint="** stands for folders at any depth")
        yield from (Named(Path(match), matched=True) for match in found)
    else:
        raise ConfigError(f"no such file or folder: {_printable(text)}")


def _listed(content: bytes, where: str) -> Iterator[Named]:
    """The paths of a list, one a line, or each with a null character behind it, as `find -print0` writes them."""
    text = decode_text(content, errors="surrogateescape")
    lines = text.split("\0") if "\0" in text else [line.removesuffix("\r") for line in text.split("\n")]
    paths = [Path(line) for line in lines if line.strip()]
    if not paths:
        raise ConfigError(f"{where} names no image", hint="write one path a line")
    missing = [path for path in paths if not os.path.lexists(path)]  # whoever reads a broken link reports it
    if missing:
        raise ConfigError(
            f"{len(missing)} of the {len(paths)} paths in {where} are not there: {_printable(str(missing[0]))}",
            hint="write one path a line, as seen from this folder",
        )
    yield from map(Named, paths)


def _printable(text: str) -> str:
    """A name as it is, unless it is none: an image's bytes, say."""
    return text if text.isprintable() and len(text) < _PATH else f"{text[:_LONGEST]!r}"
