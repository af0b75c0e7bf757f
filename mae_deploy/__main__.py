"""The command `mae-deploy`, and `python -m mae_deploy`, which torchrun needs."""

import os
import sys
from contextlib import suppress
from typing import Any

from mae_deploy.interrupts import end_at_once


def run() -> int:
    """The command line; returns the exit code. A signal before it listens, or when it is done, ends the process with
    the same line.
    """
    _open_streams()
    with end_at_once():
        from mae_deploy.cli import main
    code = main()
    end_at_once().__enter__()
    return code


class _Unfailing:
    """A stream that ends no work where nobody can read it any more: a log on a full disk, a pipe whose reader died."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()


def _open_streams() -> None:
    """Standard streams that are closed lead nowhere: the next file would get their number, and whatever a library says
    on stderr would be written into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the first number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115
    sys.stderr = _Unfailing(sys.stderr)


if __name__ == "__main__":
    raise SystemExit(run())
