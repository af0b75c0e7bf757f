"""Run a command in a child process with a limit on time and memory, and say what is wrong with how it ended."""

from __future__ import annotations

import io
import os
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MOST_SECONDS = 30
_PATIENCE = 4
"""Times as long, a command may wait for others that use the machine; one that waits for ever does so beyond it."""

MOST_BYTES = 2 << 30
_ADDRESSES = 16 << 30
"""Address space beyond what the parent has; libraries reserve more than they use."""

REFUSED = (1, 2, 3)
"""The exit codes of what is not done."""

_LONGEST_LINE = 1_000
"""Characters of an error; what a file holds is quoted in part."""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    """Of a signal, its number below zero."""
    out: str
    err: str
    seconds: float
    """That it computed, or 30 and more where it was ended."""
    bytes: int
    """Memory at its peak beyond what the parent had given it."""


def run_bounded(arguments: Sequence[object], folder: Path, work: Path) -> Ended:
    """Run `mae-deploy` with these arguments in a fork of this process, which has imported what it needs.

    Args:
        folder: where its output is kept.
        work: the working folder.
    """
    started = time.monotonic()
    process = os.fork()
    if process == 0:
        _command([str(argument) for argument in arguments], folder, work)
    code, usage = None, None
    while code is None:
        found, status, usage = os.wait4(process, os.WNOHANG)
        if found:
            code = os.waitstatus_to_exitcode(status)
        elif time.monotonic() - started > _PATIENCE * MOST_SECONDS:
            os.kill(process, signal.SIGKILL)
            os.wait4(process, 0)
            code = -signal.SIGKILL
        else:
            time.sleep(0.002)
    out, err = ((folder / name).read_text(encoding="utf-8", errors="replace") for name in ("out", "err"))
    own = int((folder / "own").read_text()) if (folder / "own").is_file() else 0
    peak = max(0, usage.ru_maxrss * 1024 - own) if usage else 0
    computed = usage.ru_utime + usage.ru_stime if usage and code >= 0 else time.monotonic() - started
    return Ended(code, out, err, computed, peak)


def complaint(ended: Ended, codes: Sequence[int] = REFUSED) -> str | None:
    """What is wrong with how a hostile file was met; None: nothing is.

    Args:
        codes: those that may be; with 0, a file that does no harm may be accepted.
    """
    errors = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    if ended.seconds > MOST_SECONDS:
        return f"took more than {MOST_SECONDS} s"
    if ended.bytes > MOST_BYTES:
        return f"took {ended.bytes >> 20} MiB"
    if ended.code < 0:
        return f"was ended by signal {-ended.code}"
    if ended.code not in codes:
        return f"ended with {ended.code}"
    if "Traceback" in ended.err or "MAE_DEPLOY_DEBUG" in ended.err:
        return "ended with an error that nobody foresaw"
    if ended.code != 0 and not errors:
        return "says nothing"
    if any(len(line) > _LONGEST_LINE for line in errors):
        return f"has an error of {max(map(len, errors))} characters"
    if any(re.search(r"[\x00-\x08\x0b-\x1f\x7f]", text) for text in (ended.err.replace("\r", ""), ended.out)):
        return "lets a file speak to the terminal"
    return None


def _command(arguments: list[str], folder: Path, work: Path) -> None:
    """In the child; never returns."""
    code = 1
    try:
        os.chdir(work)
        for name, number in (("out", 1), ("err", 2)):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdin, sys.stdout, sys.stderr = (
            io.TextIOWrapper(os.fdopen(number, mode, closefd=False), encoding="utf-8")
            for number, mode in ((0, "rb"), (1, "wb"), (2, "wb"))
        )
        pages = Path("/proc/self/statm").read_text().split()
        (folder / "own").write_text(str(int(pages[1]) * resource.getpagesize()))
        addresses = int(pages[0]) * resource.getpagesize() + _ADDRESSES
        resource.setrlimit(resource.RLIMIT_AS, (addresses, addresses))
        from mae_deploy.cli import main

        before = set(sys.modules)
        code = main(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
        (folder / "modules").write_text("\n".join(name for name in sys.modules if name not in before))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)
