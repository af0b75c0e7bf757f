"""An engine that was built without a GPU is compared with PyTorch where it is first loaded, once for each kind of GPU;
the engine itself is a stand-in that runs the graph on ONNX Runtime.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mae_deploy.errors import CheckFailed, ConfigError
from mae_deploy.files import read_json
from mae_deploy.runtime import Backbone
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.engines.base import EngineOptions, Runner
from mae_deploy.runtime.engines.onnxruntime import OnnxRuntimeEngine
from mae_deploy.runtime.registry import engine_for, load_engine
from mae_deploy.runtime.tensorrt import open_plan, rtx
from mae_deploy.runtime.tensorrt.engine import TensorRtRtxEngine
from mae_deploy.runtime.verify import verify_bundle
from tests.runtime.tensorrt.planned_bundle import RTX, RTX4090, gpu, planned
from tests.runtime.tiny_bundle import write_bundle

RTX3090 = gpu("NVIDIA GeForce RTX 3090", (8, 6))


class OnGraph(TensorRtRtxEngine):
    """Runs the bundle's graph on ONNX Runtime, or another one that is wrong."""

    graph: Path
    on = RTX4090

    def _load(self, graph: Path, options: EngineOptions, precision: str, taps: tuple[str, ...]) -> None:
        self.session = OnnxRuntimeEngine(self.graph, EngineOptions(threads=1))
        self.plan, self.gpu, self.version = graph, self.on, "1.7.1.116"
        self.input_names, self.output_names = self.session.input_names, self.session.output_names

    def submit(self, inputs: Any, outputs: Any = None) -> Any:
        return Runner.submit(self, inputs, outputs)

    def _run(self, inputs: Any, outputs: Any) -> Any:
        return self.session.run(inputs, outputs)

    def _close(self) -> None:
        self.session.close()


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """On a machine with an RTX 4090, as far as the registry can tell."""
    found = planned(tmp_path / "bundle", entry={**RTX, "profiles": [{"B": [1, 4, 8], "K": [1, 4, 21]}]})
    monkeypatch.setattr(rtx, "load_rtx", lambda index: SimpleNamespace(version="1.7.1.116", gpu=OnGraph.on))
    monkeypatch.setattr(open_plan, "TensorRtRtxEngine", OnGraph)
    monkeypatch.setattr(OnGraph, "graph", found.graph(), raising=False)
    return found


def verified_on(bundle: Bundle) -> list[str]:
    """As the manifest on the disk says."""
    return list(read_json(bundle.path / "manifest.json")["engines"][0]["parity"])


@pytest.mark.parametrize("name", ["auto", "trt-rtx", "tensorrt-rtx"])
def test_the_first_use_verifies_and_records_it(bundle: Bundle, name: str) -> None:
    assert verified_on(bundle) == []
    with load_engine(bundle, name) as engine:
        assert engine.name == "tensorrt-rtx"
    assert verified_on(bundle) == [RTX4090.name]
    record = read_json(bundle.path / "manifest.json")["engines"][0]["parity"][RTX4090.name]
    assert record["passed"] is True
    assert record["driver"] == "13.0"
    assert [check["check"] for check in record["golden"]] == ["golden"] * len(bundle.output_names)


def test_once_for_each_kind_of_gpu(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    run = OnGraph._run

    def counted(engine: OnGraph, inputs: Any, outputs: Any) -> Any:
        runs.append(1)
        return run(engine, inputs, outputs)

    monkeypatch.setattr(OnGraph, "_run", counted)
    for on, checked in ((RTX4090, True), (RTX4090, False), (RTX3090, True), (RTX3090, False)):
        monkeypatch.setattr(OnGraph, "on", on)
        runs.clear()
        load_engine(bundle, "trt-rtx").close()
        assert bool(runs) is checked, on.name
    assert verified_on(bundle) == [RTX4090.name, RTX3090.name]


def test_one_that_is_wrong_is_closed_and_refused_also_by_auto(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OnGraph, "graph", Bundle.load(write_bundle(tmp_path / "other", bits=3)).graph())
    closed: list[int] = []
    monkeypatch.setattr(OnGraph, "_close", lambda self: closed.append(1))
    for load in (lambda: load_engine(bundle), lambda: Backbone.load(bundle.path, "trt-rtx")):
        with pytest.raises(CheckFailed, match=r"built without a GPU, and misses parity on this one: golden: cls"):
            load()
    assert closed == [1, 1]
    assert verified_on(bundle) == []
    assert not verify_bundle(bundle, "trt-rtx").passed
    assert verified_on(bundle) == []


def test_verify_records_it_too(bundle: Bundle) -> None:
    assert verify_bundle(bundle, "trt-rtx").passed
    assert verified_on(bundle) == [RTX4090.name]


def test_a_bundle_that_cannot_be_written_is_checked_each_time(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def read_only(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("mae_deploy.runtime.tensorrt.add_plan.locked", read_only)
    for _ in range(2):
        caplog.clear()
        load_engine(bundle, "trt-rtx").close()
        assert "will be again when it is loaded: cannot write to the bundle" in caplog.text
    assert verified_on(bundle) == []


def test_without_an_engine_it_is_said_how_to_build_one(bundle: Bundle, tmp_path: Path) -> None:
    bare = Bundle.load(write_bundle(tmp_path / "bare"))
    with pytest.raises(ConfigError, match="has no TensorRT for RTX engine") as caught:
        load_engine(bare, "trt-rtx")
    assert caught.value.hint is not None
    assert caught.value.hint.startswith(f"mae-deploy build-engine {bare.path} --engine trt-rtx")


def test_which_of_both_auto_means(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    options = EngineOptions()
    assert engine_for(bundle, "auto", options) == "tensorrt-rtx"
    bundle.manifest["engine"] = "tensorrt"
    for installed, engine in (("tensorrt", "tensorrt"), ("tensorrt_rtx_bindings", "tensorrt-rtx"), ("-", "tensorrt")):
        monkeypatch.setattr(
            "mae_deploy.runtime.registry.util.find_spec", lambda name, installed=installed: name == installed or None
        )
        assert engine_for(bundle, "auto", options) == engine
