"""`mae-deploy embed`: features of every image in sharded Parquet, each once, whatever is killed on the way."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mae_deploy.commands.embed.config import EmbedConfig
from mae_deploy.commands.predict import usual_outputs
from mae_deploy.config import fixed_settings
from mae_deploy.data.config import Columns
from mae_deploy.embedding.cluster import connect, run_cluster
from mae_deploy.embedding.embedder import Outcome, is_done
from mae_deploy.embedding.images import Collection, announce, open_collection
from mae_deploy.embedding.job import (
    JOB_FILE,
    Job,
    bundle_hash,
    check_begun,
    features_in,
    row_bytes,
    row_shapes,
    unreadable_beside,
)
from mae_deploy.embedding.local import run_here, run_processes
from mae_deploy.embedding.shard_file import rows_of
from mae_deploy.errors import CheckFailed, ConfigError, import_optional
from mae_deploy.files import refuse_within, remove, remove_partial, take_lock, write_json
from mae_deploy.machine import granted_cores
from mae_deploy.progress import Bar, notice, progress
from mae_deploy.reporting.tables import facts_table
from mae_deploy.results import Result
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.engines.base import EngineOptions, check_outputs
from mae_deploy.runtime.registry import engine_for
from mae_deploy.text import amount

_CORES_A_WORKER = 4
"""Threads beyond these bring an engine little, and so many decode for it."""


def run_embed(config: EmbedConfig) -> Result:
    """Embed what is not there yet.

    Raises:
        CheckFailed: a part breaks off each time, or no image can be read.
        ConfigError: `out` holds another job's features or something else, or the disk has no room.
        MissingDependency: pyarrow, the engine's package or its device is absent, or Ray.
    """
    import_optional("pyarrow", extra="parquet")
    refuse_within(config.out, Path(config.data))
    columns = Columns(image=config.image_column)
    collection = open_collection(config.data, columns, every=config.every, shard_images=config.shard_images)
    bundle = Bundle.load(config.bundle)
    with _work(config) as work:
        job = _job(config, collection, bundle, work)
        announce(collection)
        busy, there = f"another process is writing {config.out}", config.out.is_dir()
        with take_lock(config.out / ".lock", busy=busy, hint="wait for it, or choose another --out"):
            if not check_begun(config.out, job.identity):
                write_json(config.out / JOB_FILE, job.identity)
            remove_partial(config.out)
            try:
                return _embed(job, collection, bundle, work)
            except BaseException:
                if not there and not any(_counts(job)):
                    remove(config.out)
                raise


@dataclass(frozen=True, slots=True)
class _Work:
    """Who does it."""

    workers: int
    threads: int | None
    ray: Any = None

    def outcomes(self, job: Job, parts: list[int], tick: Callable[[int], object]) -> Iterator[Outcome]:
        if self.ray is not None:
            return run_cluster(self.ray, job, parts, self.workers)
        if self.workers == 1:
            return run_here(job, parts, tick)
        return run_processes(job, parts, self.workers, tick)


@contextmanager
def _work(config: EmbedConfig) -> Iterator[_Work]:
    """The machines, for as long as they are needed."""
    if config.ray is None:
        yield _shared(config, granted_cores())
        return
    ray = connect(config.ray)
    try:
        there = ray.cluster_resources()
        gpus = int(there.get("GPU", 0)) if config.device == "cuda" else None
        yield _shared(config, int(there.get("CPU", 1)), ray, gpus)
    finally:
        ray.shutdown()


def _shared(config: EmbedConfig, cores: int, ray: Any = None, gpus: int | None = None) -> _Work:
    workers = config.engine_workers or (max(1, cores // _CORES_A_WORKER) if gpus is None else max(1, gpus))
    alone = workers == 1 and ray is None  # an engine that has the machine chooses well by itself
    return _Work(workers, config.threads or (None if alone else max(1, cores // workers)), ray)


def _job(config: EmbedConfig, collection: Collection, bundle: Bundle, work: _Work) -> Job:
    outputs = check_outputs(config.outputs or usual_outputs(bundle, writing=True), bundle.output_names)
    engine = engine_for(bundle, config.engine, EngineOptions(device=config.device))
    batch_size = config.batch_size or bundle.fixed_batch or 8
    chosen = {"outputs": list(outputs), "engine": engine, "batch_size": batch_size}
    return Job(
        data=config.data,
        image_column=config.image_column,
        every=config.every,
        bundle=bundle.path,
        engine=engine,
        device=config.device,
        threads=work.threads,
        outputs=outputs,
        store=config.store,
        batch_size=batch_size,
        shard_images=config.shard_images,
        max_pixels=config.max_pixels,
        out=config.out,
        folder=Path.cwd(),
        identity={
            "fingerprint": collection.fingerprint(),
            "bundle": bundle_hash(bundle),
            **fixed_settings(config),
            **chosen,
        },
    )


def _embed(job: Job, collection: Collection, bundle: Bundle, work: _Work) -> Result:
    parts = [p for p in range(collection.num_parts) if not is_done(job, p, sequential=collection.sequential)]
    before, counted = _counts(job), collection.num_images is not None
    if features_in(job.out):
        notice(
            "going on:", f"{sum(before)} images are in {job.out}, {len(parts)} of {collection.num_parts} parts are not"
        )
    _check_room(job, collection, bundle, sum(before))
    total = collection.num_images if collection.num_images is not None else collection.num_parts
    done = sum(before) if counted else total - len(parts)
    started, failed = time.monotonic(), list[Outcome]()
    try:
        with progress("embed", total, done=done) as bar:
            shown = _Shown(bar, counted, in_ticks=work.ray is None)
            for outcome in work.outcomes(job, parts, shown.images) if parts else ():
                failed += [outcome] if outcome.error is not None else []
                shown.part(outcome)
    except BaseException:
        if any(kept := _counts(job)):
            notice("kept:", f"{sum(kept)} images in {job.out}; the same call goes on there")
        raise
    seconds = time.monotonic() - started
    images, unreadable = _counts(job)
    new = images + unreadable - sum(before)
    data = {
        "out": str(job.out),
        "images": images,
        "unreadable": unreadable,
        "shards": len(features_in(job.out)),
        "outputs": {name: list(shape) for name, shape in row_shapes(bundle, job.outputs).items()},
        "store": job.store,
        "bytes": sum(path.stat().st_size for path in features_in(job.out)),
        "new": new,
        "seconds": round(seconds, 3),
        "images_per_second": round(new / seconds, 3) if new else None,
    }
    result = Result(data, facts_table(f"features in {job.out}", _facts(data, unreadable_beside(job.out / "x").parent)))
    if failed:
        raise CheckFailed(
            f"{len(failed)} of {collection.num_parts} parts of {job.data} cannot be read to their ends",
            details=[str(outcome.error) for outcome in failed],
            hint="the same call tries them again",
            result=result,
        )
    if not images:
        raise CheckFailed(f"none of {unreadable} images could be read", hint=f"{job.out} says why", result=result)
    return result


class _Shown:
    """What moves the bar: images where they are counted, else parts."""

    def __init__(self, bar: Bar, counted: bool, *, in_ticks: bool) -> None:
        self._bar, self._counted, self._in_ticks = bar, counted, in_ticks
        self._started, self._images = time.monotonic(), 0

    def images(self, count: int) -> None:
        """So many more."""
        self._images += count
        rate = self._images / max(time.monotonic() - self._started, 1e-9)
        self._bar.advance(count if self._counted else 0, f"{rate:.3g} images/s")

    def part(self, outcome: Outcome) -> None:
        """A part is done."""
        if not self._in_ticks:
            self.images(outcome.images)
        if not self._counted:
            self._bar.advance(1)


def _counts(job: Job) -> tuple[int, int]:
    """Images that have features, and that cannot be read, in all finished shards."""
    shards = features_in(job.out)
    return sum(map(rows_of, shards)), sum(rows_of(unreadable_beside(path)) for path in shards)


def _check_room(job: Job, collection: Collection, bundle: Bundle, done: int) -> None:
    size = row_bytes(bundle, job.outputs, job.store)
    count = collection.num_images
    others = [name for name in bundle.output_names if name not in job.outputs]
    rest = f"; not {', '.join(others)} without --outputs" if others else ""
    of = f"of {count} images, {amount(count * size, 'B')}" if count is not None else f"{amount(size, 'B')} an image"
    notice("writing:", f"{', '.join(job.outputs)} {of}{rest}")
    free = shutil.disk_usage(job.out).free
    if count is not None and (count - done) * size > free:
        raise ConfigError(
            f"--out {job.out} takes {amount((count - done) * size, 'B')} more, and there are {amount(free, 'B')} left",
            hint="ask for fewer --outputs, for --store fp16, or write to another disk",
        )


def _facts(data: dict[str, Any], beside: Path) -> dict[str, Any]:
    outputs = ", ".join(f"{name} {'×'.join(map(str, shape))}" for name, shape in data["outputs"].items())
    rate = f", {data['images_per_second']:.3g} a second" if data["images_per_second"] else ""
    unreadable = data["unreadable"]
    return {
        "images": f"{data['images']} in {data['shards']} shards, {amount(data['bytes'], 'B')}",
        "new": f"{data['new']}{rate}",
        "outputs": f"{outputs}, {data['store']}",
        "unreadable": f"{unreadable}: {beside} says why" if unreadable else "0",
    }
