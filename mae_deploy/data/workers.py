"""The processes that decode images beside the training process."""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import sys
import warnings
from typing import Any

from mae_deploy.machine import granted_cores
from mae_deploy.progress import notice

_MOST = 16
"""Workers that are started by default, at most."""

_SET_DEATH_SIGNAL = 1
"""prctl's PR_SET_PDEATHSIG, from linux/prctl.h."""

_MOST_A_CORE = 8
"""Those that are started for a core where more are asked for: starting a thousand takes longer than an epoch."""


def resolve_workers(num_workers: int) -> int:
    """Worker processes to start: as asked for, or, for -1, one for each granted core but one, shared among this
    machine's processes.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # as torchrun says
    if num_workers < 0:
        return max(1, min(_MOST, granted_cores() // processes - 1))
    most = max(_MOST, _MOST_A_CORE * granted_cores() // processes)
    return num_workers if num_workers <= most else _at_most(most, num_workers)


@functools.cache  # said once
def _at_most(most: int, asked: int) -> int:
    cores = granted_cores()
    notice(
        "--num-workers:", f"{asked} processes on {cores} core{'s' * (cores > 1)} only wait for each other: using {most}"
    )
    return most


def leave_signals_to_parent(_: int) -> None:
    """A batch system and a terminal signal every process of a run; workers decode until the training process has
    finished its step and goes.
    """
    for name in ("SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def end_with_parent() -> None:
    """Let this process be killed when the one that has started it dies, however that was; on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)


def worker_options(num_workers: int) -> dict[str, Any]:
    """The DataLoader's arguments that say who decodes."""
    workers = resolve_workers(num_workers)
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # `resolve_workers` says what is too many
    # Python 3.14 no longer forks by default; each worker would spend seconds on importing torch, for each evaluation
    # anew.
    context = "fork" if workers > 0 and sys.platform == "linux" else None
    return {"num_workers": workers, "multiprocessing_context": context, "worker_init_fn": leave_signals_to_parent}
