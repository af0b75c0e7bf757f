"""Tar shards written member by member, as other programs write them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

Member = tuple[str, bytes]


def write_shard(path: Path, members: Sequence[Member]) -> Path:
    """A tar of these names and contents."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def shards_of(images: Path, folder: Path, *, per_shard: int = 4, labelled: bool = False) -> Path:
    """The images below a folder in their order, as `shard-N.tar`; with `.cls` 0, 1, 2, 0, … where labelled."""
    files = sorted(images.rglob("*.png"))
    for first in range(0, len(files), per_shard):
        members: list[Member] = []
        for number, file in enumerate(files[first : first + per_shard], first):
            members.append((f"{number:04d}.png", file.read_bytes()))
            if labelled:
                members.append((f"{number:04d}.cls", f"{number % 3}\n".encode()))
        write_shard(folder / f"shard-{first // per_shard}.tar", members)
    return folder
