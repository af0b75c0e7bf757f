"""The disk that commands write to: one that can be full or read-only, where this process may mount one."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PAGE = 4096


class Disk:
    """A folder; a file system of its own where that is allowed."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.mounted = os.name == "posix" and self._mount("-t", "tmpfs", "tmpfs")

    def used(self) -> int:
        """Bytes of all files, in whole pages."""
        files = (path for path in self.folder.rglob("*") if path.is_file() and not path.is_symlink())
        return sum(-(-path.stat().st_size // PAGE) * PAGE for path in files)

    @contextmanager
    def full_after(self, size: int) -> Iterator[int | None]:
        """Room for so many bytes within the block; yields what a file may have where the disk cannot be limited."""
        if not self.mounted:
            yield size
            return
        self._mount("-o", f"remount,size={self.used() + size}")
        try:
            yield None
        finally:
            self._mount("-o", "remount,size=50%")

    @contextmanager
    def read_only(self) -> Iterator[bool]:
        """Nothing can be written within the block; yields whether that is so."""
        if self.mounted:
            self._mount("-o", "remount,ro")
        else:
            self._allow(0o555)
        try:
            yield self.mounted or os.geteuid() != 0
        finally:
            self._mount("-o", "remount,rw") if self.mounted else self._allow(0o755)

    def close(self) -> None:
        """Give it back."""
        if self.mounted:
            subprocess.run(["umount", "--lazy", self.folder], check=True)

    def _mount(self, *arguments: str) -> bool:
        try:
            return subprocess.run(["mount", *arguments, self.folder], capture_output=True).returncode == 0
        except OSError:
            return False

    def _allow(self, mode: int) -> None:
        for folder in [self.folder, *(path for path in self.folder.rglob("*") if path.is_dir())]:
            folder.chmod(mode)
