"""Outputs of many images on their way to one file: each batch goes to disk as it comes, and a killed run goes on."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from mae_deploy.errors import ConfigError, import_optional
from mae_deploy.files import atomic_path, beside, refuse_to_overwrite, remove, take_lock
from mae_deploy.images.read import Array

if TYPE_CHECKING:
    from filelock import BaseFileLock
    from typing_extensions import Self

PATHS = "paths"
"""The column of file names beside the outputs."""

SUFFIXES = (".npz", ".parquet")

_LOG = "log.jsonl"
"""A line each: what is computed, the columns, then after each batch how far it has come."""

_CHUNK_BYTES = 1 << 20

_SYNC_EVERY = 1.0
"""Seconds of work that a power cut may cost."""


def check_features(path: Path, suffixes: Sequence[str] = SUFFIXES) -> None:
    """Say what would stop the writing of features before an hour is spent on computing them.

    Raises:
        ConfigError: a file of another kind, or one that is there.
        MissingDependency: Parquet without pyarrow.
    """
    if path.suffix not in suffixes:
        raise ConfigError(f"--out {path} must end in {', '.join(suffixes[:-1])} or {suffixes[-1]}")
    if path.is_file():
        remove(_rows_beside(path))  # of a kill between the writing of the file and their removal
    refuse_to_overwrite(path, file=True)
    if path.suffix == ".parquet":
        import_optional("pyarrow", extra="parquet")


def _rows_beside(path: Path) -> Path:
    return beside(path, after=".partial")


class FeatureFile:
    """A row for each image, `paths` and every output `(B, ...)`, as .npz or .parquet; in Parquet an axis beyond the
    first is a fixed-size list.

    Until `finish`, the rows lie in a folder beside the file, `NAME.partial`, where a call with the same `identity` goes
    on after a kill. Memory does not grow with their number.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], *, fresh: bool = False) -> None:
        """Nothing is written before the first row.

        Args:
            identity: what is computed, in plain JSON values.
            fresh: begin anew where a killed call has left rows.

        Raises:
            ConfigError: another suffix, rows of another identity, or another process at work on them.
            MissingDependency: Parquet without pyarrow.
        """
        if path.suffix not in SUFFIXES:
            raise ConfigError(f"cannot write features to {path}", hint=f"known suffixes: {', '.join(SUFFIXES)}")
        if path.suffix == ".parquet":
            import_optional("pyarrow", extra="parquet")
        self.path, self.folder = path, _rows_beside(path)
        self.done = 0
        """How many images are behind us, those that could not be read too."""
        self.rows = 0
        self.left_out: list[tuple[str, str]] = []
        """Those that could not be read, and why."""
        self._identity = json.loads(json.dumps(dict(identity)))
        self.columns: dict[str, tuple[str, tuple[int, ...]]] = {}
        """Type and shape of a row of each output, once there is one."""
        self._files: dict[str, IO[bytes]] = {}
        self._lock: BaseFileLock | None = None
        self._pending: list[Any] = []
        """Lines of batches that may not be on the disk yet."""
        self._synced = -math.inf
        self._begun, self._fresh = False, fresh
        if self.folder.is_dir():
            self._acquire()
            try:
                if not fresh:
                    self._resume()
            except BaseException:
                self.close()
                raise

    def add(
        self, names: Sequence[str], outputs: Mapping[str, Array], *, done: int, left_out: Sequence[tuple[str, str]] = ()
    ) -> None:
        """Append a row for each name.

        Args:
            done: how many images are behind us with these.
            left_out: those since the last call that could not be read, and why.

        Raises:
            ConfigError: an output of another length, type or row than before, or one called `paths`.
        """
        for name, array in outputs.items():
            column = (array.dtype.str, array.shape[1:])
            if name == PATHS or array.shape[:1] != (len(names),) or self.columns.get(name, column) != column:
                raise ConfigError(
                    f"cannot write the output '{name}' of shape {array.shape} beside {len(names)} {PATHS}"
                )
        if not self._files:
            self._begin({name: (array.dtype.str, array.shape[1:]) for name, array in outputs.items()})
        for name, array in outputs.items():
            self._files[name].write(np.ascontiguousarray(array).data)
        self._files[PATHS].write(b"".join(os.fsencode(name) + b"\0" for name in names))
        self.rows, self.done = self.rows + len(names), done
        self.left_out += left_out
        sizes = {name: file.tell() for name, file in self._files.items() if name != _LOG}
        if self._fresh:  # nobody goes on with these
            return
        self._pending.append({"done": done, "rows": self.rows, "left_out": list(left_out), "bytes": sizes})
        if time.monotonic() - self._synced > _SYNC_EVERY:
            self._sync()

    def chunks(self, name: str, rows: int | None = None) -> Iterator[Array]:
        """An output so far, some rows at a time: `rows`, or what fits 1 MiB."""
        dtype, shape = self.columns[name]
        rows = rows or self.rows_a_chunk(name)
        with self._place(name).open("rb") as file:
            for first in range(0, self.rows, rows):
                count = min(rows, self.rows - first)
                yield np.fromfile(file, dtype, count * math.prod(shape)).reshape(count, *shape)

    def rows_a_chunk(self, name: str) -> int:
        """How many rows of an output fit 1 MiB."""
        dtype, shape = self.columns[name]
        return max(1, _CHUNK_BYTES // max(1, math.prod(shape) * np.dtype(dtype).itemsize))

    def names(self) -> Iterator[str]:
        """The file name of every row so far."""
        with self._place(PATHS).open("rb") as file:
            rest = b""
            while chunk := file.read(1 << 20):
                *whole, rest = (rest + chunk).split(b"\0")
                yield from map(os.fsdecode, whole)

    def copy_to(self, name: str, file: IO[bytes]) -> None:
        """The bytes of an output's rows."""
        with self._place(name).open("rb") as source:
            shutil.copyfileobj(source, file, _CHUNK_BYTES)

    def finish(self) -> None:
        """Write the file in one step from the rows; `close` then removes their folder."""
        write = _write_npz if self.path.suffix == ".npz" else _write_parquet
        for file in self._files.values():
            file.flush()
        with atomic_path(self.path) as aside:
            write(aside, self)
        self._pending.clear()
        self.close()
        remove(self.folder)

    def close(self) -> None:
        """Close what is open; the rows stay for another call, unless there are none."""
        with ExitStack() as stack:  # on a full disk, a file's last bytes fail as it is closed
            if self._begun and not self.rows:
                stack.callback(remove, self.folder)
            if self._lock is not None:
                stack.callback(self._lock.release)
            stack.callback(self._files.clear)
            for file in self._files.values():
                stack.callback(file.close)
            if self._pending and self.rows:
                stack.callback(self._sync)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _acquire(self) -> None:
        busy = f"another process is writing {self.path}"
        self._lock = take_lock(self.folder / "lock", busy=busy, hint="choose another --out")

    def _begin(self, columns: dict[str, tuple[str, tuple[int, ...]]]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._lock is None:
            self._acquire()
        self._begun = True
        self.columns = columns
        for name in (*columns, PATHS, _LOG):
            self._files[name] = self._place(name).open("wb")
        self._pending = [self._identity, columns]

    def _sync(self) -> None:
        """Push the rows to the disk, then the lines that say that they are there."""
        log, pending = self._files[_LOG], self._pending
        self._pending = []  # what fails is not tried again: half of it may be there
        for file in self._files.values():  # the log is the last of them
            if file is log:
                file.write(b"".join(json.dumps(line).encode() + b"\n" for line in pending))
            file.flush()
            os.fsync(file.fileno())
        self._synced = time.monotonic()

    def _resume(self) -> None:
        """Go on behind the last batch that is whole on disk: what was written behind it is cut off."""
        log = self._place(_LOG)
        lines = log.read_bytes().split(b"\n")[:-1] if log.is_file() else []  # behind the last line end, half a line
        if len(lines) < 3:
            return
        identity, columns = json.loads(lines[0]), json.loads(lines[1])
        if differing := [key for key in {**identity, **self._identity} if identity.get(key) != self._identity.get(key)]:
            raise ConfigError(
                f"{self.folder} has rows of a call with other {', '.join(differing)}",
                hint="remove it, or choose another --out",
            )
        self.columns = {name: (dtype, tuple(shape)) for name, (dtype, shape) in columns.items()}
        batches = [json.loads(line) for line in lines[2:]]
        while batches and any(self._size(name) < size for name, size in batches[-1]["bytes"].items()):
            batches.pop()
        if not batches:
            return
        self.rows, self.done = batches[-1]["rows"], batches[-1]["done"]
        self.left_out = [(path, reason) for batch in batches for path, reason in batch["left_out"]]
        sizes = {**batches[-1]["bytes"], _LOG: sum(len(line) + 1 for line in lines[: 2 + len(batches)])}
        for name, size in sizes.items():
            self._files[name] = file = self._place(name).open("r+b")
            file.truncate(size)
            file.seek(size)

    def _place(self, name: str) -> Path:
        """The file of an output, by its number: a bundle may call it anything."""
        return self.folder / (name if name == _LOG else f"{[PATHS, *self.columns].index(name)}.bin")

    def _size(self, name: str) -> int:
        return self._place(name).stat().st_size if self._place(name).is_file() else 0


def _write_npz(path: Path, rows: FeatureFile) -> None:
    """As `np.savez`, which would hold all of it in memory."""
    longest = max((len(name) for name in rows.names()), default=0) or 1
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open(f"{PATHS}.npy", "w", force_zip64=True) as member:
            _write_header(member, np.dtype(f"<U{longest}").str, (rows.rows,))
            for name in rows.names():
                member.write(name.encode("utf-32-le", "surrogatepass").ljust(4 * longest, b"\0"))
        for name, (dtype, shape) in rows.columns.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                _write_header(member, dtype, (rows.rows, *shape))
                rows.copy_to(name, member)


def _write_header(file: Any, dtype: str, shape: tuple[int, ...]) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})


def _write_parquet(path: Path, rows: FeatureFile) -> None:
    arrow, parquet = import_optional("pyarrow", extra="parquet"), import_optional("pyarrow.parquet", extra="parquet")
    writer = None
    with path.open("wb") as file:  # pyarrow takes no name that is not UTF-8
        try:
            for table in _tables(arrow, rows):
                writer = writer or parquet.ParquetWriter(file, table.schema)
                writer.write_table(table)
        finally:
            if writer is not None:
                writer.close()


def _tables(arrow: Any, rows: FeatureFile) -> Iterator[Any]:
    """The rows, some at a time."""
    step = min(map(rows.rows_a_chunk, rows.columns))
    paths = rows.names()
    for arrays in zip(*(rows.chunks(name, step) for name in rows.columns), strict=True):
        # Parquet's text is UTF-8: a file name in another encoding is shown with replacement characters.
        names = [os.fsencode(name).decode("utf-8", "replace") for name in islice(paths, len(arrays[0]))]
        columns = {PATHS: arrow.array(names, type=arrow.string())}
        for name, array in zip(rows.columns, arrays, strict=True):
            column = arrow.array(array.reshape(-1))
            for size in reversed(array.shape[1:]):
                column = arrow.FixedSizeListArray.from_arrays(column, size)
            columns[name] = column
        yield arrow.table(columns)
