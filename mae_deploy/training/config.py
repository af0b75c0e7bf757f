"""Settings of the training loop. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mae_deploy.config import Settings, setting
from mae_deploy.errors import ConfigError

Device = Literal["auto", "cpu", "cuda"]
TrainingPrecision = Literal["auto", "fp32", "bf16", "fp16"]
Sharding = Literal["ddp", "fsdp2"]

TRACKERS = ("wandb", "mlflow")
"""Trackers beside TensorBoard and JSONL, which are always written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig(Settings, resume="fixed"):
    """Optimisation."""

    epochs: int = setting(100, basic=True)
    """Passes over the data."""
    # These two may change where their product with the number of processes does not (training/plan.py).
    batch_size: int = setting(64, resume="free", basic=True)
    """Images a step in each process."""
    accum_iter: int = setting(1, resume="free")
    """Batches whose gradients are summed into one optimiser step."""
    lr: float | None = setting(None, basic=True)
    """Peak learning rate; default: blr x effective batch / 256."""
    blr: float = 1.5e-4
    """Base learning rate, for 256 images."""
    min_lr: float = 0.0
    """Learning rate at the end of the cosine."""
    warmup_epochs: float | None = None
    """Epochs of linear warm-up; default: the paper's, at most a tenth of the run."""
    weight_decay: float = 0.05
    """AdamW's weight decay; none on biases and norms."""
    betas: tuple[float, float] = setting((0.9, 0.95), hidden=True)
    """AdamW's betas."""
    clip_grad: float | None = None
    """Clip the gradient's global norm to this; default: no clipping, as in the paper."""
    ema: float | None = None
    """Keep an exponential moving average of the weights with this decay, such as 0.9999, at most (1 + step) / (10 +
    step); it is what is evaluated and exported. Default: none."""

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch_size, self.accum_iter) < 1:
            raise ConfigError("--epochs, --batch-size and --accum-iter must be at least 1")
        for name in ("lr", "blr", "min_lr", "weight_decay", "warmup_epochs"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise ConfigError(f"--{name.replace('_', '-')} {value} cannot be negative")
        if self.clip_grad is not None and self.clip_grad <= 0:
            raise ConfigError(f"--clip-grad {self.clip_grad} must be above 0")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ConfigError(f"--ema {self.ema} must be above 0 and below 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig(Settings):
    """Run."""

    precision: TrainingPrecision = setting("auto", resume="fixed", basic=True)
    """Arithmetic of the forward pass: fp32, bf16, fp16; auto is bf16 on a GPU that has it, else fp32."""
    checkpoint_every: int = setting(1, resume="free")
    """Epochs between checkpoints."""
    checkpoint_minutes: float = setting(15.0, resume="free")
    """Also write a checkpoint within an epoch when this many minutes have passed since the last."""
    keep_checkpoints: int = setting(1, resume="free")
    """Newest step-N folders to keep beside the best."""
    eval_every: int = setting(1, resume="free")
    """Epochs between evaluations, where there is a validation set; the last epoch is always evaluated."""
    max_skips: int = setting(3, resume="free")
    """Steps with a non-finite loss or gradient in a row, which are skipped, until the run goes back to its last good
    checkpoint with half the learning rate."""
    max_rollbacks: int = setting(3, resume="free")
    """Times that the run goes back, until it stops."""
    sharding: Sharding = setting("ddp", resume="free")
    """Several processes: ddp gives each the whole model, fsdp2 a share of weights, gradients and optimiser (ViT-H)."""
    compile: bool = setting(False, resume="free")
    """Compile the model with torch.compile: minutes at the start, then faster steps on a GPU."""
    measure_kernels: bool = setting(True, resume="fixed")
    """On a CPU, take for every matrix product and attention the FP32 kernel that is the fastest at its size, measured
    when it is first met and kept with the run."""
    tracker: tuple[str, ...] = setting((), resume="free")
    """Also log to these, separated by commas: wandb, mlflow; TensorBoard and JSONL are always written."""
    profile: bool = setting(False, resume="free")
    """Write a trace of a few steps after the first ones, and a table of the costliest operators, to profile/ in the run
    folder."""

    def __post_init__(self) -> None:
        if min(self.max_skips, self.max_rollbacks + 1) < 1:
            raise ConfigError("--max-skips must be at least 1, --max-rollbacks at least 0")
        if unknown := [name for name in self.tracker if name not in TRACKERS]:
            raise ConfigError(f"--tracker {unknown[0]} is not one of {', '.join(TRACKERS)}")
        if self.sharding == "fsdp2" and self.precision == "fp16":
            raise ConfigError("--sharding fsdp2 does not work with --precision fp16", hint="use --precision bf16")
        if min(self.checkpoint_every, self.keep_checkpoints, self.eval_every) < 1 or self.checkpoint_minutes <= 0:
            raise ConfigError(
                "--checkpoint-every, --keep-checkpoints, --eval-every and --checkpoint-minutes must be above 0"
            )
