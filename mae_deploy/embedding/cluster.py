"""The parts of a job on a cluster, by Ray Data: the same shards as on one machine, on a disk that all of them see."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

from mae_deploy.embedding.embedder import Embedder, Outcome
from mae_deploy.embedding.job import Job
from mae_deploy.errors import ConfigError, MaeDeployError, import_optional

_BLOCKS_A_WORKER = 16
"""Ray hands out parts in so many blocks a worker: the last ones then end at about the same time."""

LOCAL = "local"


def connect(address: str) -> Any:
    """Ray, connected to a cluster, or, for `local`, to one that it starts on this machine.

    Raises:
        ConfigError: no cluster answers there.
        MissingDependency: Ray is not installed.
    """
    ray = import_optional("ray", extra="cluster")
    import_optional("ray.data", extra="cluster")
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # which tells of every step
    try:
        ray.init(
            address=address,
            logging_level=logging.ERROR,
            log_to_driver=True,
            configure_logging=False,
            include_dashboard=False if address == LOCAL else None,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"--ray {address}: {' '.join(str(error).split())}",
            hint="'ray start --head' starts a cluster; or --ray local",
        ) from error
    return ray


def run_cluster(ray: Any, job: Job, parts: Sequence[int], workers: int) -> Iterator[Outcome]:
    """Embed parts in so many processes on the machines of a cluster. A part whose machine dies is embedded by another
    one; as a shard has one name and one content, it does not matter how often.

    Raises:
        MaeDeployError: as a worker raised it.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    resources: dict[str, float] = {"num_gpus": 1} if job.device == "cuda" else {"num_cpus": job.threads or 1}
    blocks = min(len(parts), _BLOCKS_A_WORKER * workers)
    rows = ray.data.from_items([{"part": part} for part in parts], override_num_blocks=blocks).map(
        _Worker,
        fn_constructor_args=(job,),
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(parts))),
        **resources,
    )
    try:
        for row in rows.iter_rows():
            yield Outcome(int(row["part"]), int(row["images"]), row["error"] or None)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        raise cause if isinstance(cause, MaeDeployError) else MaeDeployError(_last_line(error)) from error


class _Worker:
    """An actor of Ray Data."""

    def __init__(self, job: Job) -> None:
        os.chdir(job.folder)
        self._embedder = Embedder(job)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        outcome = dataclasses.asdict(self._embedder.embed(int(row["part"]), lambda _: None))
        return {**outcome, "error": outcome["error"] or ""}


def _last_line(error: Exception) -> str:
    return next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
