"""Ctrl-C, SIGTERM and the end of a terminal end a command with one line, after what it was writing has been removed."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn


class Interrupted(BaseException):
    """A signal ended the command; like KeyboardInterrupt, no `except Exception` takes it for a failure."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number
        """As a shell has it: 130 for Ctrl-C, 143 for SIGTERM, 129 where the terminal is gone."""


@contextmanager
def end_at_once() -> Iterator[None]:
    """The first of these signals ends the process within the block; what is ignored stays so."""

    def stop(number: int, frame: FrameType | None) -> None:
        _end(Interrupted(number))

    ours = _handled()
    for number in ours:
        signal.signal(number, stop)
    yield
    for number, handler in ours.items():
        signal.signal(number, handler)


def _handled() -> dict[signal.Signals, Any]:
    """The signals that end a command and are as Python has them, and what it does at each."""
    usual: dict[signal.Signals, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    if sys.platform != "win32":
        usual[signal.SIGHUP] = signal.SIG_DFL
    return {number: handler for number, handler in usual.items() if signal.getsignal(number) == handler}


def _end(error: Interrupted, more: str = "") -> NoReturn:
    with suppress(OSError):  # nobody may read it any more
        os.write(2, f"error: {error}{more}\n".encode())
    os._exit(error.exit_code)


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise `Interrupted` within the block at the first of these signals; the second ends the process at once, as what
    the first one has begun may hang. What whoever started the process ignores, as `nohup` does, stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():  # Python lets no other thread do this
        yield
        return
    process, received = os.getpid(), list[int]()
    ours = _handled()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # a fork, such as a process that decodes images: its parent says it
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        received.append(number)
        error = Interrupted(number)
        if len(received) > 1:
            _end(error, " again")
        raise error

    for number in ours:
        signal.signal(number, stop)
    try:
        yield
    finally:
        if not received:
            for number, handler in ours.items():
                signal.signal(number, handler)
