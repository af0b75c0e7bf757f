"""Bundles to test with, and a CUDA driver that is a stub."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from mae_deploy.runtime.cuda import driver
from tests.runtime.cuda.stub_driver import compile_stub, load_stub
from tests.runtime.tiny_bundle import write_bundle


@pytest.fixture
def visible_bundle(tmp_path: Path) -> Path:
    """Dynamic batch, dynamic K."""
    return write_bundle(tmp_path / "visible")


@pytest.fixture
def full_bundle(tmp_path: Path) -> Path:
    """Dynamic batch, every patch."""
    return write_bundle(tmp_path / "full", token_mode="full")


@pytest.fixture(scope="session")
def stub_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stub of the CUDA driver, compiled."""
    return compile_stub(tmp_path_factory.mktemp("driver"))


@pytest.fixture
def stub_driver(stub_library: Path, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    """The stub, with one GPU, as the driver of this process."""
    monkeypatch.setattr(driver, "LIBRARY", str(stub_library))
    return load_stub(stub_library)
