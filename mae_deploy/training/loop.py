"""Training on Accelerate: devices and processes, and a run from wherever its folder's last checkpoint is to its end."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState

from mae_deploy.errors import ConfigError, import_optional
from mae_deploy.files import refuse_to_overwrite
from mae_deploy.training.config import Device, OptimConfig, Sharding, TrainingPrecision
from mae_deploy.training.cpu import advise_bf16
from mae_deploy.training.device import compute_deterministically, resolve_device, resolve_precision
from mae_deploy.training.forecast import forecast
from mae_deploy.training.job import Evaluation, RunConfig, TrainConfig, TrainingJob
from mae_deploy.training.monitor.trackers import Trackers
from mae_deploy.training.monitor.unreadable import Unreadable
from mae_deploy.training.plan import RunPlan, make_plan, resume_plan
from mae_deploy.training.runner import TrainingRunner
from mae_deploy.training.state.progress import STATE, Progress, load_progress
from mae_deploy.training.state.run_folder import RunFolder

__all__ = ["Evaluation", "TrainingJob", "fit", "make_accelerator", "run_job"]


def make_accelerator(
    device: Device,
    precision: TrainingPrecision,
    out: Path,
    trackers: tuple[str, ...] = (),
    *,
    sharding: Sharding = "ddp",
    deterministic: bool = False,
) -> Accelerator:
    """The distributed engine for this machine.

    Raises:
        MissingDependency: the device, or the package of a tracker, is not there.
        ConfigError: shares of a model, and no other process to share it with.
    """
    if sharding == "fsdp2" and "RANK" not in os.environ:
        raise ConfigError(
            f"--sharding {sharding} shares the model among several processes, and this one was started alone",
            hint="start it with torchrun --nproc-per-node N -m mae_deploy …, or leave --sharding out",
        )
    for name in trackers:  # before there is a run folder
        import_optional(name, extra=name)
    compute_deterministically(deterministic)
    place = resolve_device(device)
    resolved = resolve_precision(precision, place)
    AcceleratorState._reset_state()  # an earlier stage in this process may have used another precision
    return Accelerator(
        cpu=place.type == "cpu", mixed_precision="no" if resolved == "fp32" else resolved, project_dir=out
    )


def accelerator_of(config: RunConfig) -> Accelerator:
    """The engine that a run's settings ask for.

    Raises:
        MissingDependency, ConfigError: as `make_accelerator`.
    """
    loop = config.loop
    return make_accelerator(
        config.device,
        loop.precision,
        config.out,
        loop.tracker,
        sharding=loop.sharding,
        deterministic=loop.deterministic,
    )


def run_job(job: TrainingJob, accelerator: Accelerator, config: RunConfig, data: dict[str, Any]) -> dict[str, Any]:
    """Train in the run folder of the settings; returns a summary. With `--plan`, what that will take, and the folder is
    not touched.

    Args:
        data: the fingerprint of the job's data.

    Raises:
        ConfigError: the folder holds something else, or another process is at work in it.
    """
    main = accelerator.is_main_process
    if config.loop.plan:
        if not config.resume:
            refuse_to_overwrite(
                config.out, hint="pass --resume to plan the rest of this run, or choose another --out", filled=True
            )
        there = RunFolder.open(config.out, config, data, resume=config.resume, write=False)
        state, plan = _resolve(job, there, config.optim, accelerator)
        return forecast(job, accelerator, plan, state, config)
    with RunFolder.open(config.out, config, data, resume=config.resume, write=main) as folder:
        if folder.last is None and job.begin is not None:
            job.begin()
        return fit(job, folder, accelerator, config)


def fit(job: TrainingJob, folder: RunFolder, accelerator: Accelerator, config: TrainConfig) -> dict[str, Any]:
    """Train to the end, from wherever the run folder's last checkpoint is; returns a summary.

    Raises:
        Stopped: a signal asked for it; a checkpoint was written.
        CheckFailed: losses stay non-finite, or too many images cannot be read.
        ConfigError: the run was started with another effective batch.
    """
    if accelerator.is_main_process and accelerator.device.type == "cpu" and config.loop.precision == "auto":
        advise_bf16()
    state, plan = _resolve(job, folder, config.optim, accelerator)
    trackers = Trackers(accelerator, config.loop.tracker, folder.path, step=state.step)
    unreadable = Unreadable(folder.path, config.images.max_corrupt, accelerator)
    runner = TrainingRunner(
        job,
        folder,
        accelerator,
        plan,
        state,
        trackers,
        unreadable,
        optim=config.optim,
        loop=config.loop,
        seed=config.seed,
    )
    if accelerator.is_main_process:
        folder.forget_after(state.step)
    try:
        runner.run(config.images.num_workers)
    finally:
        trackers.close()
    return runner.summary()


def _resolve(
    job: TrainingJob, folder: RunFolder, optim: OptimConfig, accelerator: Accelerator
) -> tuple[Progress, RunPlan]:
    """Where the run is, and the plan for the rest of it."""
    processes = accelerator.num_processes
    numbers: Any = {"world_size": processes, "paper_warmup": job.paper_warmup, "quiet": not accelerator.is_main_process}
    if folder.last is None:
        state, plan = Progress(), make_plan(len(job.dataset), optim, **numbers)
        state.effective_batch = plan.batch_size * plan.accum_iter * processes
    else:
        state = load_progress(folder.last / STATE)
        plan = resume_plan(len(job.dataset), optim, state, **numbers)
    state.processes, state.batch_size, state.accum_iter = processes, optim.batch_size, optim.accum_iter
    return state, plan
