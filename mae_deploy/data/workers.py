"""The processes that decode images beside the training process."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from mae_deploy.machine import granted_cores

_MOST = 16
"""Workers that are started by default, at most."""


def resolve_workers(num_workers: int) -> int:
    """Worker processes to start: as asked for, or, for -1, one for each granted core but one, shared among this
    machine's processes.
    """
    if num_workers >= 0:
        return num_workers
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # as torchrun says
    return max(1, min(_MOST, granted_cores() // processes - 1))


def leave_signals_to_parent(_: int) -> None:
    """A batch system and a terminal signal every process of a run; workers decode until the training process has
    finished its step and goes.
    """
    for name in ("SIGTERM", "SIGUSR1", "SIGINT"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def worker_options(num_workers: int) -> dict[str, Any]:
    """The DataLoader's arguments that say who decodes."""
    workers = resolve_workers(num_workers)
    # Python 3.14 no longer forks by default; each worker would spend seconds on importing torch, for each evaluation
    # anew.
    context = "fork" if workers > 0 and sys.platform == "linux" else None
    return {"num_workers": workers, "multiprocessing_context": context, "worker_init_fn": leave_signals_to_parent}
