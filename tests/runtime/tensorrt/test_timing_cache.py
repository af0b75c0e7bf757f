"""Timing caches: one for each version, GPU and set of options, none of which loses what another build adds at the same
time.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from mae_deploy.runtime.cuda.driver import Gpu
from mae_deploy.runtime.tensorrt.options import BuildOptions
from mae_deploy.runtime.tensorrt.timing_cache import attach, cache_file, keep, slug

ORIN = Gpu(index=0, name="Orin (nvgpu)", compute_capability=(8, 7), memory_bytes=1 << 33, driver="12.6")


class Cache:
    """Stands for a timing cache: a set of lines, of one version."""

    def __init__(self, content: bytes) -> None:
        version, *lines = content.decode().splitlines() or ["10.3.0"]
        self.version, self.lines = version, set(lines)

    def combine(self, other: Cache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.lines |= other.lines
        return True

    def serialize(self) -> bytes:
        return "\n".join([self.version, *sorted(self.lines)]).encode()


class Config:
    """Stands for a builder's config with TensorRT's rules for its cache."""

    def __init__(self) -> None:
        self.cache: Cache | None = None

    def create_timing_cache(self, content: bytes) -> Cache | None:
        return None if content == b"broken" else Cache(content)

    def set_timing_cache(self, cache: Cache | None, ignore_mismatch: bool) -> bool:
        if cache is None or (cache.version != "10.3.0" and not ignore_mismatch):
            return False
        self.cache = cache
        return True

    def get_timing_cache(self) -> Cache | None:
        return self.cache


def file_of(**options: Any) -> Path | None:
    return cache_file(BuildOptions(**options), "10.3.0", ORIN, "fp16")


def test_a_file_for_each_version_gpu_and_set_of_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAE_DEPLOY_CACHE", str(tmp_path))
    assert file_of() == tmp_path / "tensorrt/10.3.0-orin-nvgpu-sm87-fp16-level-default-timings"
    folder: dict[str, Any] = {"timing_cache": str(tmp_path)}
    other = Gpu(index=0, name="Orin (nvgpu)", compute_capability=(8, 9), memory_bytes=1, driver="12.6")
    files = [
        file_of(**folder),
        file_of(**folder, optimization_level=3),
        file_of(**folder, hardware_compatible="ampere"),
        file_of(**folder, version_compatible=True),
        cache_file(BuildOptions(**folder), "10.3.1", ORIN, "fp16"),
        cache_file(BuildOptions(**folder), "10.3.0", other, "fp16"),
        cache_file(BuildOptions(**folder), "10.3.0", ORIN, "int8"),
    ]
    assert len(set(files)) == len(files)
    assert {file.parent for file in files if file is not None} == {tmp_path}
    assert file_of(**folder, workspace=7) == files[0], "the workspace changes no timing"
    assert file_of(timing_cache="off") is None


@pytest.mark.parametrize(
    ("name", "expected"), [("NVIDIA H200", "nvidia-h200"), ("Tesla T4/16 ", "tesla-t4-16"), ("../..", "gpu")]
)
def test_names_of_gpus_in_file_names(name: str, expected: str) -> None:
    assert slug(name) == expected


@pytest.mark.parametrize("content", [None, b"", b"broken", b"8.6.0\na"])
def test_what_cannot_be_used_is_replaced(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "timings").write_bytes(content)
    config = Config()
    attach(config, tmp_path / "timings")
    assert config.cache is not None
    assert config.cache.serialize() == b"10.3.0"


def test_what_another_build_added_meanwhile_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "timings"
    configs = [Config() for _ in range(8)]
    for index, config in enumerate(configs):
        attach(config, path)
        assert config.cache is not None
        config.cache.lines.add(f"kernel {index}")
    threads = [threading.Thread(target=keep, args=(config, path)) for config in configs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Cache(path.read_bytes()).lines == {f"kernel {index}" for index in range(8)}
    assert sorted(file.name for file in path.parent.iterdir()) == ["timings", "timings.lock"]


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    config = Config()
    attach(config, tmp_path / "file" / "timings")
    keep(config, tmp_path / "file" / "timings")
    assert "cannot be written" in caplog.text
