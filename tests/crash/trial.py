"""A command in a process of its own, what it leaves, and what is wrong with that."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from mae_deploy.cli import main as command
from mae_deploy.training.state.progress import damage
from tests.crash.cases import CASES
from tests.crash.disk import Disk
from tests.training.tiny_runs import start_process

_CHANGES = ("os.rename", "os.symlink", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link")
_REMOVALS = ("os.remove", "os.rmdir")
_WAIT = 600
_INHERITED = ("HF_ENDPOINT", "HF_TOKEN")


class Trial:
    """A command, what it writes where nothing stops it, and how long that takes."""

    def __init__(self, name: str, root: Path, disk: Disk) -> None:
        self.name, self.case, self.root, self.disk = name, CASES[name], root, disk
        self.place = disk.folder / "place"
        self.out = self.place / f"out{self.case.suffix}"
        self.log = disk.folder.with_name("log.txt")
        self.lay_out()
        began = time.monotonic()
        code = self.run(self.arguments())
        self.seconds = time.monotonic() - began
        if code != 0:
            raise RuntimeError(f"{name} as it is: {code}\n{self.said()}")
        self.changes = int(self.log.with_name("changes").read_text())
        self.size = disk.used()
        self.whole = self.digest()

    def lay_out(self) -> None:
        """The disk as it is before the command."""
        for path in self.disk.folder.iterdir():
            shutil.rmtree(path)
        for name in ("place", "tmp", "cache"):
            (self.disk.folder / name).mkdir()
        if self.case.start is not None:
            self.case.start(self.root, self.out)

    def arguments(self, *more: str, out: Path | None = None, root: Path | None = None) -> list[str]:
        """Of the command."""
        return [str(word) for word in (*self.case.arguments(root or self.root, out or self.out), *more)]

    def start(self, arguments: list[str], *, log: Path | None = None, **given: Any) -> ForkServerProcess:
        """The command in a process of its own; returns when it begins.

        Args:
            given: what `_child` takes.
        """
        begun = self.log.with_name("begun")
        begun.unlink(missing_ok=True)
        environment = {name: os.environ[name] for name in _INHERITED if name in os.environ}
        environment |= {"MAE_DEPLOY_CACHE": str(self.disk.folder / "cache"), "TMPDIR": str(self.disk.folder / "tmp")}
        process = start_process(_child, self.name, arguments, self.place, log or self.log, environment, given)
        while not begun.exists() and process.is_alive():
            time.sleep(0.002)
        return process

    def run(self, arguments: list[str], **given: Any) -> int | None:
        """Its exit code."""
        process = self.start(arguments, **given)
        process.join(_WAIT)
        return process.exitcode

    def said(self) -> str:
        """What the last call said."""
        return self.log.read_text(errors="replace") if self.log.is_file() else ""

    def digest(self, out: Path | None = None) -> Mapping[str, str]:
        """What is there."""
        return self.case.digest(out or self.out, self.case.varies)

    def differing(self, out: Path | None = None) -> str:
        """The names of what is not as it is where nothing stops the command."""
        now = self.digest(out)
        return ", ".join(sorted(name for name in {**now, **self.whole} if now.get(name) != self.whole.get(name)))

    # --- what is wrong ------------------------------------------------------------------------------------------------

    def unclear(self, code: int | None, codes: tuple[int, ...]) -> Iterator[str]:
        """What is wrong with how a command ended that could not do its work."""
        said = self.said()
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        if code not in codes:
            yield f"ended with {code}: {said[-500:]}"
        elif "Traceback" in said or "MAE_DEPLOY_DEBUG" in said or "Exception ignored" in said:
            yield f"an error that nobody foresaw: {said[-500:]}"
        elif not errors:
            yield f"it does not say why: {said[-500:]}"
        elif re.search(r"[\x00-\x08\x0b-\x1f\x7f]", said.replace("\r", "")):
            yield f"a name speaks to the terminal: {said[-500:]!r}"

    def half_written(self) -> Iterator[str]:
        """What stays of a command that ended by itself."""
        partial, temporary = self.disk.folder.rglob("*.partial*"), (self.disk.folder / "tmp").iterdir()
        kept = "kept: " in self.said()  # the same call goes on with it
        if left := [str(path.relative_to(self.disk.folder)) for path in (*(() if kept else partial), *temporary)]:
            yield f"half written files stay: {', '.join(left)}"

    def wrong(self) -> Iterator[str]:
        """What is wrong with what is there, and with the same command afterwards."""
        case, out = self.case, self.out
        there = out.exists()
        whole = there and self.digest() == self.whole  # it was done when the signal came
        if case.atomic and there and not self._whole_parts():
            yield f"half an output is there: {', '.join(self.digest())}"
        for step in [] if case.atomic else out.glob("**/checkpoints/step-*"):
            if (step / "state").is_dir() and (found := damage(step)) is not None:
                yield f"half a checkpoint is there: {found}"
        if there and not case.atomic and case.reads is not None:
            code = self.run(list(map(str, case.reads(self.root, out))))
            if code not in (0, 1, 2) or "Traceback" in self.said():
                yield f"reading what is there: {code}, {self.said()[-300:]}"
        code = self.run(self.arguments(*case.again))
        if there and (case.atomic or case.several or whole) and code == 2 and "exists" in self.said():
            if case.several and self.digest().keys() != self.whole.keys():
                yield f"some of the outputs are there, and refused: {self.differing()}"
            elif not case.stops and self.digest() != self.whole:
                yield "what is there is refused, and not whole"
        elif code != 0:
            yield f"the second call: {code}, {self.said()[-500:]}"
        elif differing := self.differing():
            yield f"the second call's output differs: {differing}"
        elif case.reads is not None and self.run(list(map(str, case.reads(self.root, out)))) != 0:
            yield f"the output is not accepted: {self.said()[-300:]}"
        yield from self.half_written()

    def _whole_parts(self) -> bool:
        """Whether what is there is as it is without a kill; of several outputs, each that is there."""
        now = self.digest()
        if not self.case.several:
            return now == self.whole or self.case.stops
        now = {name: content for name, content in now.items() if ".partial-" not in name}
        parts = {name.partition("/")[0] for name in now}
        return self.case.stops or now == {k: v for k, v in self.whole.items() if k.partition("/")[0] in parts}


def _child(
    name: str, arguments: list[str], place: Path, log: Path, environment: dict[str, str], given: dict[str, Any]
) -> None:
    """Args: given: `kill_at` or `fail_at` a change of a file, `largest` file that may be written, working `folder`."""
    os.setsid()  # a terminal signals all processes of a command
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ |= environment
    tempfile.tempdir = None
    os.chdir(given.get("folder") or place)
    changes = _count_changes(str(place.parent), given.get("kill_at"), given.get("fail_at"))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background ignores it
    if (largest := given.get("largest")) is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))
    log.with_name("begun").touch()
    with CASES[name].within():
        code = command(arguments)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    log.with_name("changes").write_text(str(changes()))
    sys.stdout.flush()
    sys.exit(code)


def _count_changes(folder: str, kill_at: int | None, fail_at: int | None) -> Callable[[], int]:
    count = 0
    sync = os.fsync

    def fsync(number: int) -> None:
        hook("fsync", (os.readlink(f"/proc/self/fd/{number}"),))
        sync(number)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if (
            event in _CHANGES
            or (event == "fsync" and fail_at is not None)
            or (event == "open" and isinstance(arguments[1], str) and arguments[1][0] in "wax")
        ):
            path = os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes | os.PathLike) else ""
            if path.startswith(folder) or os.sep not in path:  # a bare name: of a folder that is removed as a whole
                count += 1
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                if count == fail_at and event not in _REMOVALS:
                    raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    os.fsync = fsync  # type: ignore[assignment]
    sys.addaudithook(hook)
    return lambda: count
