"""TensorRT among the engines: what is loaded of which plan, and what happens where none can be; tests/gpu loads real
ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mae_deploy.errors import CheckFailed, ConfigError, MaeDeployError, MissingDependency
from mae_deploy.images.read import Array
from mae_deploy.runtime import Backbone
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.cuda.driver import Gpu
from mae_deploy.runtime.engines.base import Engine, EngineOptions
from mae_deploy.runtime.engines.onnxruntime import OnnxRuntimeEngine
from mae_deploy.runtime.layers import trace_layers
from mae_deploy.runtime.registry import load_engine
from mae_deploy.runtime.tensorrt import add_engine, open_plan, open_tapped
from mae_deploy.runtime.tensorrt import api as tensorrt_api
from mae_deploy.runtime.tensorrt.build import BuiltPlan
from mae_deploy.runtime.verify import verify_bundle
from tests.runtime.tensorrt.planned_bundle import PLAN, PLAN_FILE, planned
from tests.runtime.tiny_bundle import BLOCK_TENSORS, golden_inputs, write_bundle

ORIN = Gpu(index=0, name="Orin", compute_capability=(8, 7), memory_bytes=1 << 33, driver="12.6")


class Opened(Engine):
    """Stands for a TensorRT engine: it remembers how it was opened, and runs the bundle's graph on ONNX Runtime."""

    name, version, device = "tensorrt", "10.3.0", "cuda"
    graph: Path

    def __init__(
        self,
        plan: Path,
        options: EngineOptions,
        *,
        precision: str,
        taps: Sequence[str] = (),
        profiles: Sequence[Mapping[str, Sequence[int]]] = (),
        host_code: bool = False,
        weights: Path | None = None,
    ) -> None:
        self.content, self.host_code, self.weights = plan.read_bytes(), host_code, weights
        super().__init__(plan, options, precision=precision, taps=taps, profiles=profiles)

    def _load(self, graph: Path, options: EngineOptions, precision: str, taps: tuple[str, ...]) -> None:
        self.session = OnnxRuntimeEngine(self.graph, options, taps=taps)
        self.input_names, self.output_names = self.session.input_names, self.session.output_names
        self.batches: list[int] = []

    def _run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        self.batches.append(len(inputs["images"]))
        return self.session.run(inputs, outputs)

    def _close(self) -> None:
        self.session.close()


@pytest.fixture
def on_orin(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with TensorRT 10.3.0 on an Orin, as far as the registry can tell."""
    for module in (tensorrt_api, add_engine):
        monkeypatch.setattr(module, "load_tensorrt", lambda _: SimpleNamespace(version="10.3.0", gpu=ORIN))
    for module in (open_plan, open_tapped):
        monkeypatch.setattr(module, "TensorRtEngine", Opened)


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    found = planned(tmp_path / "bundle", entry={"profiles": [{"B": [2, 3, 4], "K": [4, 4, 4]}]})
    monkeypatch.setattr(Opened, "graph", found.graph(), raising=False)
    return found


@pytest.mark.parametrize("name", ["auto", "trt", "tensorrt"])
def test_a_plan_that_fits_is_loaded_after_its_hash_was_checked(bundle: Bundle, on_orin: None, name: str) -> None:
    with load_engine(bundle, name) as engine:
        assert isinstance(engine, Opened)
        assert (engine.content, engine.precision, engine.host_code, engine.weights) == (PLAN, "fp16", False, None)
        assert engine.profiles == [{"B": [2, 3, 4], "K": [4, 4, 4]}]


def test_a_call_takes_any_number_of_images(bundle: Bundle, on_orin: None) -> None:
    inputs = golden_inputs(visible=True)
    with Backbone.load(bundle.path) as backbone, OnnxRuntimeEngine(bundle.graph(), EngineOptions()) as reference:
        for count, batches in [(1, [2]), (3, [3]), (5, [4, 2])]:
            few = {name: array[:count] for name, array in inputs.items()}
            assert isinstance(backbone.engine, Opened)
            backbone.engine.batches.clear()
            found = backbone(few["images"], few["ids_keep"])
            assert backbone.engine.batches == batches
            assert found.cls == pytest.approx(reference.run(few)["cls"], abs=1e-6)


@pytest.mark.parametrize(("version_compatible", "stripped"), [(True, False), (False, True)])
def test_what_a_plan_lacks_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_orin: None, version_compatible: bool, stripped: bool
) -> None:
    found = planned(tmp_path / "b", entry={"version_compatible": version_compatible, "stripped": stripped})
    monkeypatch.setattr(Opened, "graph", found.graph(), raising=False)
    with load_engine(found, "trt") as engine:
        assert isinstance(engine, Opened)
        assert (engine.host_code, engine.weights) == (
            version_compatible,
            found.path / "encoder.onnx" if stripped else None,
        )


@pytest.mark.parametrize("name", ["auto", "trt"])
def test_a_changed_plan_is_refused_before_it_is_opened(bundle: Bundle, on_orin: None, name: str) -> None:
    (bundle.path / PLAN_FILE).write_bytes(PLAN[:-1])
    with pytest.raises(CheckFailed, match="is not the file that was exported"):
        load_engine(bundle, name)


# --- where none can be loaded ----------------------------------------------------------------------------------------


def test_no_gpu(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def missing(_: int) -> None:
        raise MissingDependency("there is no NVIDIA driver")

    monkeypatch.setattr(tensorrt_api, "load_tensorrt", missing)
    with pytest.raises(MissingDependency, match="there is no NVIDIA driver"):
        load_engine(bundle, "trt")
    with load_engine(bundle) as engine:
        assert engine.name == "onnxruntime"
    assert f"ONNX Runtime runs {bundle.path} instead of TensorRT: there is no NVIDIA driver" in caplog.text


def test_a_plan_for_another_gpu(tmp_path: Path, on_orin: None, caplog: pytest.LogCaptureFixture) -> None:
    found = planned(tmp_path / "b", entry={"tensorrt": "8.6.2"})
    with pytest.raises(
        ConfigError,
        match=r"no TensorRT engine that fits: engines/.*: it was built by TensorRT 8\.6\.2, and 10\.3\.0 is installed",
    ) as caught:
        load_engine(found, "trt")
    assert (
        caught.value.hint == f"mae-deploy build-engine {found.path}, or --engine onnxruntime, which runs every bundle"
    )
    with load_engine(found) as engine:
        assert engine.name == "onnxruntime"
    assert "it was built by TensorRT 8.6.2" in caplog.text


def test_a_bundle_that_was_made_for_tensorrt_without_an_engine_yet(
    tmp_path: Path, on_orin: None, caplog: pytest.LogCaptureFixture
) -> None:
    found = Bundle.load(write_bundle(tmp_path / "b", change=lambda manifest: manifest.update(engine="tensorrt")))
    with load_engine(found) as engine:
        assert engine.name == "onnxruntime"
    assert "has no TensorRT engine" in caplog.text


def test_nothing_is_said_where_nobody_spoke_of_tensorrt(
    full_bundle: Path, on_orin: None, caplog: pytest.LogCaptureFixture
) -> None:
    with load_engine(Bundle.load(full_bundle)) as engine:
        assert engine.name == "onnxruntime"
    assert caplog.text == ""


@pytest.mark.parametrize("name", ["auto", "trt"])
def test_one_is_built_on_request(
    bundle: Bundle, tmp_path: Path, on_orin: None, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    bare = write_bundle(tmp_path / "bare")
    built: list[Path] = []

    def build(without: Bundle, *, device: str, rtx: bool) -> Any:
        assert not rtx
        built.append(without.path)
        without.manifest = bundle.manifest
        (without.path / "engines").mkdir()
        (without.path / PLAN_FILE).write_bytes(PLAN)
        return SimpleNamespace(entry=bundle.manifest["engines"][0])

    monkeypatch.setattr(add_engine, "build_engine", build)
    with Backbone.load(bare, name, build=True) as backbone:
        assert backbone.engine.name == "tensorrt"
    assert built == [bare]
    with Backbone.load(bundle.path, name, build=True) as backbone:
        assert backbone.engine.name == "tensorrt"
    assert built == [bare], "one that fits was there"


def test_a_build_that_fails_leaves_onnx_runtime(
    full_bundle: Path, on_orin: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def build(_: Bundle, *, device: str, rtx: bool) -> Any:
        raise MaeDeployError("TensorRT 10.3.0 cannot build an engine: no memory")

    monkeypatch.setattr(add_engine, "build_engine", build)
    with Backbone.load(full_bundle, build=True) as backbone:
        assert backbone.engine.name == "onnxruntime"
    assert "no memory" in caplog.text
    with pytest.raises(MaeDeployError, match="no memory"):
        Backbone.load(full_bundle, "trt", build=True)


# --- verification ----------------------------------------------------------------------------------------------------


def test_verify_judges_by_the_precision_of_the_engine(
    tmp_path: Path, on_orin: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = planned(tmp_path / "b", bits=14)
    monkeypatch.setattr(Opened, "graph", found.graph(), raising=False)
    verification = verify_bundle(found, "trt")
    assert (verification.engine, verification.device, verification.tolerance.sqnr_db) == ("tensorrt", "cuda", 40)
    assert verification.outputs_pass
    assert not verify_bundle(found, "onnx").outputs_pass, "in FP32 these weights are too coarse"


def test_what_the_engine_does_not_take_is_not_checked(
    tmp_path: Path, on_orin: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = planned(tmp_path / "b", token_mode="ragged", entry={"profiles": [{"B": [1, 5, 5], "K": [8, 8, 8]}]})
    monkeypatch.setattr(Opened, "graph", found.graph(), raising=False)
    names = {check.name for check in verify_bundle(found, "trt").checks}
    assert {"golden", "other padding"} <= names
    assert not {"longer padding", "sample alone"} & names, "K would be 11, or as few as a sample has"


def test_layers_are_those_of_an_engine_that_is_built_for_them(
    bundle: Bundle, on_orin: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def build_plan(graph: Path, file: Path, **given: Any) -> BuiltPlan:
        asked.update(given, graph=graph)
        file.write_bytes(b"tapped")
        return BuiltPlan(file=file, layers=None, record={})

    monkeypatch.setattr(open_tapped, "build_plan", build_plan)
    bundle.manifest["engines"][0]["build"] = {"options": {"optimization_level": 2}}
    report = trace_layers(bundle, "trt", outputs_pass=True)
    assert [layer.block for layer in report.layers] == [0, 1]
    assert all(layer.comparison.sqnr_db > 80 for layer in report.layers)
    assert (asked["graph"], asked["precision"], asked["typing"], asked["outputs_marked"]) == (
        bundle.path / "encoder.onnx",
        "fp16",
        "weak",
        tuple(BLOCK_TENSORS),
    )
    assert (asked["profiles"], asked["options"].optimization_level) == ([{"B": (2, 3, 4), "K": (4, 4, 4)}], 2)
    assert asked["index"] == 0
    assert [entry["file"] for entry in bundle.manifest["engines"]] == [PLAN_FILE], "it is not kept"
