"""Small images, and teachers trained on them."""

from __future__ import annotations

from pathlib import Path

import pytest

from mae_deploy.pretrain.finetune import run as finetune
from mae_deploy.pretrain.run import run as pretrain
from tests.data.image_folders import write_classes, write_noise
from tests.training.tiny_runs import finetuning, optim, pretraining


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Eleven images: two batches of five, and one that each epoch leaves out."""
    write_noise(tmp_path / "images", 11)
    return tmp_path / "images"


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """A dark and a light class, six images each to train on and three to validate with."""
    return write_classes(tmp_path / "classes")


@pytest.fixture
def teacher(images: Path, tmp_path: Path) -> Path:
    """A pretrained autoencoder: 15x10 pixels, 3x2 patches of 5x5, 12 wide, 2 blocks."""
    pretrain(pretraining(images, tmp_path / "teacher"))
    return tmp_path / "teacher"


@pytest.fixture
def expert(classes: Path, teacher: Path, tmp_path: Path) -> Path:
    """The teacher fine-tuned until it tells dark from light."""
    finetune(finetuning(classes, tmp_path / "expert", teacher, optim=optim(epochs=8, lr=2e-2, batch_size=6)))
    return tmp_path / "expert"
