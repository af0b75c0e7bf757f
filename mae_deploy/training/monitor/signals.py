"""Signals that ask a run to stop in good order: preemption by a batch system, and Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from mae_deploy.errors import MaeDeployError

STOPPING = ("SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP")
"""SLURM sends SIGTERM before it takes a node back, and any other signal that a script asks for with `--signal`."""

EXIT_STOPPED = 143
"""Exit code of a run that a signal stopped and `--resume` goes on with: 128 + SIGTERM, whichever signal it was."""


class Stopped(MaeDeployError):
    """A signal ended the run after a checkpoint."""

    exit_code = EXIT_STOPPED


class StopSignals:
    """Notes the first signal instead of dying of it; a second Ctrl-C ends the process as ever."""

    def __init__(self, *, launched: bool = False, call: Callable[[], None] | None = None) -> None:
        """Args: call: at each signal, what ends a wait that would otherwise go on."""
        self._call = call
        self.launched = launched
        """Whether this is one of several processes, whose launcher ends them all as soon as the first has gone."""
        self.received: str | None = None
        """Name of the signal that came."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread do this
            self._before = {
                number: signal.signal(number, self._note)
                for name in STOPPING
                if (number := getattr(signal, name, None)) is not None and signal.getsignal(number) != signal.SIG_IGN
            }
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            leaving = self.launched and isinstance(error, Stopped | SystemExit)
            signal.signal(number, signal.SIG_IGN if leaving and number == signal.SIGTERM else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        if self._call is not None:
            self._call()
        if number == signal.SIGINT:
            signal.signal(number, self._before[number])
