"""A thread is bound to cores for a while, and told apart from one that cannot be."""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_deploy.cli import main
from mae_deploy.errors import ConfigError
from mae_deploy.runtime import Bundle
from mae_deploy.runtime.engines.affinity import bound_to
from mae_deploy.runtime.engines.base import EngineOptions
from mae_deploy.runtime.registry import load_engine
from tests.runtime.tiny_bundle import golden_inputs, reference

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux binds threads to cores")


@linux
def test_the_calling_thread_and_those_that_it_starts_are_bound_and_the_former_is_released() -> None:
    before = os.sched_getaffinity(0)
    core = max(before)
    inherited: list[set[int]] = []
    with bound_to([core]):
        assert os.sched_getaffinity(0) == {core}
        thread = threading.Thread(target=lambda: inherited.append(os.sched_getaffinity(0)))
        thread.start()
        thread.join()
    assert inherited == [{core}]
    assert os.sched_getaffinity(0) == before


@linux
def test_released_after_an_error_too() -> None:
    before = os.sched_getaffinity(0)
    with pytest.raises(ZeroDivisionError), bound_to([min(before)]):
        raise ZeroDivisionError
    assert os.sched_getaffinity(0) == before


@linux
def test_none_binds_nothing() -> None:
    with bound_to(None):
        assert os.sched_getaffinity(0) == os.sched_getaffinity(os.getpid())


@linux
@pytest.mark.parametrize("absent", [[4_000], [10**12]], ids=["no such core", "no such number"])
def test_a_core_that_is_not_there(absent: list[int]) -> None:
    """Linux itself binds to those of the cores that are there, and says nothing of the others."""
    before = os.sched_getaffinity(0)
    for cores in (absent, [min(before), *absent]):
        with pytest.raises(ConfigError, match=f"{absent[0]} cannot be used") as caught, bound_to(cores):
            raise AssertionError("the block ran")
        assert caught.value.hint == f"this process may use {','.join(map(str, sorted(before)))}"
        assert os.sched_getaffinity(0) == before


@linux
def test_an_engine_s_threads(full_bundle: Path) -> None:
    """ONNX Runtime's; see test_openvino_engine for OpenVINO's."""
    core = max(os.sched_getaffinity(0))
    before = set(os.listdir("/proc/self/task"))
    with load_engine(Bundle.load(full_bundle), "onnxruntime", EngineOptions(affinity=(core,), threads=3)) as engine:
        started = set(os.listdir("/proc/self/task")) - before
        assert len(started) == 2, "the third is the caller"
        assert [os.sched_getaffinity(int(thread)) for thread in started] == [{core}, {core}]
        samples = golden_inputs(visible=False)
        np.testing.assert_allclose(engine.run(samples)["cls"], reference(**samples)["cls"], atol=1e-5)


@linux
@pytest.mark.parametrize("command", ["verify", "predict"])
def test_the_command_line(command: str, full_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (17, 13)).save(tmp_path / "image.png")
    line = [
        command,
        str(full_bundle),
        *([str(tmp_path / "image.png")] if command == "predict" else []),
        "--json",
        "--affinity",
    ]
    assert main([*line, "0,4000"]) == 2
    assert "error: CPU cores 0,4000 cannot be used\nhint: this process may use " in capsys.readouterr().err
    assert main([*line, str(min(os.sched_getaffinity(0)))]) == 0
    assert json.loads(capsys.readouterr().out)


def test_a_system_that_cannot_bind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ConfigError, match="cannot be bound to CPU cores on darwin"), bound_to([0]):
        raise AssertionError("the block ran")
