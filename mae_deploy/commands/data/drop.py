"""Images that a table names, as `search` writes it, are left out of a data set."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping
from pathlib import Path

from mae_deploy.data.sources.base import Chosen, ImageSource
from mae_deploy.errors import ConfigError
from mae_deploy.file_kinds import read_whole
from mae_deploy.progress import notice
from mae_deploy.text import decode_text

_KEY = "key"


def without(splits: Mapping[str, ImageSource], table: Path) -> dict[str, ImageSource]:
    """The images of each split that the table does not name.

    Raises:
        ConfigError: no such table, or none of its images is here, or no other.
    """
    named = _named(table)
    found, seen = dict[str, ImageSource](), set[str]()
    for name, source in splits.items():
        keys = [_comparable(source.key(index)) for index in range(len(source))]
        kept = [index for index, key in enumerate(keys) if key not in named]
        seen.update(key for key in keys if key in named)
        if not kept:
            raise ConfigError(f"--drop-like {table} names every image of {source.name}")
        found[name] = source if len(kept) == len(source) else Chosen(source, kept, source.name)
    if named and not seen:
        data = " and ".join(source.name for source in splits.values())
        raise ConfigError(
            f"--drop-like {table}: none of its {len(named)} images is in {data}",
            hint="it names them by their paths when they were embedded; paths that are relative are meant from here",
        )
    missing = f", {len(named) - len(seen)} that it names are not here" if len(seen) < len(named) else ""
    notice("left out:", f"{len(seen)} images that {table} names{missing}")
    return found


def _named(table: Path) -> set[str]:
    try:
        text = decode_text(read_whole(table, 1 << 30), errors="surrogateescape")
    except OSError as error:
        raise ConfigError(f"cannot read --drop-like {table}: {error.strerror}") from error
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # by default 128 KiB
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise ConfigError(f"--drop-like {table} is no table: {error}") from error
    if rows and not rows[0].get(_KEY):
        raise ConfigError(
            f"--drop-like {table} has no column '{_KEY}'",
            hint="'mae-deploy search FEATURES --duplicates --out DIR' writes such a table",
        )
    return {_comparable(row[_KEY]) for row in rows if row[_KEY]}


def _comparable(key: str) -> str:
    """A key however its path was typed, as a table's UTF-8 has it."""
    return os.fsencode(os.path.abspath(key)).decode("utf-8", "replace")
