"""TensorRT builds engines on this machine's GPU: real builds of small graphs, whichever version is installed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mae_deploy.errors import CheckFailed, ConfigError, MaeDeployError
from mae_deploy.runtime import Backbone
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.engines.base import EngineOptions
from mae_deploy.runtime.layers import trace_layers
from mae_deploy.runtime.onnx_file import (
    GRAPH_INPUT,
    GRAPH_NAME,
    GRAPH_NODE,
    GRAPH_OUTPUT,
    encode,
    encode_model,
    encode_node,
    encode_value,
    write_products,
)
from mae_deploy.runtime.registry import load_engine
from mae_deploy.runtime.tensorrt.add_engine import build_engine
from mae_deploy.runtime.tensorrt.api import Api, loads_library
from mae_deploy.runtime.tensorrt.build import BuiltPlan, build_plan
from mae_deploy.runtime.tensorrt.engine import TensorRtEngine
from mae_deploy.runtime.tensorrt.options import BuildOptions
from mae_deploy.runtime.tensorrt.plans import find_plan
from mae_deploy.runtime.verify import verify_bundle

pytestmark = pytest.mark.gpu

SIZE, LENGTH = 48, 3
QUICK = BuildOptions(optimization_level=1, timing_cache="off", workspace=256)


@pytest.fixture
def products(tmp_path: Path) -> Path:
    """A graph of matrix products, which needs no onnx package to be written."""
    write_products(tmp_path / "products.onnx", SIZE, LENGTH)
    return tmp_path / "products.onnx"


def weight() -> Any:
    return np.random.default_rng(0).standard_normal((SIZE, SIZE), np.float32) / np.float32(SIZE**0.5)


def build(graph: Path, options: BuildOptions = QUICK, **given: Any) -> BuiltPlan:
    settings = {"precision": "fp32", "typing": "weak", "profiles": [], "options": options, **given}
    return build_plan(graph, graph.with_suffix(".plan"), **settings)


def run(plan: BuiltPlan, **given: Any) -> dict[str, Any]:
    x = np.random.default_rng(1).standard_normal((SIZE, SIZE), np.float32)
    with TensorRtEngine(plan.file, EngineOptions(), **given) as engine:
        return {"x": x, **engine.run({"x": x})}


# --- plans -----------------------------------------------------------------------------------------------------------


def test_a_graph_is_built_and_computes_what_numpy_computes(api: Api, products: Path) -> None:
    seen: list[tuple[str, float]] = []
    plan = build(products, on_progress=lambda phase, share: seen.append((phase, share)))
    found = run(plan)
    np.testing.assert_allclose(
        found[f"y{LENGTH - 1}"], found["x"] @ weight() @ weight() @ weight(), atol=1e-5
    )  # without TF32, which has 1e-3
    assert plan.record["kernels"]["layers"] >= 1
    assert plan.layers is not None
    assert json.loads(plan.layers)["Layers"]
    shares = [share for _, share in seen]
    assert shares == sorted(shares)
    assert bool(seen) == (api.major >= 10), "TensorRT 8 has no progress monitor"


def test_inner_tensors_become_outputs(api: Api, products: Path) -> None:
    found = run(build(products, outputs_marked=["y0"]), taps=["y0"])
    np.testing.assert_allclose(found["y0"], found["x"] @ weight(), atol=1e-5)
    with pytest.raises(ConfigError, match="has no tensor 'nothing'"):
        build(products, outputs_marked=["nothing"])


def test_half_precision(api: Api, products: Path) -> None:
    if api.major >= 11:
        with pytest.raises(ConfigError, match="computes a weakly typed graph in FP32"):
            build(products, precision="fp16")
        return
    found = run(build(products, precision="fp16"))
    np.testing.assert_allclose(found[f"y{LENGTH - 1}"], found["x"] @ weight() @ weight() @ weight(), atol=0.05)


def test_what_the_parser_refuses_is_said_in_its_own_words(api: Api, tmp_path: Path) -> None:
    value = encode_value(b"x", 1, (2, 3))
    graph = encode(GRAPH_NODE, encode_node(b"NoSuchOperator", [b"x"], b"y")) + encode(GRAPH_NAME, b"unknown")
    (tmp_path / "unknown.onnx").write_bytes(
        encode_model(graph + encode(GRAPH_INPUT, value) + encode(GRAPH_OUTPUT, encode_value(b"y", 1, (2, 3))))
    )
    with pytest.raises(
        MaeDeployError, match=rf"TensorRT {re.escape(api.version)} cannot read .*unknown\.onnx: .*NoSuchOperator"
    ):
        build(tmp_path / "unknown.onnx")


def test_an_interruption_ends_the_build(api: Api, products: Path) -> None:
    if api.major < 10:
        pytest.skip("TensorRT 8 has no progress monitor")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(products, on_progress=interrupt)


def test_a_stripped_plan_takes_its_weights_from_the_graph(api: Api, products: Path) -> None:
    options = BuildOptions(optimization_level=1, timing_cache="off", strip=True)
    if api.major < 10:
        with pytest.raises(ConfigError, match=r"--strip: TensorRT .* has no STRIP_PLAN"):
            build(products, options)
        return
    found = run(build(products, options), weights=products)
    np.testing.assert_allclose(found[f"y{LENGTH - 1}"], found["x"] @ weight() @ weight() @ weight(), atol=1e-5)


@pytest.mark.parametrize("options", [{"refit": True}, {"version_compatible": True}, {"hardware_compatible": "ampere"}])
def test_other_kinds_of_plans(api: Api, products: Path, options: dict[str, Any]) -> None:
    if "hardware_compatible" in options and api.gpu.compute_capability < (8, 0):
        pytest.skip("this GPU is older than Ampere")
    if "version_compatible" in options and not loads_library(f"libnvinfer_lean.so.{api.major}"):
        pytest.skip("there is no libnvinfer_lean, which a version-compatible plan carries")
    plan = build(products, BuildOptions(optimization_level=1, timing_cache="off", **options))
    found = run(plan, host_code="version_compatible" in options)
    np.testing.assert_allclose(found[f"y{LENGTH - 1}"], found["x"] @ weight() @ weight() @ weight(), atol=1e-5)


@pytest.mark.parametrize("damage", ["empty", "truncated", "foreign"])
def test_damaged_content_is_an_error_and_no_crash(api: Api, products: Path, damage: str) -> None:
    content = build(products).file.read_bytes()
    with pytest.raises(MaeDeployError, match=rf"TensorRT {re.escape(api.version)} cannot load this engine: "):
        api.deserialize({"empty": b"", "truncated": content[: len(content) // 2], "foreign": b"text" * 100}[damage])


def test_builds_at_the_same_time_share_a_timing_cache(api: Api, products: Path, tmp_path: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nfrom mae_deploy.runtime.tensorrt.build import build_plan\nfrom"
        " mae_deploy.runtime.tensorrt.options import BuildOptions\ngraph, cache, plan = sys.argv[1:]\n"
        "options = BuildOptions(timing_cache=cache)\n"
        "build_plan(Path(graph), Path(plan), precision='fp32', typing='weak', profiles=[], options=options)\n"
    )
    command = [sys.executable, "-c", program, str(products), str(tmp_path / "cache")]
    processes = [
        subprocess.Popen([*command, str(tmp_path / f"{index}.plan")], stderr=subprocess.PIPE, text=True)
        for index in range(2)
    ]
    said = [process.communicate()[1][-500:] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    (timings,) = (path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock")
    assert timings.stat().st_size > 0
    first = timings.read_bytes()
    assert build(products, BuildOptions(timing_cache=str(tmp_path / "cache"))).file.stat().st_size
    assert len(timings.read_bytes()) >= len(first)


# --- engines of bundles ----------------------------------------------------------------------------------------------


@pytest.fixture
def bundle(api: Api, tmp_path: Path) -> Bundle:
    """A tiny bundle with K visible patches; writing it needs onnx."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from tests.runtime.tiny_bundle import write_bundle

    return Bundle.load(write_bundle(tmp_path / "bundle"))


def test_an_engine_is_proven_and_found_again(api: Api, bundle: Bundle) -> None:
    profiles = [{"B": (1, 1, 1), "K": (4, 4, 4)}, {"B": (2, 5, 9), "K": (1, 4, 21)}]
    built = build_engine(bundle, profiles=profiles, options=QUICK)
    fresh = Bundle.load(bundle.path)
    fresh.check_files()
    assert find_plan(fresh, api.version, api.gpu) == built.entry
    assert built.entry["parity"]["passed"] is True
    assert len(built.entry["parity"]["sizes"]) == 8, "four sizes, with CUDA graphs and without"
    assert built.entry["latency_ms"] is not None
    assert verify_bundle(fresh, "trt").passed
    assert verify_bundle(fresh).engine == "tensorrt", "auto takes it"
    report = trace_layers(fresh, "trt", outputs_pass=True)
    assert report.broken is None
    assert all(layer.comparison.sqnr_db > 80 for layer in report.layers)
    assert len(Bundle.load(bundle.path).manifest["engines"]) == 1


def test_any_number_of_images(api: Api, bundle: Bundle) -> None:
    build_engine(bundle, profiles=[{"B": (2, 3, 4)}], options=QUICK)
    golden = bundle.golden()
    with Backbone.load(bundle.path, "trt") as backbone, Backbone.load(bundle.path, "onnx") as reference:
        for count in (1, 3, 5):
            images, keep = golden["images"][:count], golden["ids_keep"][:count]
            np.testing.assert_allclose(backbone(images, keep).cls, reference(images, keep).cls, atol=1e-4)


def test_a_fixed_batch_in_another_precision(api: Api, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from tests.runtime.tiny_bundle import write_bundle

    if api.major >= 11:
        pytest.skip("TensorRT 11 builds a weakly typed graph in FP32 only")
    path = write_bundle(tmp_path / "b", token_mode="full", batch=2)
    built = build_engine(Bundle.load(path), precision="fp16", options=QUICK)
    assert built.entry["file"].endswith("-fp16.plan")
    assert built.entry["profiles"] == [{"B": [2, 2, 2]}]
    assert verify_bundle(Bundle.load(path), "trt").passed


def test_a_bundle_without_an_engine_gets_one_on_request(api: Api, bundle: Bundle) -> None:
    with pytest.raises(ConfigError, match="has no TensorRT engine"):
        Backbone.load(bundle.path, "trt")
    with Backbone.load(bundle.path, build=True) as backbone:
        assert backbone.engine.name == "tensorrt"
    assert len(Bundle.load(bundle.path).manifest["engines"]) == 1


def test_a_wrong_graph_is_not_kept(api: Api, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from tests.runtime.tiny_bundle import write_bundle

    path = write_bundle(tmp_path / "b", flaw="block_weight")
    with pytest.raises(CheckFailed, match="misses parity: golden: "):
        build_engine(Bundle.load(path), options=QUICK)
    assert Bundle.load(path).manifest["engines"] == []


def test_a_changed_plan_is_refused(api: Api, bundle: Bundle) -> None:
    entry = build_engine(bundle, options=QUICK).entry
    plan = bundle.path / entry["file"]
    plan.write_bytes(plan.read_bytes()[:-1])
    with pytest.raises(CheckFailed, match="is not the file that was exported"):
        load_engine(Bundle.load(bundle.path), "trt")
