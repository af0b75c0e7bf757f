"""One process at a time writes a run folder: a file in it names host and process.

It needs neither links nor locks of the file system, which network shares and object stores lack.
"""

from __future__ import annotations

import json
import math
import os
import platform
import threading
import time
from pathlib import Path
from typing import Any

from mae_deploy.errors import ConfigError
from mae_deploy.files import is_running, remove
from mae_deploy.machine import process_numbers, process_start
from mae_deploy.progress import notice

LOCK = "running.json"

_BEAT = 20.0
"""Seconds between signs of life."""

_SILENT = 300.0
"""Seconds without one after which a process of another host, which cannot be asked for, counts as dead."""

_BEATS = 3
"""Signs of life that a process of another container on this host is waited for."""

_WRITING = 1.0
"""Seconds in which a lock's content follows its name."""


def _own() -> dict[str, Any]:
    """What a lock says of this process."""
    return {
        "host": platform.node(),
        "process": os.getpid(),
        "numbers": process_numbers(),
        "started": process_start(os.getpid()),
    }


class RunLock:
    """Held from `acquire` to `release`; a process that dies leaves it behind, and the next one takes it over."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self._ended = threading.Event()

    def acquire(self) -> None:
        """Take the lock, or take it over from a dead process, which a line says.

        Raises:
            ConfigError: a process at work holds it.
        """
        while True:
            try:
                with self.path.open("x", encoding="utf-8") as file:
                    file.write(json.dumps(_own()))
                break
            except FileExistsError:
                self._take_over()
        threading.Thread(target=self._beat, daemon=True).start()

    def release(self) -> None:
        """Give it back."""
        self._ended.set()
        remove(self.path)

    def _take_over(self) -> None:
        """Remove the lock of a dead process."""
        before = self._read()
        if before is None:
            return  # released in the meantime
        holder = f"process {before.get('process')} on {before.get('host')}"
        if self._alive(before):
            raise ConfigError(
                f"--out {self.path.parent} is being written by {holder}",
                hint=f"wait until that has ended, or stop it; where it is not there any more, remove {self.path}",
            )
        aside = self.path.with_name(f".partial-{os.getpid()}-{LOCK}")
        try:
            os.replace(self.path, aside)  # of several who come here, one gets it
        except FileNotFoundError:
            return
        remove(aside)
        if before and before.get("process") != os.getpid():
            notice("taken over:", f"{self.path.parent}, which {holder} has left behind")

    def _read(self) -> dict[str, Any] | None:
        """Who holds it: empty where a crash left a file without content, None where nobody does."""
        for _ in range(10):
            try:
                found = json.loads(self.path.read_text(encoding="utf-8"))
                return found if isinstance(found, dict) else {}
            except FileNotFoundError:
                return None
            except ValueError:
                time.sleep(_WRITING / 10)
        return {}

    def _alive(self, holder: dict[str, Any]) -> bool:
        process = holder.get("process")
        here = holder.get("host") == platform.node()
        if not holder or (here and holder.get("numbers") in (None, process_numbers())):
            # Its own number is that of a process before it, and another's may have been given anew.
            return (
                isinstance(process, int)
                and process != os.getpid()
                and is_running(process)
                and holder.get("started") in (None, process_start(process))
            )
        if not here:
            return self._age() < _SILENT
        # Another container, which may count its processes from 1 and have the same name: it has stopped, or works.
        before, age = self._beaten(), self._age()
        while before is not None and age < _BEATS * _BEAT:
            time.sleep(_BEAT / 10)
            if self._beaten() != before:
                return self._beaten() is not None
            age = self._age()
        return False

    def _beaten(self) -> int | None:
        """When it last gave a sign of life; None: it is gone."""
        try:
            return self.path.stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def _age(self) -> float:
        """Seconds since then."""
        clock = self.path.with_name(f".partial-{os.getpid()}-clock")
        try:
            clock.touch()  # the file server's clock, not this machine's
            return clock.stat().st_mtime - self.path.stat().st_mtime
        except FileNotFoundError:
            return math.inf
        finally:
            remove(clock)

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT):
            try:
                os.utime(self.path)
            except OSError:  # the share may be away for a moment
                continue
