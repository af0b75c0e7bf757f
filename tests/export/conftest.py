"""Images to prove parity on, and checkpoints to export in every precision."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.image_folders import write_noise
from tests.export.robust_exports import Exports, robust_classifier, robust_mae, write_blots
from tests.export.tiny_exports import CLASS_NAMES, write_checkpoint


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Eleven images."""
    write_noise(tmp_path / "photos", 11)
    return tmp_path / "photos"


@pytest.fixture(scope="session")
def robust(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints `mae` and `classifier`, 11 `photos`, 128 images for `calibration`, and a `cache` of
    what was calibrated.
    """
    root = tmp_path_factory.mktemp("robust")
    write_checkpoint(root / "mae", robust_mae(), licence="own")
    write_checkpoint(root / "classifier", robust_classifier(), licence="own", class_names=CLASS_NAMES)
    write_blots(root / "photos", 11)
    write_blots(root / "calibration", 128, first=100)
    return root


@pytest.fixture
def exports(
    robust: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Exports:
    """Exports of `mae` to a folder that is not there yet."""
    monkeypatch.setenv("MAE_DEPLOY_CACHE", str(robust / "cache"))
    return Exports(robust / "mae", robust / "photos", tmp_path / "place" / "bundle", capsys)
