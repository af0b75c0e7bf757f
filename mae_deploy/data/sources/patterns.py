"""Names of shards: folders, brace and glob patterns, URLs and commands."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path

from mae_deploy.errors import ConfigError, import_optional
from mae_deploy.images.left_out import LeftOut

_PART = re.compile(r"(.*?)(\d+)-of-(\d+)(\.\w+)")

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def is_streamed(data: str) -> bool:
    """Whether it names shards that can only be read from front to back: URLs, `pipe:` commands and compressed tars."""
    return data.startswith("pipe:") or "://" in data.partition("{")[0] or data.lower().endswith(_COMPRESSED)


def is_shards(data: str) -> bool:
    """Whether it names local, uncompressed tar files: a file, a pattern, or a folder that directly holds some."""
    if Path(data).is_dir():
        return bool(shards_in(Path(data)))
    return all(name.lower().endswith(".tar") for name in expand(data))


def files_of(folder: Path, suffix: str, pattern: str = "*") -> list[Path]:
    """The files of a suffix in a folder in order, without hidden ones, which `data pack` may not have finished."""
    return sorted(
        path
        for path in folder.glob(pattern)
        if path.suffix.lower() == suffix and not path.name.startswith(".") and path.is_file()
    )


def shards_in(folder: Path) -> list[Path]:
    """The tar files of a folder in order."""
    return files_of(folder, ".tar")


def missing_parts(paths: Sequence[Path], left_out: LeftOut) -> None:
    """Count the files that the names of the others speak of and that are not there: `train-00000-of-00002.parquet`."""
    there = {path.parent / path.name for path in paths}
    for path in paths:
        if (match := _PART.fullmatch(path.name)) is None:
            continue
        stem, number, total, suffix = match.groups()
        for part in range(int(total)):
            other = path.with_name(f"{stem}{part:0{len(number)}d}-of-{total}{suffix}")
            if other not in there and not other.exists():
                left_out.add("missing parts", other.name)
                there.add(other)


def local_shards(data: str) -> list[Path]:
    """The tar files that a name, a pattern or a folder stands for, in order.

    Raises:
        ConfigError: one is missing, or there is none.
    """
    if Path(data).is_dir():
        return shards_in(Path(data))
    found: list[Path] = []
    for name in expand(data):
        matches = (
            [Path(match) for match in sorted(glob.glob(name, recursive=True))] if glob.has_magic(name) else [Path(name)]
        )
        if missing := [match for match in matches if not match.is_file()] or ([] if matches else [Path(name)]):
            raise ConfigError(
                f"no such shard: {missing[0]}", hint=f"expanded from {data}" if str(missing[0]) != data else None
            )
        found += matches
    return found


def expand(data: str) -> list[str]:
    """The names that a pattern with braces stands for: `shards-{000..099}.tar`; the name of a file that is there stands
    for itself.
    """
    if "{" not in data or Path(data).exists():
        return [data]
    braceexpand = import_optional("braceexpand", extra="train")
    try:
        return list(braceexpand.braceexpand(data))
    except braceexpand.UnbalancedBracesError as error:
        raise ConfigError(f"{data} has a brace without its counterpart", hint="shards-{000000..000099}.tar") from error
