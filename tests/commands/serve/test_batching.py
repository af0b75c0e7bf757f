"""Images that wait together are computed together, none waits longer for others than it is told, and a failure is that
of its batch alone.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mae_deploy.commands.serve.batching import Answer, Batcher, QueueFull
from mae_deploy.errors import MaeDeployError
from mae_deploy.images.arrays import Array

LONG = 60.0
"""Seconds that nothing here waits for."""


class Recorded:
    """In a backbone's place: keeps the batches that it was given."""

    def __init__(self, *, largest: int = 7, mode: str = "visible") -> None:
        self.engine = SimpleNamespace(in_flight=1, profiles=())
        self.bundle = SimpleNamespace(largest_batch=largest, token_mode=mode)
        self.batches: list[tuple[list[int], tuple[str, ...]]] = []
        self.go = threading.Event()
        self.go.set()
        self.closed = False

    def run_cropped(self, pixels: Array, keep: Any = None, *, outputs: Sequence[str] = ()) -> dict[str, Array]:
        self.go.wait()
        self.batches.append((pixels[:, 0].tolist(), tuple(outputs)))
        if 13 in pixels:
            raise MaeDeployError("thirteen")
        longest = 3 if keep is None else max(map(len, keep))
        return {"cls": 2 * pixels, "tokens": np.ones((len(pixels), longest, 2))}

    def close(self) -> None:
        self.closed = True


def image(number: int) -> Array:
    return np.array([number])


def batcher(backbone: Recorded, *, max_batch: int = 5, max_delay: float = 0.01, max_queue: int = 11) -> Batcher:
    return Batcher(backbone, max_batch=max_batch, max_delay=max_delay, max_queue=max_queue)  # type: ignore[arg-type]


def test_a_full_batch_goes_at_once_and_the_rest_when_it_has_waited() -> None:
    async def run() -> tuple[list[Answer], float]:
        made = batcher(backbone, max_delay=0.2)
        started = time.monotonic()
        found = await asyncio.gather(*(made.compute(image(number), None, ("cls",)) for number in range(7)))
        seconds = time.monotonic() - started
        await made.close()
        return list(found), seconds

    backbone = Recorded()
    found, seconds = asyncio.run(run())
    assert [numbers for numbers, _ in backbone.batches] == [[0, 1, 2, 3, 4], [5, 6]]
    assert [int(one.features["cls"][0]) for one in found] == [0, 2, 4, 6, 8, 10, 12]
    assert [one.batch for one in found] == [5, 5, 5, 5, 5, 2, 2]
    assert seconds >= 0.2
    assert found[6].queued >= 0.2 > found[0].queued
    assert backbone.closed


def test_what_comes_while_the_engine_computes_is_one_batch() -> None:
    async def run() -> None:
        made = batcher(backbone, max_delay=0.0)
        backbone.go.clear()
        tasks = [asyncio.create_task(made.compute(image(0), None, ("cls",)))]
        while made.queued or not tasks:
            await asyncio.sleep(0)
        await asyncio.sleep(0.02)
        tasks += [asyncio.create_task(made.compute(image(number), None, ("cls",))) for number in (1, 2, 3)]
        await asyncio.sleep(0.02)
        backbone.go.set()
        await asyncio.gather(*tasks)
        await made.close()

    backbone = Recorded()
    asyncio.run(run())
    assert [numbers for numbers, _ in backbone.batches] == [[0], [1, 2, 3]]


def test_only_like_goes_with_like() -> None:
    """Other outputs, or another number of patches, is another batch; of a ragged bundle the number may differ."""

    async def run(backbone: Recorded) -> list[Answer]:
        made = batcher(backbone)
        one, two = np.arange(1), np.arange(2)
        asked = [(0, one, "cls"), (1, two, "cls"), (2, one, "cls"), (3, one, "tokens")]
        found = await asyncio.gather(*(made.compute(image(n), keep, (output,)) for n, keep, output in asked))
        await made.close()
        return list(found)

    backbone = Recorded()
    asyncio.run(run(backbone))
    assert sorted(backbone.batches) == [([0, 2], ("cls",)), ([1], ("cls",)), ([3], ("tokens",))]
    ragged = Recorded(mode="ragged")
    found = asyncio.run(run(ragged))
    assert sorted(ragged.batches) == [([0, 1, 2], ("cls",)), ([3], ("tokens",))]
    assert [len(one.features["tokens"]) for one in found] == [1, 2, 1, 1]


def test_a_waiting_group_is_not_starved_by_full_ones() -> None:
    async def run() -> None:
        made = batcher(backbone, max_batch=2, max_delay=0.01)
        backbone.go.clear()
        tasks = [asyncio.create_task(made.compute(image(9), None, ("cls",)))]
        await asyncio.sleep(0.05)
        tasks.append(asyncio.create_task(made.compute(image(8), None, ("tokens",))))
        await asyncio.sleep(0.02)
        tasks += [asyncio.create_task(made.compute(image(number), None, ("cls",))) for number in range(6)]
        await asyncio.sleep(0.02)
        backbone.go.set()
        await asyncio.gather(*tasks)
        await made.close()

    backbone = Recorded()
    asyncio.run(run())
    assert [numbers for numbers, _ in backbone.batches] == [[9], [8], [0, 1], [2, 3], [4, 5]]


def test_no_batch_is_larger_than_was_checked() -> None:
    async def run() -> None:
        made = batcher(backbone)
        assert made.max_batch == 3
        await asyncio.gather(*(made.compute(image(number), None, ("cls",)) for number in range(4)))
        await made.close()

    backbone = Recorded(largest=3)
    asyncio.run(run())
    assert [len(numbers) for numbers, _ in backbone.batches] == [3, 1]


def test_a_failure_is_that_of_its_batch() -> None:
    async def run() -> list[Any]:
        made = batcher(backbone, max_batch=2)
        numbers = (0, 1, 13, 3, 4, 5)
        found = await asyncio.gather(
            *(made.compute(image(number), None, ("cls",)) for number in numbers), return_exceptions=True
        )
        await made.close()
        return list(found)

    backbone = Recorded()
    found = asyncio.run(run())
    assert [isinstance(one, MaeDeployError) for one in found] == [False, False, True, True, False, False]


def test_a_full_queue_refuses_and_who_has_gone_is_not_computed() -> None:
    async def run() -> None:
        made = batcher(backbone, max_delay=LONG, max_batch=7, max_queue=3)
        tasks = [asyncio.create_task(made.compute(image(number), None, ("cls",))) for number in range(3)]
        await asyncio.sleep(0)
        assert made.full
        with pytest.raises(QueueFull, match=r"^3 images wait already$"):
            await made.compute(image(3), None, ("cls",))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert made.queued == 0
        await made.close()

    backbone = Recorded()
    asyncio.run(run())
    assert backbone.batches == []
