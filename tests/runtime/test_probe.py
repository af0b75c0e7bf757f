"""Load time and peak memory of a process of its own: what they count, and that a process which fails is one line."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mae_deploy.errors import MaeDeployError
from mae_deploy.runtime import probe
from mae_deploy.runtime.engines.base import EngineOptions
from mae_deploy.runtime.probe import peak_memory, probe_graph
from tests.runtime.tiny_bundle import golden_inputs, write_bundle

ONE_THREAD = EngineOptions(threads=1)


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle") / "encoder.onnx"


@pytest.mark.skipif(sys.platform != "linux", reason="no /proc")
def test_memory_is_that_of_the_child_alone(graph: Path) -> None:
    ballast = np.ones(40_000_000)  # 305 MiB, which the child must not be charged for
    small = probe_graph(graph, "onnxruntime", ONE_THREAD, golden_inputs(visible=True))
    own = peak_memory()
    assert small.peak_mib is not None
    assert own is not None
    assert own > ballast.nbytes / 2**20 > small.peak_mib > 10
    assert 0 < small.load_seconds < 60
    inputs = {name: np.repeat(array, 2000, axis=0) for name, array in golden_inputs(visible=True).items()}
    large = probe_graph(graph, "onnxruntime", ONE_THREAD, inputs)
    assert large.peak_mib is not None
    assert large.peak_mib > small.peak_mib + inputs["images"].nbytes / 2**20 > small.peak_mib + 9


def test_a_graph_that_cannot_be_run(tmp_path: Path, graph: Path) -> None:
    with pytest.raises(
        MaeDeployError,
        match=r"^a process of its own ends with 1: mae_deploy\.errors\.ConfigError: no ONNX file at .*none\.onnx$",
    ):
        probe_graph(tmp_path / "none.onnx", "onnxruntime", ONE_THREAD, {})
    with pytest.raises(
        MaeDeployError, match=r"ends with 1: .*the graph takes the inputs images, ids_keep, not odd name$"
    ):
        probe_graph(graph, "onnxruntime", ONE_THREAD, {"odd name": np.zeros(1)})


def test_a_process_that_is_killed_or_says_nothing_of_use(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ends_with(code: int, said: str) -> None:
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], code, said, ""))

    for code, said, expected in [
        (-9, "", "a process of its own ends with -9: it says nothing"),
        (0, "", "a process of its own fails: list index out of range"),
        (0, "hello", "a process of its own fails: Expecting value"),
        (0, '{"peak": 1}', "a process of its own fails: "),
    ]:
        ends_with(code, said)
        with pytest.raises(MaeDeployError, match=expected):
            probe_graph(graph, "onnxruntime", ONE_THREAD, {})
    ends_with(0, 'a greeting of some library\n{"load_seconds": 1.5, "peak_mib": null}\n')
    assert probe_graph(graph, "onnxruntime", ONE_THREAD, {}).load_seconds == 1.5


def test_a_process_that_cannot_start_or_does_not_end(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_TIMEOUT", 0.001)
    with pytest.raises(MaeDeployError, match="timed out"):
        probe_graph(graph, "onnxruntime", ONE_THREAD, {})
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(MaeDeployError, match="No such file or directory"):
        probe_graph(graph, "onnxruntime", ONE_THREAD, {})


def test_the_child_gets_all_that_it_needs(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def run(command: list[str], **_: Any) -> Any:
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, '{"load_seconds": 1, "peak_mib": 2}', "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.chdir(graph.parent)
    options = EngineOptions(threads=3, affinity=(0, 5))
    probe_graph(Path("encoder.onnx"), "openvino", options, {"a": np.zeros(1)}, precision="bf16", bundle=Path())
    ((_, *command, request),) = asked
    assert command[:2] == ["-m", "mae_deploy.runtime.probe"]
    assert json.loads(request) == {
        "graph": str(graph),
        "bundle": str(graph.parent),
        "engine": "openvino",
        "options": {**dataclasses.asdict(options), "affinity": [0, 5]},
        "precision": "bf16",
        "inputs": ["a"],
    }


def test_a_system_that_does_not_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_STATUS", tmp_path / "status")
    assert peak_memory() is None
    (tmp_path / "status").write_text("Name:\tpython\nVmHWM:\t    2048 kB\n")
    assert peak_memory() == 2
    (tmp_path / "status").write_text("Name:\tpython\n")
    assert peak_memory() is None
