"""Tensors of a step on their way from the device: on a GPU they are read some steps later, so that no step waits for
its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

STEPS_LATE = 2
"""On a GPU. One would keep it busy as long as a step is launched faster than it is computed; the second is for the days
when it is not."""


class _Underway(NamedTuple, Generic[T]):
    about: T
    values: Tensor
    copied: torch.cuda.Event | None


class Readback(Generic[T]):
    """A queue of tensors and what they are about."""

    def __init__(self, device: torch.device) -> None:
        self.late = STEPS_LATE if device.type == "cuda" else 0
        self._queue: deque[_Underway[T]] = deque()

    def push(self, about: T, values: Tensor) -> None:
        """Start the copy of a tensor to the host."""
        if self.late == 0:
            self._queue.append(_Underway(about, values, None))
            return
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        self._queue.append(_Underway(about, host, copied))

    def due(self, *, all_of_them: bool = False) -> Iterator[tuple[T, Tensor]]:
        """What was pushed long enough ago, in order."""
        while len(self._queue) > (0 if all_of_them else self.late):
            about, values, copied = self._queue.popleft()
            if copied is not None:
                copied.synchronize()
            yield about, values
