"""Several outputs of one command, which appear one right after the other: a kill between two is made good by the same
call.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mae_deploy.errors import ConfigError
from mae_deploy.files import aside_of, beside, is_running, read_json, remove, waiting, write_json


@contextmanager
def appearing_together(paths: Sequence[Path], call: str) -> Iterator[None]:
    """What `atomic_path` writes at these paths within the block is renamed at its end, once all of it is on the disk;
    where the block fails, what is whole appears nevertheless.

    Args:
        call: the command, by which `finish_appearing` knows what it may go on with.
    """
    if len(paths) < 2:
        yield
        return
    record = _record(paths)
    remove(record)
    written: dict[Path, Path] = {}
    before = waiting.set((frozenset(paths), written))
    try:
        yield
    finally:
        waiting.reset(before)
        if len(written) > 1:
            write_json(record, {"process": os.getpid(), "call": call})
        for aside, path in written.items():
            os.replace(aside, path)
        remove(record)


def finish_appearing(paths: Sequence[Path], call: str) -> bool:
    """Whether this very call was killed when its outputs were whole; those without their names get them."""
    record = _record(paths) if len(paths) > 1 else None
    if record is None or not record.is_file():
        return False
    try:
        found = read_json(record)
    except ConfigError:  # somebody else's
        return False
    process = found.get("process") if isinstance(found, dict) else None
    if not isinstance(process, int) or found.get("call") != call or is_running(process):
        return False
    for path in paths:
        if not path.exists() and (aside := aside_of(path, process)).exists():
            os.replace(aside, path)
    remove(record)
    return all(path.exists() for path in paths)


def _record(paths: Sequence[Path]) -> Path:
    return beside(paths[0], after=".unfinished")
