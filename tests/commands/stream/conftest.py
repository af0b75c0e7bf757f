"""A cached bundle and a video that the tests of `mae-deploy stream` share."""

from __future__ import annotations

from pathlib import Path

import pytest

from mae_deploy.cli import main
from tests.commands.stream.typed import COUNT
from tests.export.tiny_exports import write_checkpoint
from tests.models.tiny_models import tiny_encoder
from tests.runtime.video.tiny_video import moving_square, write_video


@pytest.fixture(scope="session")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stream")
    checkpoint = write_checkpoint(root / "checkpoint", tiny_encoder())
    assert main(["export", str(checkpoint), "--out", str(root / "cached"), "--tokens", "cached"]) == 0
    return root / "cached"


@pytest.fixture(scope="session")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "square.mp4", [moving_square(i) for i in range(COUNT)])
