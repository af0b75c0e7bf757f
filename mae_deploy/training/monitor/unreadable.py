"""Broken image files: each is named once, and too many end the run, on every process at the same step."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object

from mae_deploy.errors import CheckFailed
from mae_deploy.progress import notice


class Unreadable:
    """The run's `unreadable.txt`, which only the main process writes."""

    def __init__(self, run: Path, limit: int, accelerator: Accelerator) -> None:
        self.path = run / "unreadable.txt"
        self.limit = limit
        self.accelerator = accelerator
        # File names are bytes; those that are no UTF-8 are kept as they are.
        self.seen = (
            set(self.path.read_text(encoding="utf-8", errors="surrogateescape").splitlines())
            if self.path.is_file()
            else set[str]()
        )
        self._met: list[str] = []

    def add(self, lines: tuple[str, ...]) -> int:
        """Remember what this process has met; returns how many were not known."""
        found = list(dict.fromkeys(line for line in lines if line not in self.seen and line not in self._met))
        self._met += found
        return len(found)

    def share(self) -> None:
        """Name what any process has met; every process must come here.

        Raises:
            CheckFailed: more than the limit.
        """
        met = [line for line in dict.fromkeys(gather_object(self._met)) if line not in self.seen]
        self._met = []
        self.seen.update(met)
        if self.accelerator.is_main_process:
            self._write(met)
        if len(self.seen) > self.limit:
            raise CheckFailed(
                f"{len(self.seen)} unreadable images, listed in {self.path}",
                hint=f"mend them, or allow more than --max-corrupt {self.limit}",
            )

    def nothing_left(self, name: str) -> CheckFailed:
        """What to raise where this process finds not one image for a batch."""
        self._write(self._met)
        return CheckFailed(f"no readable image found below {name}", hint=f"the files are listed in {self.path}")

    def _write(self, lines: list[str]) -> None:
        with self.path.open("a", encoding="utf-8", errors="surrogateescape") as file:
            file.writelines(line + "\n" for line in lines)
        for line in lines:
            notice("skipped", line)
