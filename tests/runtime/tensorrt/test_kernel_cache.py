"""The file of kernels that TensorRT for RTX compiled here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mae_deploy.machine import cache_folder
from mae_deploy.runtime.tensorrt.kernel_cache import KernelCache, kernel_file
from tests.runtime.tensorrt.planned_bundle import RTX4090


class Cache:
    """TensorRT's own: what is serialised is its content."""

    def __init__(self) -> None:
        self.content = b""

    def deserialize(self, content: bytes) -> bool:
        self.content = content if content.startswith(b"kernels") else b""
        return bool(self.content)

    def serialize(self) -> bytes:
        return self.content


def test_what_was_compiled_is_there_the_next_time(tmp_path: Path) -> None:
    cache, path = Cache(), tmp_path / "folder" / "kernels"
    kept = KernelCache(cache, path)
    kept.keep()
    assert not path.exists(), "nothing was compiled"
    cache.content = b"kernels of one shape"
    kept.keep()
    again = Cache()
    KernelCache(again, path)
    assert again.content == cache.content


def test_nothing_is_written_twice(tmp_path: Path) -> None:
    cache, path = Cache(), tmp_path / "kernels"
    kept = KernelCache(cache, path)
    cache.content = b"kernels"
    kept.keep()
    path.unlink()
    kept.keep()
    assert not path.exists()


def test_a_file_that_is_not_taken_is_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "kernels"
    path.write_bytes(b"of another driver")
    cache = Cache()
    kept = KernelCache(cache, path)
    cache.content = b"kernels"
    kept.keep()
    assert path.read_bytes() == b"kernels"


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = Cache()
    kept = KernelCache(cache, tmp_path / "file" / "kernels")
    cache.content = b"kernels"
    kept.keep()
    assert "cannot be kept" in caplog.text


def test_a_file_for_each_version_gpu_driver_and_plan(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    api: Any = SimpleNamespace(version="1.7.1.116", gpu=RTX4090)
    first, second = (kernel_file(api, tmp_path / name) for name in ("a", "b"))
    assert first != second
    assert first.parent == cache_folder("tensorrt-rtx")
    assert first.name.startswith("1.7.1.116-nvidia-geforce-rtx-4090-cuda13.0-")
