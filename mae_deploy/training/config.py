"""Settings of the training loop. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mae_deploy.config import setting
from mae_deploy.errors import ConfigError

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """Optimisation."""

    epochs: int = 100
    """Passes over the data."""
    batch_size: int = 64
    """Images a step in each process."""
    accum_iter: int = 1
    """Batches whose gradients are summed into one optimiser step."""
    lr: float | None = None
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

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch_size, self.accum_iter) < 1:
            raise ConfigError("--epochs, --batch-size and --accum-iter must be at least 1")
        for name in ("lr", "blr", "min_lr", "weight_decay", "warmup_epochs"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise ConfigError(f"--{name.replace('_', '-')} {value} cannot be negative")
        if self.clip_grad is not None and self.clip_grad <= 0:
            raise ConfigError(f"--clip-grad {self.clip_grad} must be above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig:
    """Run."""

    precision: Precision = "auto"
    """Arithmetic of the forward pass: fp32, bf16, fp16; auto is bf16 on a GPU that has it, else fp32."""
    checkpoint_every: int = 1
    """Epochs between checkpoints."""
    checkpoint_minutes: float = 15.0
    """Also write a checkpoint within an epoch when this many minutes have passed since the last."""
    keep_checkpoints: int = 1
    """Newest step-N folders to keep beside the best."""
    eval_every: int = 1
    """Epochs between evaluations, where there is a validation set; the last epoch is always evaluated."""

    def __post_init__(self) -> None:
        if min(self.checkpoint_every, self.keep_checkpoints, self.eval_every) < 1 or self.checkpoint_minutes <= 0:
            raise ConfigError("--checkpoint-every, --keep-checkpoints, --eval-every and --checkpoint-minutes must be above 0")


DOES_NOT_CHANGE_LOSSES = frozenset(
    {
        "data",
        "out",
        "resume",
        "device",
        "num_workers",
        "max_corrupt",
        "cache",
        "checkpoint_every",
        "checkpoint_minutes",
        "keep_checkpoints",
        "eval_every",
        "pictures_every",
    }
)
"""Settings that may differ between a run and its resumption."""
