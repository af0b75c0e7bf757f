"""Which CPU cores a thread may run on. A thread that it starts inherits them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from mae_deploy.errors import ConfigError


@contextmanager
def bound_to(cores: Sequence[int] | None) -> Iterator[None]:
    """Bind the calling thread to these CPU cores for as long as the block runs; None binds nothing.

    Raises:
        ConfigError: a core that this process may not use, or a system that cannot bind threads.
    """
    if cores is None:
        yield
        return
    if sys.platform != "linux":
        raise ConfigError(f"threads cannot be bound to CPU cores on {sys.platform}", hint="leave affinity out")
    before = os.sched_getaffinity(0)
    try:
        _bind(set(cores), before)
        yield
    finally:
        os.sched_setaffinity(0, before)


def _bind(cores: set[int], before: set[int]) -> None:
    problem = ConfigError(f"CPU cores {_listed(cores)} cannot be used", hint=f"this process may use {_listed(before)}")
    try:
        os.sched_setaffinity(0, cores)
    except (OSError, OverflowError) as error:
        raise problem from error
    if os.sched_getaffinity(0) != cores:  # Linux leaves out, without a word, those that are not there
        raise problem


def _listed(cores: set[int]) -> str:
    return ",".join(map(str, sorted(cores)))
