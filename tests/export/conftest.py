"""Images to prove parity on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.image_folders import write_noise


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Eleven images."""
    write_noise(tmp_path / "photos", 11)
    return tmp_path / "photos"
