"""What a run will take, `--plan`: its own steps, a few of them, taken in a folder that is thrown away."""

from __future__ import annotations

import multiprocessing
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.flop_counter import FlopCounterMode

from mae_deploy.data.dataset import Batch
from mae_deploy.files import temporary_folder
from mae_deploy.progress import notice
from mae_deploy.runtime.probe import memory_of_workers, peak_memory
from mae_deploy.training.job import RunConfig, TrainingJob
from mae_deploy.training.monitor.trackers import Trackers
from mae_deploy.training.monitor.unreadable import Unreadable
from mae_deploy.training.plan import RunPlan
from mae_deploy.training.runner import TrainingRunner
from mae_deploy.training.state.progress import Progress
from mae_deploy.training.state.run_folder import RunFolder

_SECONDS = 10.0
"""How long the measured steps take together, where one is not longer."""

_LEAST, _MOST = 2, 20
"""Measured steps."""

_BATCHES = 4
"""Validation batches that are timed."""

MIB = 2**20


def forecast(
    job: TrainingJob, accelerator: Accelerator, plan: RunPlan, state: Progress, config: RunConfig
) -> dict[str, Any]:
    """The numbers of the run from where it is to its end, `bytes` and `seconds` in their names; nothing is kept of the
    steps that are taken for it.

    Args:
        state: where the run is.
    """
    processes, left = accelerator.num_processes, plan.total_steps - state.step
    found: dict[str, Any] = {
        "stage": job.title,
        "images": len(job.dataset),
        "epochs": config.optim.epochs,
        "batch_size": plan.batch_size,
        "accum_iter": plan.accum_iter,
        "processes": processes,
        "images_per_step": plan.batch_size * plan.accum_iter * processes,
        "steps_per_epoch": plan.steps_per_epoch,
        "steps": plan.total_steps,
        "steps_done": state.step,
        "peak_lr": plan.peak_lr,
        "warmup_epochs": plan.warmup_epochs,
        "device": _device_name(accelerator.device),
        "precision": {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision),
        "parameters": sum(parameter.numel() for parameter in job.model.parameters()),
        "trained_parameters": sum(p.numel() for p in job.model.parameters() if p.requires_grad),
    }
    if left == 0:
        return found | {"seconds": 0.0}
    if accelerator.is_main_process:
        notice("plan:", "taking a few steps to measure them")
    with temporary_folder() as aside:
        trackers = Trackers(accelerator, (), aside, step=state.step)
        runner = TrainingRunner(
            job,
            RunFolder(aside),
            accelerator,
            plan,
            Progress(step=state.step),
            trackers,
            Unreadable(aside, config.images.max_corrupt, accelerator),
            optim=config.optim,
            loop=replace(config.loop, profile=False),
            seed=config.seed,
        )
        try:
            found |= _steps(runner, runner.stream(config.images.num_workers), left)
        finally:
            trackers.close()
        found |= _validation(job, runner, config)
        found |= _disk(runner, config)
    validations, each = found["validations"], found["validation_seconds"] or 0.0
    return found | {"seconds": left * found["step_seconds"] + validations * each}


def _steps(runner: TrainingRunner, stream: Iterator[Batch], left: int) -> dict[str, Any]:
    """One step under PyTorch's counter of operations, one to warm up, then the timed ones; at most as many as are
    left. Where a step takes longer than all timed ones should, the second is the timed one.
    """
    processes = runner.accelerator.num_processes
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        taken, waited = runner.trial(stream, 1)
    long = taken > _SECONDS
    if left > 1:
        taken, waited = runner.trial(stream, 1)  # also what is taken for measured where no more are left
    many = 0 if long else min(left - 2, max(_LEAST, min(_MOST, int(_SECONDS / max(taken, 1e-9)))))
    if many > 0:
        taken, waited = runner.trial(stream, many)
    step = taken / max(many, 1)
    operations = counter.get_total_flops() * processes
    return {
        "step_operations": operations,
        "operations": operations * left,
        "measured_steps": max(many, 1),
        "step_seconds": step,
        "images_per_second": runner.plan.batch_size * runner.plan.accum_iter * processes / step,
        "data_wait": waited / taken,
        **_memory(runner.accelerator.device),
    }


def _memory(device: torch.device) -> dict[str, Any]:
    """The most that was held while steps were taken, on a GPU there, and the machine's own."""
    workers = multiprocessing.active_children()
    peak, of_workers = peak_memory(), memory_of_workers([worker.pid for worker in workers if worker.pid is not None])
    found: dict[str, Any] = {
        "memory_bytes": None if peak is None else int(peak * MIB),
        "workers": len(workers),
        "workers_memory_bytes": None if of_workers is None else int(of_workers * MIB),
    }
    if device.type == "cuda":
        found |= {
            "gpu_memory_bytes": torch.cuda.max_memory_reserved(device),
            "gpu_memory_total_bytes": torch.cuda.get_device_properties(device).total_memory,
        }
    return found


def _validation(job: TrainingJob, runner: TrainingRunner, config: RunConfig) -> dict[str, Any]:
    """How often the run validates, and how long each takes: some batches are timed, twice, so that what the start of
    the workers takes is counted once.
    """
    if job.evaluate is None:
        return {"validations": 0, "validation_images": 0, "validation_seconds": None}
    epochs, done = config.optim.epochs, runner.state.step // runner.plan.steps_per_epoch
    ends = [epoch for epoch in range(done + 1, epochs + 1) if epoch % config.loop.eval_every == 0 or epoch == epochs]
    few = config.optim.batch_size * runner.accelerator.num_processes
    many = min(job.num_validation, _BATCHES * few)

    def seconds(at_most: int) -> float:
        before = time.perf_counter()
        assert job.evaluate is not None
        job.evaluate(runner.accelerator, bare, at_most=at_most)
        return time.perf_counter() - before

    with runner.network.whole() as bare:
        least, most = (seconds(few) if many > few else 0.0), seconds(many)
    each = (most - least) / (many - few) if many > few else 0.0
    return {
        "validations": len(ends),
        "validation_images": job.num_validation,
        "validation_seconds": most + max(each, 0.0) * (job.num_validation - many),
    }


def _disk(runner: TrainingRunner, config: RunConfig) -> dict[str, Any]:
    """What a checkpoint holds, and the run folder with those that it keeps at most: the newest, the one before while
    the next is written, the best, and the last that is known to be good.
    """
    out, checkpoint = config.out.absolute(), runner.checkpoints.num_bytes()
    kept = config.loop.keep_checkpoints + 2 + (runner.job.evaluate is not None)
    there = next(folder for folder in (out, *out.parents) if folder.is_dir())
    return {
        "checkpoint_bytes": checkpoint,
        "run_folder_bytes": kept * checkpoint,
        "free_bytes": shutil.disk_usage(there).free,
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} thread{'' if torch.get_num_threads() == 1 else 's'}"
