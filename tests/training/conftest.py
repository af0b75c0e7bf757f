"""Folders of small images to train on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.image_folders import write_noise


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Eleven images: two batches of five, and one that each epoch leaves out."""
    write_noise(tmp_path / "images", 11)
    return tmp_path / "images"
