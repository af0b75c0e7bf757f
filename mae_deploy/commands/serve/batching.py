"""Dynamic batching: images of many requests are computed together, and none waits longer for others than it is told."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from mae_deploy.errors import MaeDeployError
from mae_deploy.images.arrays import Array
from mae_deploy.runtime.backbone import Backbone
from mae_deploy.runtime.manifest import follows_keep

Group = tuple[tuple[str, ...], int | None]
"""What images of one batch have in common: their outputs, and the number of their patches; None: any."""

_POLL = 0.01
"""Seconds between two looks at whether the work is done, when a batcher is closed."""


class QueueFull(MaeDeployError):
    """As many images wait as may."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What was computed of one image."""

    features: dict[str, Array]
    """Each output's row, `(...)`."""
    queued: float
    """Seconds that it waited, for others and for its turn."""
    computed: float
    """Seconds that its batch took."""
    batch: int
    """Images in it."""


@dataclass(slots=True, eq=False)
class _Waiting:
    pixels: Array
    keep: Array | None
    since: float
    future: asyncio.Future[Answer]


class Batcher:
    """A backbone whose images are computed in batches, by one caller at a time; used in one event loop."""

    def __init__(
        self,
        backbone: Backbone,
        *,
        max_batch: int,
        max_delay: float,
        max_queue: int,
        computed: Callable[[int, float], object] = lambda images, seconds: None,
    ) -> None:
        """Args: computed: is told of each batch, how many images it had and how long it took."""
        largest = max((profile["B"][2] for profile in backbone.engine.profiles), default=backbone.bundle.largest_batch)
        self.max_batch = min(max_batch, largest)
        self._backbone, self._max_delay, self._max_queue, self._computed = backbone, max_delay, max_queue, computed
        self._ragged = backbone.bundle.token_mode == "ragged"
        self._queues: dict[Group, deque[_Waiting]] = {}
        self._changed = asyncio.Event()
        self._runs: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Semaphore(backbone.engine.in_flight)
        self._threads = ThreadPoolExecutor(backbone.engine.in_flight, thread_name_prefix="engine")
        self._task = asyncio.create_task(self._work())

    @property
    def queued(self) -> int:
        """Images that wait."""
        return sum(map(len, self._queues.values()))

    @property
    def full(self) -> bool:
        """Whether no more may wait."""
        return self.queued >= self._max_queue

    async def compute(self, pixels: Array, keep: Array | None, outputs: Sequence[str]) -> Answer:
        """Compute one image that `preprocess.crop` made, `(H, W, C)`, of its patches `keep (K,)`, or of all.

        Raises:
            QueueFull: as many wait as may.
            MaeDeployError: the engine fails.
        """
        if self.full:
            raise QueueFull(f"{self.queued} images wait already")
        group = tuple(outputs), None if self._ragged or keep is None else len(keep)
        waiting = _Waiting(pixels, keep, time.monotonic(), asyncio.get_running_loop().create_future())
        queue = self._queues.setdefault(group, deque())
        queue.append(waiting)
        if len(queue) in (1, self.max_batch):
            self._changed.set()
        try:
            return await waiting.future
        except asyncio.CancelledError:  # whoever asked has gone, and keeps nobody else from waiting
            if waiting in queue:
                queue.remove(waiting)
                if not queue and self._queues.get(group) is queue:
                    del self._queues[group]
            raise

    async def close(self) -> None:
        """Compute what waits, then free the engine."""
        while self._queues or self._runs:
            await asyncio.sleep(_POLL)
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        self._threads.shutdown()
        self._backbone.close()

    async def _work(self) -> None:
        while True:
            await self._turn.acquire()  # first: while the engine computes, the next batch grows
            group, batch = await self._next()
            run = asyncio.create_task(self._run(group, batch))
            self._runs.add(run)
            run.add_done_callback(self._runs.discard)

    async def _next(self) -> tuple[Group, list[_Waiting]]:
        """The images that have waited longest, as soon as they fill a batch or have waited long enough."""
        while True:
            self._changed.clear()
            due = {group: queue[0].since + self._max_delay for group, queue in self._queues.items()}
            now = time.monotonic()
            ready = [group for group in due if due[group] <= now or len(self._queues[group]) >= self.max_batch]
            if not ready:
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), min(due.values()) - now if due else None)
                continue
            group = min(ready, key=due.__getitem__)
            queue = self._queues[group]
            batch = [queue.popleft() for _ in range(min(len(queue), self.max_batch))]
            if not queue:
                del self._queues[group]
            return group, batch

    async def _run(self, group: Group, batch: list[_Waiting]) -> None:
        outputs, _ = group
        started = time.monotonic()
        try:
            features = await asyncio.get_running_loop().run_in_executor(self._threads, self._features, batch, outputs)
        except Exception as error:
            for waiting in batch:
                if not waiting.future.done():
                    waiting.future.set_exception(error)
            return
        finally:
            self._turn.release()
        seconds = time.monotonic() - started
        self._computed(len(batch), seconds)
        for row, waiting in enumerate(batch):
            if waiting.future.done():
                continue
            own = {name: values[row] for name, values in features.items()}
            if waiting.keep is not None:  # of a ragged batch, the rows are as long as the longest
                length = len(waiting.keep)
                own = {name: value[:length] if follows_keep(name) else value for name, value in own.items()}
            waiting.future.set_result(Answer(own, started - waiting.since, seconds, len(batch)))

    def _features(self, batch: list[_Waiting], outputs: tuple[str, ...]) -> dict[str, Array]:
        keep = [waiting.keep for waiting in batch if waiting.keep is not None]
        pixels = np.stack([waiting.pixels for waiting in batch])
        return self._backbone.run_cropped(pixels, keep or None, outputs=outputs)
