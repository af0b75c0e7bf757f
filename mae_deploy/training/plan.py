"""The numbers that follow from the settings, the size of the data and the number of processes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mae_deploy.errors import ConfigError
from mae_deploy.progress import notice
from mae_deploy.training.config import OptimConfig
from mae_deploy.training.state.progress import Progress

_NOTABLE = 0.05
"""Share of the images that an epoch leaves out, above which it is said."""


@dataclass(frozen=True, slots=True)
class RunPlan:
    """A run in steps."""

    batch_size: int
    accum_iter: int
    steps_per_epoch: int
    total_steps: int
    peak_lr: float
    warmup_epochs: float


def make_plan(
    num_images: int, optim: OptimConfig, *, world_size: int, paper_warmup: float, quiet: bool = False
) -> RunPlan:
    """Batch size, steps and learning rate; a data set smaller than one batch makes the batch smaller, and says so.

    Raises:
        ConfigError: not even one image for each process.
    """
    if num_images < world_size:
        raise ConfigError(f"{num_images} image(s) cannot be shared among {world_size} processes")
    batch_size = min(optim.batch_size, max(1, num_images // world_size))
    if batch_size < optim.batch_size and not quiet:
        notice(
            "batch size:",
            f"{num_images} images do not fill {optim.batch_size} on {world_size} process(es): using {batch_size}",
        )
    accum = min(optim.accum_iter, num_images // (batch_size * world_size))
    plan = _plan(num_images, optim, batch_size, accum, world_size, paper_warmup)
    if not quiet:
        if accum < optim.accum_iter:
            notice("--accum-iter:", f"{num_images} images do not fill {optim.accum_iter} batches a step: using {accum}")
        unused = num_images - plan.steps_per_epoch * batch_size * accum * world_size
        if unused > _NOTABLE * num_images:
            notice(
                "epochs:",
                f"each leaves out {unused} of {num_images} images, others each time: what does not fill a step of"
                f" {batch_size * accum * world_size}",
            )
    return plan


def resume_plan(
    num_images: int, optim: OptimConfig, state: Progress, *, world_size: int, paper_warmup: float, quiet: bool = False
) -> RunPlan:
    """The plan that keeps a run's effective batch, on any number of processes.

    The settings as they are where their product fits; where they are those of the run before, batch size and
    accumulation are chosen.

    Raises:
        ConfigError: the settings ask for another effective batch, or the processes cannot share it.
    """
    batch_size, accum, effective = optim.batch_size, optim.accum_iter, state.effective_batch
    if batch_size * accum * world_size != effective:
        if (batch_size, accum) != (state.batch_size, state.accum_iter):
            raise ConfigError(
                f"--resume with batch size {batch_size} x accumulation {accum} x {world_size} process(es) of a run with"
                f" {effective} images a step",
                hint="their product must stay what it was",
            )
        batch_size, accum = _split(effective, world_size, batch_size)
        if world_size != state.processes and not quiet:
            kept = (
                f"{effective} images a step: batch size {batch_size} x accumulation {accum} x {world_size} process(es)"
            )
            notice("batch size:", f"resumed on {world_size} process(es) instead of {state.processes}, still {kept}")
    return _plan(num_images, optim, batch_size, accum, world_size, paper_warmup)


def _split(effective: int, world_size: int, largest: int) -> tuple[int, int]:
    """The largest batch, up to that of the run before, and the accumulation that give each process its share."""
    share, left = divmod(effective, world_size)
    if left:
        fitting = [number for number in range(1, min(effective, 4 * world_size) + 1) if effective % number == 0]
        raise ConfigError(
            f"--resume on {world_size} processes: they cannot share the run's {effective} images a step evenly",
            hint=f"start one of these numbers of processes: {', '.join(map(str, fitting))}",
        )
    batch_size = max(size for size in range(1, min(share, largest) + 1) if share % size == 0)
    return batch_size, share // batch_size


def _plan(
    num_images: int, optim: OptimConfig, batch_size: int, accum: int, world_size: int, paper_warmup: float
) -> RunPlan:
    effective = batch_size * accum * world_size
    steps = num_images // effective
    peak = optim.lr if optim.lr is not None else optim.blr * effective / 256
    warmup = resolve_warmup(optim.warmup_epochs, paper=paper_warmup, epochs=optim.epochs)
    return RunPlan(batch_size, accum, steps, steps * optim.epochs, peak, warmup)


def learning_rate(epoch: float, *, peak: float, min_lr: float, warmup_epochs: float, epochs: int) -> float:
    """Linear warm-up and half-cycle cosine, by fractional epoch counted from 0 (paper, appendix A)."""
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    progress = (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-12)
    return min_lr + (peak - min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


def resolve_warmup(warmup_epochs: float | None, *, paper: float, epochs: int) -> float:
    """What was asked for, else the paper's number but at most a tenth of the run."""
    return min(paper, epochs / 10) if warmup_epochs is None else warmup_epochs
