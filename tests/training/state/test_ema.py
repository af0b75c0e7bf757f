"""The moving average by hand, in the model for a while, saved and resumed exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from mae_deploy.training.config import LoopConfig
from mae_deploy.training.state.ema import WeightAverage
from tests.training.linear_runs import train
from tests.training.tiny_runs import optim


def test_the_average_by_hand() -> None:
    """Decays (1 + 1) / (10 + 1), (1 + 2) / (10 + 2), and at most what was asked for."""
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, 1.0)
    average = WeightAverage(layer, 0.2)
    for step, value in enumerate((2.0, 4.0, 8.0), start=1):
        nn.init.constant_(layer.weight, value)
        average.update(step)
    first = 1 * 2 / 11 + 2 * 9 / 11
    second = 0.2 * first + 0.8 * 4
    expected = 0.2 * second + 0.8 * 8
    assert float(average.average["weight"]) == pytest.approx(expected, rel=1e-6)
    with average.shown():
        assert layer.weight.item() == pytest.approx(expected, rel=1e-6)
    assert layer.weight.item() == 8.0
    assert float(average.average["weight"]) == pytest.approx(expected, rel=1e-6)


def test_it_is_what_is_evaluated_and_exported(images: Path, tmp_path: Path) -> None:
    seen: list[torch.Tensor] = []

    def evaluate(_: Accelerator, model: nn.Module) -> dict[str, float]:
        assert isinstance(model, nn.Linear)
        seen.append(model.weight.detach().clone())
        return {"top1": 1.0}

    settings: dict[str, Any] = {"epochs": 3, "warmup_epochs": 0.0}
    plain = train(images, tmp_path / "plain", optim(**settings))
    done = train(images, tmp_path / "run", optim(ema=0.5, **settings), evaluate=evaluate)
    assert done.losses == plain.losses  # it changes nothing in training
    last = done.folder.checkpoints / "last"
    assert torch.equal(load_file(last / "model.safetensors")["weight"], seen[-1])
    assert torch.equal(load_file(last / "state" / "trained.safetensors")["weight"], plain.model.weight)
    assert torch.equal(done.model.weight, plain.model.weight)
    assert not torch.equal(seen[-1], plain.model.weight)


def test_it_is_resumed_exactly(images: Path, tmp_path: Path) -> None:
    settings = optim(ema=0.9, epochs=4)
    whole = train(images, tmp_path / "whole", settings)
    loop = LoopConfig(keep_checkpoints=9)
    train(images, tmp_path / "run", settings, loop)
    (tmp_path / "run" / "checkpoints" / "last").unlink()
    (tmp_path / "run" / "checkpoints" / "last").symlink_to("step-4")
    for step in (6, 8):
        (tmp_path / "run" / "checkpoints" / f"step-{step}").rename(tmp_path / f"away-{step}")
    again = train(images, tmp_path / "run", settings, loop, resume=True)
    for name in ("model.safetensors", "state/trained.safetensors", "state/optimizer.safetensors"):
        ours, theirs = (load_file(run.folder.checkpoints / "last" / name) for run in (again, whole))
        assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())
