"""Training one linear layer through the loop, in this process or in several."""

from __future__ import annotations

import math
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mae_deploy.checkpoint import Metadata
from mae_deploy.data.config import CropConfig, DataConfig
from mae_deploy.data.dataset import ImageDataset
from mae_deploy.data.sources.open import unlabelled_images
from mae_deploy.data.transforms import train_transform
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.training.config import LoopConfig, OptimConfig
from mae_deploy.training.loop import TrainingJob, fit, make_accelerator
from mae_deploy.training.optim.groups import decay_groups
from mae_deploy.training.state.run_folder import RunFolder, read_metrics
from mae_deploy.training.step import Loss, StepBatch
from tests.training.tiny_runs import optim

SPEC = Preprocess(image_size=(5, 7))


def squared_error(model: nn.Module, batch: StepBatch) -> dict[str, Tensor]:
    error = model(batch.images.flatten(1)) - 1
    return {"loss": error.square().mean(), "bias": error.mean()}


class Planted:
    """The squared error, not finite in some steps, counted from 1.

    Args:
        rank: of the process in which it is; None in all.
        gradient: only the gradient is not finite.
    """

    def __init__(
        self, steps: Collection[int], *, value: float = math.nan, rank: int | None = None, gradient: bool = False
    ) -> None:
        self.steps, self.value, self.rank, self.gradient = steps, value, rank, gradient

    def __call__(self, model: nn.Module, batch: StepBatch) -> dict[str, Tensor]:
        parts = squared_error(model, batch)
        if batch.step + 1 in self.steps and self.rank in (None, int(os.environ.get("RANK", "0"))):
            factor = torch.full((), self.value)
            parts["loss"] = parts["loss"] + (
                0 * Spoil.apply(parts["loss"]) if self.gradient else parts["loss"] * factor
            )
        return parts


class Spoil(torch.autograd.Function):
    """The identity, with a gradient that is not a number."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * math.nan


@dataclass(frozen=True)
class Settings:
    """What the loop reads of a stage's settings."""

    optim: OptimConfig
    loop: LoopConfig
    images: DataConfig
    seed: int = 0


@dataclass
class Trained:
    """A finished run and the layer that it trained."""

    model: nn.Linear
    folder: RunFolder
    summary: dict[str, Any]

    @property
    def losses(self) -> list[float]:
        return [line["loss"] for line in read_metrics(self.folder.path)]

    def first_moment(self) -> Tensor:
        """Of the weights, as AdamW had it at the last checkpoint."""
        return load_file(self.folder.checkpoints / "last" / "state" / "optimizer.safetensors")["weight/exp_avg"]

    def tensors(self) -> dict[str, Tensor]:
        """Of the last checkpoint."""
        return load_file(self.folder.checkpoints / "last" / "model.safetensors")

    @property
    def best(self) -> Path:
        return self.folder.checkpoints / "best"


def train(
    images: Path,
    out: Path,
    settings: OptimConfig | None = None,
    loop: LoopConfig | None = None,
    *,
    loss: Loss = squared_error,
    resume: bool = False,
    max_corrupt: int = 3,
    weight_scale: float = 1.0,
    **more: Any,
) -> Trained:
    """Train one linear layer, its weight at a scale of the learning rate; `more` goes into the job."""
    torch.manual_seed(0)
    model = nn.Linear(105, 1)
    found = unlabelled_images(images)
    dataset = ImageDataset(found, train_transform(SPEC, CropConfig()), seed=0, replace_unreadable=True)
    groups = decay_groups(model, 0.05)
    assert groups[0]["names"] == ["weight"]
    groups[0]["lr_scale"] = weight_scale
    job = TrainingJob(
        title="train",
        model=model,
        saved=model,
        groups=groups,
        dataset=dataset,
        spec=SPEC,
        loss=loss,
        metadata=lambda: Metadata(kind="encoder", encoder={}, preprocess={}),
        paper_warmup=1.0,
        **more,
    )
    settings = settings or optim()
    accelerator = make_accelerator("cpu", "fp32", out)
    loop_settings = Settings(settings, loop or LoopConfig(), DataConfig(num_workers=0, max_corrupt=max_corrupt))
    main = accelerator.is_main_process
    with RunFolder.open(out, settings, found.fingerprint(), resume=resume, write=main) as folder:
        summary = fit(job, folder, accelerator, loop_settings)
    return Trained(model, folder, summary)
