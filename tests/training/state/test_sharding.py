"""The model on its device: names stay clean, compiled or not."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from mae_deploy.training.config import LoopConfig
from tests.training.linear_runs import train
from tests.training.tiny_runs import optim


def test_a_compiled_run_has_the_same_losses_and_names(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph is captured but run as it is: the compiler itself takes half a minute. Stopped compiled, resumed
    not.
    """
    compiled: list[torch.nn.Module] = []
    original = partial(torch.compile, backend="eager")

    def compile_eagerly(model: torch.nn.Module) -> object:
        compiled.append(model)
        return original(model)

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    plain = train(images, tmp_path / "plain", optim(epochs=3))
    done = train(images, tmp_path / "run", optim(epochs=3), LoopConfig(compile=True))
    assert len(compiled) == 1
    assert done.losses == plain.losses
    assert set(done.tensors()) == {"weight", "bias"}
    assert torch.equal(done.tensors()["weight"], plain.tensors()["weight"])
    train(images, tmp_path / "run", optim(epochs=3), resume=True)
