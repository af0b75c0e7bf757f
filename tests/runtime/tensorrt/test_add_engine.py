"""What an engine is built from and for, and when INT8 is kept; building itself needs a GPU (tests/gpu)."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mae_deploy.errors import CheckFailed, ConfigError, MissingDependency
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.cuda.driver import Gpu
from mae_deploy.runtime.engines.base import EngineOptions
from mae_deploy.runtime.manifest import file_entry
from mae_deploy.runtime.parity.checks import Check
from mae_deploy.runtime.parity.compare import Comparison
from mae_deploy.runtime.tensorrt import add_engine as engine_build
from mae_deploy.runtime.tensorrt import api as tensorrt_api
from mae_deploy.runtime.tensorrt import engine as tensorrt_engine
from mae_deploy.runtime.tensorrt.add_engine import (
    Built,
    build_engine,
    build_missing_engine,
    compare_speed,
    reason_against_quantized,
    resolve_profiles,
)
from mae_deploy.runtime.tensorrt.engine import TensorRtEngine
from mae_deploy.runtime.tensorrt.plans import graph_for, is_verified
from mae_deploy.runtime.tensorrt.rtx import target
from mae_deploy.runtime.timing import Timing
from tests.runtime.cuda.stub_driver import StubMemory
from tests.runtime.tensorrt.fake_tensorrt import make_tensorrt, plan
from tests.runtime.tensorrt.on_graph import built_on, open_engines, opened_on, timings
from tests.runtime.tensorrt.planned_bundle import RTX4090
from tests.runtime.tiny_bundle import K, N, write_bundle

MANIFEST = "manifest.json"


def quantized(path: Path, *, policy: str = "static", baseline: bool = True, precision: str = "int8") -> Bundle:
    """A bundle that says of itself that it is INT8, with its own graph as the FP16 one."""

    def change(manifest: dict[str, Any]) -> None:
        manifest["quantization"] = {"policy": policy}
        if baseline:
            (path / "baseline.onnx").write_bytes((path / "encoder.onnx").read_bytes())
            manifest["quantization"]["baseline"] = "baseline.onnx"
            manifest["files"]["baseline.onnx"] = file_entry(path / "baseline.onnx")

    return Bundle.load(write_bundle(path, precision=precision, change=change))


def typed(path: Path, precision: str, typing: str) -> Bundle:
    return Bundle.load(write_bundle(path, precision=precision, change=lambda manifest: manifest.update(typing=typing)))


# --- from what -------------------------------------------------------------------------------------------------------


def test_a_weak_fp32_graph_is_built_in_what_is_asked_for(tmp_path: Path) -> None:
    bundle = typed(tmp_path / "b", "fp32", "weak")
    assert {graph_for(bundle, precision) for precision in ("fp32", "fp16", "bf16")} == {"encoder.onnx"}
    with pytest.raises(ConfigError, match=r"the weakly typed fp32 graph of .* cannot be built in int8") as caught:
        graph_for(bundle, "int8")
    assert caught.value.hint == "export with --engine trt --precision int8"


@pytest.mark.parametrize(
    ("own", "typing", "other"),
    [("fp16", "strong", "fp32"), ("fp32", "strong", "fp16"), ("fp16", "weak", "fp32"), ("bf16", "weak", "fp16")],
)
def test_any_other_graph_only_in_what_it_is(tmp_path: Path, own: str, typing: str, other: str) -> None:
    bundle = typed(tmp_path / "b", own, typing)
    assert graph_for(bundle, own) == "encoder.onnx"
    with pytest.raises(ConfigError, match=f"the {typing}ly typed {own} graph .* cannot be built in {other}"):
        graph_for(bundle, other)


def test_int8_has_an_fp16_graph_beside_it(tmp_path: Path) -> None:
    bundle = quantized(tmp_path / "b")
    assert (graph_for(bundle, "int8"), graph_for(bundle, "fp16")) == ("encoder.onnx", "baseline.onnx")
    with pytest.raises(ConfigError, match="cannot be built in fp32"):
        graph_for(bundle, "fp32")
    with pytest.raises(ConfigError, match="has no FP16 graph to compare int8 with"):
        graph_for(quantized(tmp_path / "without", baseline=False), "int8")
    with pytest.raises(ConfigError, match="has dynamic INT8, which TensorRT does not read"):
        graph_for(quantized(tmp_path / "dynamic", policy="dynamic"), "int8")


# --- for which sizes -------------------------------------------------------------------------------------------------


def test_what_no_profile_gives_is_what_the_graph_was_checked_for(visible_bundle: Path, full_bundle: Path) -> None:
    bundle = Bundle.load(visible_bundle)
    checked = {"B": (1, 8, 32), "K": (1, K, N)}
    assert resolve_profiles(bundle, []) == [checked]
    assert resolve_profiles(bundle, [{"B": (2, 2, 2)}, {"K": (3, 3, 5)}]) == [
        {"B": (2, 2, 2), "K": (1, K, N)},
        {"B": (1, 8, 32), "K": (3, 3, 5)},
    ]
    assert resolve_profiles(Bundle.load(full_bundle), []) == [{"B": (1, 8, 32)}]


def test_without_any_those_of_the_export(tmp_path: Path) -> None:
    def exported(manifest: dict[str, Any]) -> None:
        manifest["provenance"]["export"] = {"profile": "B:1,1,1 K:4,4,4; B:8,16,32"}

    bundle = Bundle.load(write_bundle(tmp_path / "b", change=exported))
    assert resolve_profiles(bundle, []) == [{"B": (1, 1, 1), "K": (4, 4, 4)}, {"B": (8, 16, 32), "K": (1, K, N)}]
    assert resolve_profiles(bundle, [{"B": (2, 2, 2)}]) == [{"B": (2, 2, 2), "K": (1, K, N)}]


@pytest.mark.parametrize(
    ("settings", "profile", "said"),
    [
        ({"token_mode": "full"}, {"K": (1, 2, 3)}, "--profile K:1,2,3: a graph of all patches has no K"),
        ({"batch": 2}, {"B": (1, 2, 3)}, "--profile B:1,2,3: the graph is fixed to B = 2"),
        ({"keep": 4}, {"K": (4, 4, 5)}, "--profile K:4,4,5: the graph is fixed to K = 4"),
        ({"profile_keep": (2, 4, 6)}, {"K": (1, 4, 6)}, "--profile K:1,4,6: the graph was checked for K from 2 to 6"),
        ({"profile_keep": (2, 4, 6)}, {"K": (2, 4, 7)}, "the graph was checked for K from 2 to 6"),
        ({}, {"K": (5, 6, 7)}, "no --profile holds K = 4, with which the golden samples check the engine"),
    ],
)
def test_sizes_that_cannot_be_had(tmp_path: Path, settings: dict[str, Any], profile: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve_profiles(Bundle.load(write_bundle(tmp_path / "b", **settings)), [profile])


def test_fixed_sizes_may_be_named(tmp_path: Path) -> None:
    assert resolve_profiles(Bundle.load(write_bundle(tmp_path / "b", batch=2)), [{"B": (2, 2, 2)}]) == [
        {"B": (2, 2, 2), "K": (1, K, N)}
    ]


# --- which is kept ---------------------------------------------------------------------------------------------------


def test_the_profile_where_int8_does_worst_decides() -> None:
    speed = compare_speed(timings(1.0, 9.0), timings(2.0, 8.0), "int8")
    assert speed == {
        "latency_ratio": 1.125,
        "latency_ratio_interval": [1.125, 1.125],
        "profile": 1,
        "latency_ms": {"int8": [1.0, 9.0], "fp16": [2.0, 8.0]},
    }
    assert (
        reason_against_quantized("int8", [], speed)
        == "INT8 is rejected: it is not faster; it takes 1.12 of FP16's latency, 9.000 against 8.000 ms (1.12 to 1.12"
        " with 95% confidence)"
    )


@pytest.mark.parametrize(
    ("milliseconds", "failures", "most", "said"),
    [
        (0.99, [], 1.0, None),
        (1.0, [], 1.0, "it is not faster"),
        (0.9, [], 0.8, "it is not fast enough"),
        (
            0.5,
            ["golden: cls: sqnr_db 3 is below 30"],
            1.0,
            r"it misses its budget \(golden: cls: sqnr_db 3 is below 30\); it takes 0.50 of",
        ),
    ],
)
def test_faster_and_right_or_rejected(milliseconds: float, failures: list[str], most: float, said: str | None) -> None:
    found = reason_against_quantized("fp8", failures, compare_speed(timings(milliseconds), timings(1.0), "fp8"), most)
    assert (found is None) if said is None else (found is not None and said.replace("\\", "") in found)


def test_a_ratio_below_one_is_not_enough_if_its_interval_is_not() -> None:
    noisy = np.random.default_rng(0).lognormal(0, 0.4, 15)
    mine, other = Timing(tuple(0.9 * noisy)), Timing(tuple(np.roll(noisy, 1)))
    found = reason_against_quantized("int8", [], compare_speed([mine], [other], "int8"))
    assert found is not None
    assert found.startswith("INT8 is rejected: it is not shown to be fast enough; it takes 0.90 of FP16's latency")


def test_engines_are_timed_by_the_gpus_clock_without_their_copies(
    stub_driver: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of 50 ms from the host would make 1 ms and 2 ms alike."""
    monkeypatch.setattr(tensorrt_api, "_loaded", {})
    monkeypatch.setitem(sys.modules, "tensorrt", make_tensorrt(stub_driver))
    monkeypatch.setattr(tensorrt_engine, "open_memory", lambda *_: StubMemory(stub_driver))
    monkeypatch.setattr(
        engine_build,
        "inputs_at",
        lambda *_: {"images": np.ones((2, 3, 2, 5), np.float32), "ids_keep": np.ones((2, 3), np.int64)},
    )
    stub_driver.stub_copies_take(50_000)
    with ExitStack() as stack:
        candidates = []
        for precision, microseconds in (("int8", 1000), ("fp16", 2000)):
            path = tmp_path / f"{precision}.plan"
            path.write_bytes(plan(microseconds=microseconds))
            engine = stack.enter_context(TensorRtEngine(path, EngineOptions(), precision=precision))
            candidates.append(SimpleNamespace(precision=precision, engine=engine))
        bundle: Any = SimpleNamespace(golden=dict)
        found = engine_build._time(bundle, candidates, [{"B": (1, 2, 4), "K": (1, 3, 7)}])  # type: ignore[arg-type]
    assert compare_speed(found["int8"], found["fp16"], "int8")["latency_ratio"] == pytest.approx(0.5)
    assert found["int8"][0].median == pytest.approx(0.001)


def build(bundle: Bundle, **settings: Any) -> tuple[Built, list[tuple[str, float]]]:
    seen: list[tuple[str, float]] = []
    return build_engine(
        bundle, profiles=[{"B": (1, 2, 3)}], on_progress=lambda phase, share: seen.append((phase, share)), **settings
    ), seen


def test_an_engine_that_passes_is_in_the_bundle(visible_bundle: Path, without_a_gpu: Any) -> None:
    built, seen = build(Bundle.load(visible_bundle))
    (entry,) = Bundle.load(visible_bundle).manifest["engines"]
    assert entry == built.entry
    assert (entry["precision"], entry["latency_ms"], entry["profiles"]) == (
        "fp32",
        4.0,
        [{"B": [1, 2, 3], "K": [1, K, N]}],
    )
    assert (entry["build"]["graph"], entry["build"]["against_fp16"], entry["build"]["rejected"]) == (
        "encoder.onnx",
        None,
        None,
    )
    assert entry["parity"]["passed"] is True
    assert seen == [("fp32: tactics", 0.8), ("fp32: parity", 0.8)]


@pytest.mark.parametrize(("device", "index"), [("auto", 0), ("cuda", 0), ("cuda:1", 1)])
def test_the_gpu_that_it_is_built_on(visible_bundle: Path, without_a_gpu: Any, device: str, index: int) -> None:
    built_on.clear()
    opened_on.clear()
    build_missing_engine(Bundle.load(visible_bundle), device)
    assert (built_on, opened_on) == ([index], [device, device])
    build_missing_engine(Bundle.load(visible_bundle), device)
    assert len(built_on) == 1, "there is one"


def test_int8_that_is_faster(tmp_path: Path, without_a_gpu: Any) -> None:
    built, seen = build(quantized(tmp_path / "b"))
    assert (built.entry["precision"], built.rejected) == ("int8", None)
    assert built.baseline == {
        "latency_ratio": 0.5,
        "latency_ratio_interval": [0.5, 0.5],
        "profile": 0,
        "latency_ms": {"int8": [1.0], "fp16": [2.0]},
    }
    assert [phase for phase, _ in seen] == ["int8: tactics", "fp16: tactics", "int8: parity", "fp16: parity"]
    assert [share for _, share in seen] == pytest.approx([0.4, 0.8, 0.8, 0.9])
    assert open_engines == []


def test_int8_that_is_slower_is_refused_or_fp16_is_kept(tmp_path: Path, without_a_gpu: dict[str, list[Timing]]) -> None:
    without_a_gpu["int8"] = timings(3.0)
    bundle = quantized(tmp_path / "b")
    with pytest.raises(
        CheckFailed,
        match=r"INT8 is rejected: it is not faster; it takes 1\.50 of FP16's latency, 3\.000 against 2\.000 ms",
    ) as caught:
        build(bundle)
    assert caught.value.hint == "--prefer fp16 keeps FP16 in its place"
    assert Bundle.load(bundle.path).manifest["engines"] == []
    built, _ = build(bundle, prefer="fp16")
    assert (built.entry["precision"], built.entry["latency_ms"], built.entry["build"]["graph"]) == (
        "fp16",
        2.0,
        "baseline.onnx",
    )
    assert built.rejected is not None
    assert built.entry["build"]["rejected"] == built.rejected


def test_an_engine_that_is_wrong_is_not_kept(
    visible_bundle: Path, without_a_gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*_: Any) -> Sequence[Check]:
        return [Check("profile 0 max, B=3", Comparison(name="cls"), ("cls: cosine 0.3 is below 0.99999",))]

    monkeypatch.setattr(engine_build, "check_plan", wrong)
    bundle = Bundle.load(visible_bundle)
    with pytest.raises(
        CheckFailed, match=r"the TensorRT 10\.3\.0 engine in fp32 misses parity: profile 0 max, B=3: cls: cosine 0\.3"
    ):
        build(bundle)
    assert Bundle.load(visible_bundle).manifest["engines"] == []


# --- TensorRT for RTX ------------------------------------------------------------------------------------------------


@pytest.fixture
def rtx_builder(monkeypatch: pytest.MonkeyPatch, without_a_gpu: Any) -> None:
    api = type("Api", (), {"version": "1.7.1.116", "title": "TensorRT for RTX 1.7.1.116", "gpu": target("fp32")})
    monkeypatch.setattr(engine_build, "load_builder", lambda: api)


def no_gpu(index: int) -> Gpu:
    raise MissingDependency("there is no NVIDIA driver here")


@pytest.mark.usefixtures("rtx_builder")
@pytest.mark.parametrize(("precision", "capability"), [("fp32", [8, 0]), ("fp8", [8, 9])])
def test_without_a_gpu_an_engine_is_added_unverified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, capability: list[int]
) -> None:
    monkeypatch.setattr(engine_build, "find_gpu", no_gpu)
    bundle = (
        quantized(tmp_path / "b", precision="fp8") if precision == "fp8" else Bundle.load(write_bundle(tmp_path / "b"))
    )
    built, seen = build(bundle, rtx=True)
    (entry,) = Bundle.load(bundle.path).manifest["engines"]
    assert entry == built.entry
    assert (entry["file"], entry["gpu"]) == (f"engines/1.7.1.116-rtx-{precision}.plan", "RTX")
    assert (entry["compute_capability"], entry["parity"], entry["latency_ms"]) == (capability, {}, None)
    assert (built.checks, built.baseline, is_verified(entry)) == ((), None, False)
    assert [phase for phase, _ in seen] == [f"{precision}: tactics"], "FP16 is not built where nothing is timed"


@pytest.mark.usefixtures("rtx_builder")
def test_a_gpu_that_runs_it_checks_it_at_once(visible_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_build, "find_gpu", lambda index: RTX4090)
    monkeypatch.setattr(engine_build, "open_memory", lambda index: nullcontext())
    built, _ = build(Bundle.load(visible_bundle), rtx=True)
    assert list(built.entry["parity"]) == [RTX4090.name]
    assert (built.entry["gpu"], built.entry["latency_ms"]) == ("RTX", 4.0)
    assert is_verified(built.entry, RTX4090)
    assert not is_verified(built.entry, replace(RTX4090, name="another"))
    monkeypatch.setattr(engine_build, "check_plan", lambda *_: [Check("golden", Comparison(name="cls"), ("wrong",))])
    with pytest.raises(CheckFailed, match=r"the TensorRT for RTX 1\.7\.1\.116 engine in fp32 misses parity"):
        build(Bundle.load(visible_bundle), rtx=True)
