"""Bundles that `mae-deploy export` wrote, and images for them."""

from __future__ import annotations

from pathlib import Path

import pytest

from mae_deploy.export.config import ExportConfig
from mae_deploy.export.run import run_export
from tests.data.image_folders import write_noise
from tests.export.tiny_exports import CLASS_NAMES, write_checkpoint
from tests.models.tiny_models import tiny_classifier, tiny_encoder


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `encoder` (visible tokens) and `classifier` (full); tests that change them copy them first."""
    root = tmp_path_factory.mktemp("exported")
    write_noise(root / "photos", 11)
    encoder = write_checkpoint(root / "checkpoints" / "encoder", tiny_encoder(), licence="own")
    classifier = write_checkpoint(
        root / "checkpoints" / "classifier", tiny_classifier("avg"), licence="own", class_names=CLASS_NAMES
    )
    run_export(ExportConfig(checkpoint=encoder, out=root / "encoder", tokens="visible", samples=root / "photos"))
    run_export(ExportConfig(checkpoint=classifier, out=root / "classifier", samples=root / "photos"))
    return root


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Five images, the last with a name that is no valid markup: `a[/x].png`."""
    folder = tmp_path / "photos"
    write_noise(folder, 5)
    (folder / "a[").mkdir()
    (folder / "04.png").rename(folder / "a[" / "x].png")
    return folder
