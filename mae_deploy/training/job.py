"""What a stage gives to the loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from mae_deploy.checkpoint import Metadata
from mae_deploy.data.config import DataConfig
from mae_deploy.data.dataset import TrainImages
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.training.config import Device, LoopConfig, OptimConfig
from mae_deploy.training.optim.groups import ParamGroup
from mae_deploy.training.step import Loss

Evaluation = dict[str, float]


class TrainConfig(Protocol):
    """What the loop reads of a stage's settings."""

    @property
    def optim(self) -> OptimConfig:
        """Optimisation."""
        ...

    @property
    def loop(self) -> LoopConfig:
        """Run."""
        ...

    @property
    def images(self) -> DataConfig:
        """Data."""
        ...

    @property
    def seed(self) -> int:
        """Of everything random."""
        ...


class RunConfig(TrainConfig, Protocol):
    """With what says where the run is."""

    @property
    def out(self) -> Path:
        """Run folder."""
        ...

    @property
    def device(self) -> Device:
        """Where to compute."""
        ...

    @property
    def resume(self) -> bool:
        """Go on with the run that is there."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingJob:
    """What a stage gives to the loop."""

    title: str
    """Shown beside the progress bar."""
    model: nn.Module
    """What is trained."""
    saved: nn.Module
    """What the checkpoint holds: the model, or the part of it that outlives training."""
    groups: list[ParamGroup]
    """The optimiser's parameter groups."""
    dataset: TrainImages
    """Training images."""
    spec: Preprocess
    """Mean and standard deviation of the images."""
    loss: Loss
    """`(model, batch)` to scalars; `loss` is minimised, the others are logged."""
    metadata: Callable[[], Metadata]
    """The checkpoint's metadata, but for step and metrics."""
    paper_warmup: float
    """Warm-up epochs of the paper's recipe for this stage."""
    evaluate: Callable[..., Evaluation] | None = None
    """Validation of the bare model, `(accelerator, model)`, and with `at_most` of its first images; `top1` picks the
    best checkpoint, of those that have one."""
    num_validation: int = 0
    """Images of a validation."""
    begin: Callable[[], None] | None = None
    """What a run does before its first step, once it has its folder."""
    epoch_end: Callable[[nn.Module, int, bool], None] | None = None
    """Called on the main process with the bare model, the number of finished epochs, and whether it is the last."""
    optimizer: Callable[[list[ParamGroup]], torch.optim.Optimizer] | None = None
    """Another optimiser than fused AdamW; its state holds tensors only."""
