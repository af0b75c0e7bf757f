"""Folders of small images to read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.image_folders import write_noise


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Eleven readable images in two folders."""
    root = tmp_path / "images"
    write_noise(root / "a", 7)
    write_noise(root / "b", 4, first=7)
    return root
