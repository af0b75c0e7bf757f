"""Folders of small images to train on, and a pretrained network, for every stage's tests."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from mae_deploy.pretrain.run import run_pretrain
from tests.data.image_folders import write_classes, write_noise
from tests.training.tiny_runs import pretraining

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # where the tests run under nohup, commands would go on ignoring it


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Kernels that are chosen here, on a machine that does much else, are not for the user's runs."""
    os.environ["MAE_DEPLOY_CACHE"] = str(tmp_path_factory.mktemp("cache"))


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
def pretrained(images: Path, tmp_path: Path) -> Path:
    """A run folder: 15x10 pixels, 3x2 patches, 12 wide, 2 blocks."""
    run_pretrain(pretraining(images, tmp_path / "pretrained"))
    return tmp_path / "pretrained"
