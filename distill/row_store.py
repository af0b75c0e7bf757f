"""Rows of bytes on disk, each with a seal: what a kill left half written, and what a disk has damaged, does not count.

A row is written at its own place by one call, together with its seal, so any number of processes may write to the same
files without a lock: the worst that can happen is that a row does not fit its seal, and is written again. Reads and
writes by position, not a memory map: on a full disk a map ends the process with SIGBUS, and a file that somebody has
cut short does too.
"""

from __future__ import annotations

import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mae_deploy.machine import granted_cores

_SEAL_BYTES = 8
"""Before each row: 2**32 + the CRC of its bytes, which starts from its number. A hole in a file reads as 0, which is
the seal of no row."""

_SHARD_BYTES = 2**30

_READERS = 4
"""Threads that read and check rows; both leave Python's lock to others."""


class RowStore:
    """Rows of equal length, by number, in files of about a gigabyte that are as large on disk as the rows that were
    written.
    """

    def __init__(self, folder: Path, row_bytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.stride = _SEAL_BYTES + row_bytes
        """Bytes on disk of each row."""
        self._per_shard = max(1, _SHARD_BYTES // self.stride)
        self._files: dict[int, int] = {}
        self._readers = min(_READERS, granted_cores())
        self._pool = ThreadPoolExecutor(self._readers, thread_name_prefix="rows")

    def read(self, numbers: npt.NDArray[np.int64], rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
        """Read rows `(n, bytes)`, in place; returns `(n,)`: which of them are there. Of the others, the content is
        anything.
        """
        try:
            for shard in np.unique(numbers // self._per_shard):
                self._file(int(shard))
        except OSError:  # `write` says why
            return np.zeros(len(numbers), dtype=bool)

        def read_some(places: npt.NDArray[np.intp]) -> list[bool]:
            return [self._read_row(int(numbers[place]), rows[place].data) for place in places]

        found = self._pool.map(read_some, np.array_split(np.arange(len(numbers)), self._readers))
        return np.array([there for part in found for there in part], dtype=bool)

    def write(self, numbers: npt.NDArray[np.int64], rows: npt.NDArray[np.uint8]) -> None:
        """Write rows `(n, bytes)`.

        Raises:
            OSError: the disk is full, or does not take them for another reason.
        """
        for number, row in zip(numbers.tolist(), rows, strict=True):
            shard, place = divmod(number, self._per_shard)
            written = os.pwritev(self._file(shard), [_seal(number, row.data), row.data], place * self.stride)
            if written != self.stride:
                raise OSError(f"{written} of a row's {self.stride} bytes were written")

    def on_disk(self) -> int:
        """Bytes that the files take up."""
        return sum(file.stat().st_blocks * 512 for file in self.folder.glob("rows-*.bin"))

    def close(self) -> None:
        """Close the files."""
        self._pool.shutdown()
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    def _read_row(self, number: int, row: memoryview) -> bool:
        shard, place = divmod(number, self._per_shard)
        seal = bytearray(_SEAL_BYTES)
        try:
            read = os.preadv(self._files[shard], [seal, row], place * self.stride)
        except OSError:  # a bad sector
            return False
        return read == self.stride and seal == _seal(number, row)

    def _file(self, shard: int) -> int:
        if shard not in self._files:
            self._files[shard] = os.open(self.folder / f"rows-{shard:05d}.bin", os.O_RDWR | os.O_CREAT, 0o666)
        return self._files[shard]


def _seal(number: int, row: memoryview) -> bytes:
    return (2**32 + zlib.crc32(row, number & 0xFFFFFFFF)).to_bytes(_SEAL_BYTES, "little")
