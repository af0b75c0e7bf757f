"""Teachers: the pretrained network, and one fine-tuned from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mae_deploy.pretrain.finetune import run_finetune
from tests.training.tiny_runs import finetuning, optim


@pytest.fixture
def teacher(pretrained: Path) -> Path:
    """The pretrained autoencoder."""
    return pretrained


@pytest.fixture
def expert(classes: Path, teacher: Path, tmp_path: Path) -> Path:
    """The teacher fine-tuned until it tells dark from light."""
    run_finetune(finetuning(classes, tmp_path / "expert", teacher, optim=optim(epochs=8, lr=2e-2, batch_size=6)))
    return tmp_path / "expert"
