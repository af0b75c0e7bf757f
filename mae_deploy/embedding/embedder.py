"""One process's share of the work: it reads parts, computes and writes their shards."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mae_deploy import __version__
from mae_deploy.embedding.images import Item
from mae_deploy.embedding.job import Job, row_shapes
from mae_deploy.embedding.shard_file import about_of, write_unreadable, written_shard
from mae_deploy.errors import ConfigError, MaeDeployError, MissingDependency
from mae_deploy.images.limits import pixels_at_most
from mae_deploy.images.read import Array
from mae_deploy.runtime.backbone import Backbone
from mae_deploy.runtime.predict import Batch, batches

_TRIES = 3
"""How often a part that breaks off is begun anew from its last whole shard: a network may be back."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of a part."""

    part: int
    images: int
    """That are done, whether they could be read or not."""
    error: str | None = None
    """Why it could not be read to its end; what was whole by then stays."""


class Embedder:
    """An engine, and the images: embeds parts by their number."""

    def __init__(self, job: Job) -> None:
        """Open both.

        Raises:
            ConfigError: another collection than the one that the job was made for, as on a machine that sees another
                folder under its name.
        """
        self._job, self._images = job, job.collection()
        if (found := self._images.fingerprint()) != job.identity["fingerprint"]:
            raise ConfigError(
                f"{job.data} has changed, or is another one on this machine: {found}",
                hint=f"expected {job.identity['fingerprint']}",
            )
        self._backbone = Backbone.load(job.bundle, job.engine, device=job.device, threads=job.threads)
        self._shapes = row_shapes(self._backbone.bundle, job.outputs)
        self._about = _about(job, self._backbone)

    def embed(self, part: int, tick: Callable[[int], object]) -> Outcome:
        """Write the shards of a part that are not there yet.

        Args:
            tick: told of images that are done, whether they could be read or not.

        Raises:
            MaeDeployError: the engine fails.
        """
        images, error = 0, None

        def count(new: int) -> None:
            nonlocal images
            images += new
            tick(new)

        with pixels_at_most(self._job.max_pixels):
            for tries in range(_TRIES):
                try:
                    self._embed(part, count)
                    return Outcome(part, images)
                except _BrokenOff as broken:
                    error = str(broken)
                    time.sleep(2**tries if tries + 1 < _TRIES else 0)
        return Outcome(part, images, error)

    def close(self) -> None:
        """Free the engine."""
        self._backbone.close()

    def _embed(self, part: int, tick: Callable[[int], object]) -> None:
        size, sequential = self._job.shard_images, self._images.sequential
        done = shards_there(self._job, part, sequential=sequential)
        with closing(_Items(self._images.items(part), 2 * self._job.batch_size)) as items:
            for _ in itertools.islice(items, done * size):
                pass
            for number in itertools.count(done):
                path = self._job.shard(part, number, sequential=sequential)
                self._write(path, itertools.islice(items, size), tick, lambda: {"part": part, "last": not items.more()})
                if not items.more():
                    return

    def _write(
        self, path: Path, items: Iterator[Item], tick: Callable[[int], object], place: Callable[[], Mapping[str, Any]]
    ) -> None:
        job, preprocess = self._job, self._backbone.preprocess
        unreadable: list[tuple[int, str, str]] = []
        with written_shard(path, self._shapes, job.store, self._about) as shard:
            for batch in batches(
                self._backbone,
                items,
                lambda item: preprocess.crop(item.read(preprocess)),
                batch_size=job.batch_size,
                outputs=job.outputs,
            ):
                bad = [(item, reason.removeprefix(f"{item.key}: ")) for item, reason in batch.left_out]
                if batch.items:
                    finite = _finite(batch, job)
                    bad += [
                        (item, f"its features have NaN, infinite values or some too large for {job.store}")
                        for item, good in zip(batch.items, finite, strict=True)
                        if not good
                    ]
                    kept = [item for item, good in zip(batch.items, finite, strict=True) if good]
                    rows = {name: array[finite] for name, array in batch.features.items()}
                    shard.add([item.id for item in kept], [item.key for item in kept], rows)
                unreadable += sorted((item.id, item.key, reason) for item, reason in bad)
                tick(len(batch.items) + len(batch.left_out))
            write_unreadable(path, unreadable)
            shard.finish(place())


def shards_there(job: Job, part: int, *, sequential: bool) -> int:
    """How many of a part's shards are there in a row, from the first on."""
    there = (number for number in itertools.count() if not job.shard(part, number, sequential=sequential).is_file())
    return next(there) if sequential else int(job.shard(part, 0, sequential=False).is_file())


def is_done(job: Job, part: int, *, sequential: bool) -> bool:
    """Whether a part has all of its shards."""
    there = shards_there(job, part, sequential=sequential)
    if not there or not sequential:
        return bool(there)
    return bool(about_of(job.shard(part, there - 1, sequential=True))[1]["last"])


class _BrokenOff(MaeDeployError):
    """A part cannot be read to its end."""


class _Items:
    """Items that are read ahead in a thread, in order; the one that comes next can be asked for."""

    def __init__(self, items: Iterator[Item], ahead: int) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="items")
        self._items = items
        self._pending = deque(self._pool.submit(next, items, None) for _ in range(ahead))

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        if not self.more():
            raise StopIteration
        found = self._pending.popleft().result()
        assert found is not None
        self._pending.append(self._pool.submit(next, self._items, None))
        return found

    def more(self) -> bool:
        """Whether there is another one."""
        try:
            return self._pending[0].result() is not None
        except MissingDependency:
            raise
        except MaeDeployError as error:
            raise _BrokenOff(str(error), hint=error.hint) from error

    def close(self) -> None:
        """Stop reading."""
        self._pool.shutdown(cancel_futures=True)
        if isinstance(self._items, Generator):
            self._items.close()


def _finite(batch: Batch[Item], job: Job) -> Array:
    """Which rows can be stored: `(B,)`."""
    most = np.finfo(np.float16).max if job.store == "fp16" else np.inf
    rows = [np.abs(batch.features[name].reshape(len(batch.items), -1)).max(axis=1, initial=0) for name in job.outputs]
    with np.errstate(invalid="ignore"):
        good: Array = np.all([(largest <= most) & np.isfinite(largest) for largest in rows], axis=0)
    return good


def _about(job: Job, backbone: Backbone) -> dict[str, Any]:
    manifest: Mapping[str, Any] = backbone.bundle.manifest
    names = ("model", "token_mode", "precision", "licence", "preprocess", "provenance")
    return {
        "format": 1,
        "mae_deploy": __version__,
        "job": job.identity,
        "bundle": {"path": str(job.folder / job.bundle), **{name: manifest[name] for name in names}},
        "engine": {
            "name": backbone.engine.name,
            "version": backbone.engine.version,
            "device": backbone.engine.device,
        },
        "folder": str(job.folder),
    }
