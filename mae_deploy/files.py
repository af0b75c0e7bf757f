"""Files that are never half written: write aside, flush, rename; and by one process at a time."""

from __future__ import annotations

import ctypes
import errno
import glob
import hashlib
import json
import mmap
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

from mae_deploy.errors import ConfigError
from mae_deploy.file_kinds import is_special, look_at, read_whole
from mae_deploy.machine import cache_folder
from mae_deploy.text import parse_json

if TYPE_CHECKING:
    from filelock import BaseFileLock

_ASIDE = ".partial-"
"""Prefix of what is being written; whatever carries it after a kill is rubbish."""

_LONGEST = 255
"""Bytes of a name, on all file systems in use."""

_QUERY_LIMITED_INFORMATION = 0x1000
"""The least right to another process on Windows, from its processthreadsapi.h."""


waiting: ContextVar[tuple[frozenset[Path], dict[Path, Path]]] = ContextVar("waiting", default=(frozenset(), {}))
"""Paths that get their names together (in `commands.stream.outputs`), and what of them is written, by where it is."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a neighbour of `path` to write (a file or a folder); rename it onto `path` if the block succeeds.

    A folder may replace nothing or an empty folder only; a file replaces a file. A link to a folder, or to nothing, is
    followed.

    Raises:
        ConfigError: `path` is a device or a pipe, which a file would replace for everybody.
    """
    if is_special(path):
        raise ConfigError(f"{path} is no file", hint="name one that is not there yet")
    paths, later = waiting.get()
    waits = path in paths
    path = _followed(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = aside_of(path, os.getpid())
    same = aside.name.removeprefix(f"{_ASIDE}{os.getpid()}-")
    for left in path.parent.glob(f"{_ASIDE}*-{glob.escape(same)}"):
        if not is_running(left.name.removeprefix(_ASIDE).partition("-")[0]):
            remove(left)
    remove(aside)
    try:
        yield aside
        _flush(aside)
        if waits:
            later[aside] = path
        else:
            os.replace(aside, path)
            _sync_folder(path.parent)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # a full disk: only where opening fails a file is named
            error.filename = os.fspath(path)
        raise
    finally:
        if aside not in later:
            remove(aside)


def _followed(path: Path) -> Path:
    """Where a link to a folder, or to nothing, leads."""
    return Path(os.path.realpath(path)) if path.is_symlink() and not path.is_file() else path


def aside_of(path: Path, process: int) -> Path:
    """Where a process writes what becomes `path`."""
    path = _followed(path)
    return beside(path, before=f"{_ASIDE}{process}-")


def beside(path: Path, *, before: str = "", after: str = "") -> Path:
    """The neighbour whose name is that of `path` between the two; of a name that leaves no room for them, its hash."""
    if len(os.fsencode(f"{before}{path.name}{after}")) > _LONGEST:
        return path.with_name(f"{before}{hashlib.sha256(os.fsencode(path.name)).hexdigest()}{after}")
    return path.with_name(f"{before}{path.name}{after}")


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step."""
    with atomic_path(path) as aside:
        aside.write_text(text, encoding="utf-8", errors="surrogateescape")  # names of files may be no UTF-8


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as indented JSON in one step."""
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        ConfigError: the file is missing, unreadable or not JSON.
    """
    try:
        return parse_json(read_whole(path))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    except ValueError as error:
        kind = look_at(path)
        if kind.stands_in:
            raise ConfigError(f"cannot read {path}: it is {kind.words}", hint=kind.hint) from error
        raise ConfigError(f"cannot read {path}: {error}") from error


def point_link(link: Path, target_name: str) -> None:
    """Make `link` a relative symlink to its sibling `target_name`, replacing an older link in one step.

    On a file system without links it becomes a small file with that name; `follow_link` reads both. A folder of that
    name, as a copy that followed links has it, is replaced too.
    """
    aside = link.with_name(f"{_ASIDE}{os.getpid()}-{link.name}")
    remove(aside)
    try:
        try:
            aside.symlink_to(target_name)
        except (OSError, NotImplementedError):  # FAT and some network shares; Windows without the right to make links
            aside.write_text(target_name, encoding="utf-8")
            _flush(aside)
        if link.is_dir() and not link.is_symlink():
            remove(link)
        os.replace(aside, link)
    finally:
        remove(aside)
    _sync_folder(link.parent)


def follow_link(link: Path) -> Path:
    """What `point_link` pointed `link` to; the path itself where it is a real link, a folder or absent."""
    if link.is_file() and link.stat().st_size < 256:
        name = link.read_text(encoding="utf-8", errors="replace").strip()
        if name and Path(name).name == name:
            return link.with_name(name)
    return link


def mapped(path: Path) -> mmap.mmap | bytes:
    """A file's bytes for whatever takes a buffer: they are read as they are needed, and fill no memory of the process.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""


def sha256(path: Path) -> str:
    """The hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def remove(path: Path) -> None:
    """Delete a file, a link or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_whole(folder: Path) -> None:
    """Delete a folder that nobody is to see half of: what a kill or an error leaves of it, `remove_partial` takes."""
    aside = folder.with_name(f"{_ASIDE}{os.getpid()}-{folder.name}")
    os.replace(folder, aside)
    remove(aside)


def remove_partial(folder: Path) -> None:
    """Delete what a killed process left half written in `folder`."""
    for path in folder.glob(f"{_ASIDE}*"):
        remove(path)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder until the block ends; those of processes of this machine that were killed go."""
    prefix = f"mae-deploy-{platform.node()}-"
    for left in Path(tempfile.gettempdir()).glob(f"{glob.escape(prefix)}*"):
        process = re.fullmatch(r"(\d+)-\w+", left.name.removeprefix(prefix))
        if process is not None and not is_running(process[1]):
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{prefix}{os.getpid()}-") as folder:
        yield Path(folder)


def refuse_to_overwrite(
    path: Path, *, option: str = "--out", hint: str | None = None, file: bool = False, filled: bool = False
) -> None:
    """Raise ConfigError if `path`, which an option asks for, is a file, a device or a folder with something in it.

    Args:
        file: a file is asked for, which no folder may be.
        filled: an empty folder is filled; else it is replaced, which would leave the working folder without its name.
    """
    if file and path.is_dir():
        raise ConfigError(f"{option} {path} is a folder", hint="name a file in it")
    if not filled and os.path.realpath(path) == os.getcwd():
        raise ConfigError(f"{option} {path} is the working folder", hint="name a folder in it that is not there yet")
    if (path.exists() and not path.is_dir()) or (path.is_dir() and any(path.iterdir())):
        raise ConfigError(
            f"{option} {path} already exists", hint=hint or f"choose another {option}, or remove it first"
        )


def refuse_within(path: Path, data: Path, *, option: str = "--out") -> None:
    """Raise ConfigError if `path`, which an option asks for, lies in a folder of images, among which it would be
    counted the next time.
    """
    real = Path(os.path.realpath(path))
    if data.is_dir() and Path(os.path.realpath(data)) in (real, *real.parents):
        raise ConfigError(f"{option} {path} lies within {data}, as one of its images", hint=f"choose another {option}")


def is_running(process: int | str) -> bool:
    """Whether a process of this number is at work here."""
    try:
        if sys.platform == "win32":  # where os.kill would send it Ctrl-C
            kernel = ctypes.windll.kernel32
            handle = kernel.OpenProcess(_QUERY_LIMITED_INFORMATION, False, int(process))
            kernel.CloseHandle(handle)
            return bool(handle)
        os.kill(int(process), 0)
    except PermissionError:
        return True
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    return True


def _flush(path: Path) -> None:
    """Push the content to the disk before the rename, so that a power cut cannot leave an empty file."""
    for found in [path, *path.rglob("*")] if path.is_dir() else [path]:
        if found.is_dir():
            _sync_folder(found)
        elif found.is_file():
            with found.open("r+b" if os.name == "nt" else "rb") as handle:  # Windows flushes only what may be written
                os.fsync(handle.fileno())


def _sync_folder(path: Path) -> None:
    """Push the names in a folder to the disk, so that after a power cut a rename has not come before what it needs."""
    if os.name == "nt":  # no folder can be opened there
        return
    try:
        folder = os.open(path, os.O_RDONLY)
    except OSError:  # it may be written, but not read
        return
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # file systems that know nothing of the kind
            raise
    finally:
        os.close(folder)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file alone among all processes and threads; a process that dies lets go of it, and the file stays.

    Raises:
        OSError: the file cannot be written.
    """
    from filelock import FileLock  # here: it takes 40 ms, and most commands lock nothing

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path):
        yield


@contextmanager
def alone_at(path: Path, *, option: str = "--out") -> Iterator[None]:
    """Keep what an option names from all other processes of this user until the block ends, or the process dies. The
    lock is a file among the caches, so nothing is left beside `path`, and its folder need not be there yet.

    Raises:
        ConfigError: another process is at work on it.
    """
    from mae_deploy.progress import notice  # here: a device that embeds the runtime has no rich

    name = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()
    file = cache_folder("outputs") / f"{name[:32]}.lock"
    busy = f"{option} {path} is being written by another process"
    try:
        lock = take_lock(file, busy=busy, hint=f"wait until that has ended, or choose another {option}")
    except OSError as error:
        notice("no lock:", f"nothing keeps another process from {option} {path}, as {file} cannot be written: {error}")
        yield
        return
    try:
        yield
    finally:
        remove(file)  # while it is held: who waits for it sees that it is gone, and makes a new one
        lock.release()


def take_lock(path: Path, *, busy: str, hint: str) -> BaseFileLock:
    """A lock that no other process has, on any machine that sees the file, until it is released; a process that dies
    lets go of it, and the file stays.

    Raises:
        ConfigError: another one has it; says `busy`.
    """
    from filelock import FileLock, Timeout  # here: it takes 40 ms

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ConfigError(busy, hint=hint) from error
    return lock


def is_inside(name: str) -> bool:
    """Whether a name is below the bundle's folder; links there may lead into a store, of which the hash decides."""
    parts = re.split(r"[/\\]", name)
    return ".." not in parts and "\0" not in name and not PureWindowsPath(name).anchor
