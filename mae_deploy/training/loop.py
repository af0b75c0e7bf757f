"""Training on Accelerate: devices and processes, and a run from wherever its folder's last checkpoint is to its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from mae_deploy.errors import MissingDependency, import_optional
from mae_deploy.training.config import Device, OptimConfig, TrainingPrecision
from mae_deploy.training.cpu import advise_bf16
from mae_deploy.training.job import Evaluation, TrainConfig, TrainingJob
from mae_deploy.training.monitor.trackers import Trackers
from mae_deploy.training.monitor.unreadable import Unreadable
from mae_deploy.training.plan import RunPlan, make_plan, resume_plan
from mae_deploy.training.runner import TrainingRunner
from mae_deploy.training.state.progress import STATE, Progress, load_progress
from mae_deploy.training.state.run_folder import RunFolder

__all__ = ["Evaluation", "TrainingJob", "fit", "make_accelerator"]


def make_accelerator(
    device: Device, precision: TrainingPrecision, out: Path, trackers: tuple[str, ...] = ()
) -> Accelerator:
    """The distributed engine for this machine.

    Raises:
        MissingDependency: the device, or the package of a tracker, is not there.
    """
    for name in trackers:  # before there is a run folder
        import_optional(name, extra=name)
    if device == "cuda" and not torch.cuda.is_available():
        raise MissingDependency("--device cuda, but torch sees no CUDA device", hint="use --device auto or cpu")
    AcceleratorState._reset_state()  # an earlier stage in this process may have used another precision
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    if precision == "fp16" and on_cpu:
        raise MissingDependency("--precision fp16 needs a CUDA device", hint="use --precision bf16 or fp32")
    if precision == "auto":
        precision = "fp32" if on_cpu or not torch.cuda.is_bf16_supported() else "bf16"
    return Accelerator(cpu=on_cpu, mixed_precision="no" if precision == "fp32" else precision, project_dir=out)


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
