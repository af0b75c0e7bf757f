"""Settings of the training loop. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from mae_deploy.config import Settings, nearest, setting
from mae_deploy.errors import ConfigError, MaeDeployError
from mae_deploy.recipe import settings_of_run

Device = Literal["auto", "cpu", "cuda"]
TrainingPrecision = Literal["auto", "fp32", "bf16", "fp16"]
Sharding = Literal["ddp", "fsdp2"]

TRACKERS = ("wandb", "mlflow")
"""Trackers beside TensorBoard and JSONL, which are always written."""


class RunSettings(Settings):
    """Settings of a command that writes a run folder, and goes on with it: with `resume`, those left out are the
    run's.
    """

    __slots__ = ()
    shared = True

    @classmethod
    def completed(cls, values: dict[str, Any]) -> dict[str, Any]:
        return settings_of_run(values)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig(Settings, resume="fixed"):
    """Optimisation."""

    epochs: int = setting(100, basic=True, at_least=1, at_most=100_000)
    """Passes over the data."""
    # These two may change where their product with the number of processes does not (training/plan.py).
    batch_size: int = setting(64, resume="free", basic=True, at_least=1)
    """Images a step in each process."""
    accum_iter: int = setting(1, resume="free", at_least=1)
    """Batches whose gradients are summed into one optimiser step."""
    lr: float | None = setting(None, basic=True, at_least=0)
    """Peak learning rate; default: blr x effective batch / 256."""
    blr: float = setting(1.5e-4, at_least=0)
    """Base learning rate, for 256 images."""
    min_lr: float = setting(0.0, at_least=0)
    """Learning rate at the end of the cosine."""
    warmup_epochs: float | None = setting(None, at_least=0)
    """Epochs of linear warm-up; default: the paper's, at most a tenth of the run."""
    weight_decay: float = setting(0.05, at_least=0)
    """AdamW's weight decay; none on biases and norms."""
    betas: tuple[float, float] = setting((0.9, 0.95), hidden=True)
    """AdamW's betas."""
    clip_grad: float | None = setting(None, above=0)
    """Clip the gradient's global norm to this; default: no clipping, as in the paper."""
    ema: float | None = setting(None, above=0, below=1)
    """Keep an exponential moving average of the weights with this decay, such as 0.9999, at most (1 + step) / (10 +
    step); it is what is evaluated and exported. Default: none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig(Settings):
    """Run."""

    precision: TrainingPrecision = setting("auto", resume="fixed")
    """Arithmetic of the forward pass: fp32, bf16, fp16; auto is bf16 on a GPU that has it, else fp32."""
    plan: bool = setting(False, resume="free", basic=True)
    """Say what the run will take, from a few steps that are measured, and do nothing else: time, memory, disk."""
    checkpoint_every: int = setting(1, resume="free", at_least=1)
    """Epochs between checkpoints."""
    checkpoint_minutes: float = setting(15.0, resume="free", above=0)
    """Also write a checkpoint within an epoch when this many minutes have passed since the last."""
    keep_checkpoints: int = setting(1, resume="free", at_least=1)
    """Newest step-N folders to keep beside the best."""
    eval_every: int = setting(1, resume="free", at_least=1)
    """Epochs between evaluations, where there is a validation set; the last epoch is always evaluated."""
    max_skips: int = setting(3, resume="free", at_least=1)
    """Steps with a non-finite loss or gradient in a row, which are skipped, until the run goes back to its last good
    checkpoint with half the learning rate."""
    max_rollbacks: int = setting(3, resume="free", at_least=0)
    """Times that the run goes back, until it stops."""
    sharding: Sharding = setting("ddp", resume="free")
    """Several processes: ddp gives each the whole model, fsdp2 a share of weights, gradients and optimiser (ViT-H)."""
    compile: bool = setting(False, resume="free")
    """Compile the transformer blocks with torch.compile, each kind once: slower to start, then faster steps on a
    GPU."""
    deterministic: bool = setting(False, resume="free")
    """Compute with kernels that give the same bits each time, so that two runs on one machine with as many threads are
    equal to the last bit; a GPU is slower for it and needs more memory, a CPU hardly."""
    measure_kernels: bool = setting(True, resume="free")
    """Not used: PyTorch's own kernels are taken, which were as fast as those that were chosen by measurement."""
    tracker: tuple[str, ...] = setting((), resume="free")
    """Also log to these, separated by commas: wandb, mlflow; TensorBoard and JSONL are always written."""
    profile: bool = setting(False, resume="free")
    """Write a trace of a few steps after the first ones, and a table of the costliest operators, to profile/ in the run
    folder."""

    def faults(self) -> Iterator[MaeDeployError]:
        if unknown := [name for name in self.tracker if name not in TRACKERS]:
            yield ConfigError(
                f"--tracker '{unknown[0]}' is not one of {', '.join(TRACKERS)}", hint=nearest(unknown[0], [*TRACKERS])
            )
        if self.sharding == "fsdp2" and self.precision == "fp16":
            yield ConfigError(
                "--sharding fsdp2 does not work with --precision fp16", hint="use --precision bf16 or fp32"
            )
