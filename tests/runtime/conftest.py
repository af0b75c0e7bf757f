"""Bundles to test with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runtime.tiny_bundle import write_bundle


@pytest.fixture
def visible_bundle(tmp_path: Path) -> Path:
    """Dynamic batch, dynamic K."""
    return write_bundle(tmp_path / "visible")


@pytest.fixture
def full_bundle(tmp_path: Path) -> Path:
    """Dynamic batch, every patch."""
    return write_bundle(tmp_path / "full", token_mode="full")
