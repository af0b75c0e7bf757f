"""OpenVINO computes what ONNX Runtime computes, returns arrays that stay valid, and refuses in one line what it cannot
do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mae_deploy.errors import CheckFailed, ConfigError, MaeDeployError
from mae_deploy.export.graph.builder import GraphBuilder
from mae_deploy.runtime import Bundle
from mae_deploy.runtime.engines.base import Engine, EngineOptions
from mae_deploy.runtime.registry import load_engine, open_graph
from tests.runtime.tiny_bundle import OUTPUTS, SAMPLES, D, K, N, golden_inputs, reference, rehash, write_bundle

openvino = pytest.importorskip("openvino")

TOLERANCE = 1e-4
"""FP32 sums in another order, of values near 1."""


def load(path: Path, **options: Any) -> Engine:
    return load_engine(Bundle.load(path), "openvino", EngineOptions(**{"threads": 1, **options}))


def settings_of(engine: Any) -> Callable[[str], Any]:
    """What OpenVINO says that it uses."""
    get_property: Callable[[str], Any] = engine._request.compiled.get_property
    return get_property


# --- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bundle", "inputs"),
    [
        ({}, {"visible": True}),
        ({"batch": SAMPLES, "keep": K}, {"visible": True}),
        ({"token_mode": "full"}, {"visible": False}),
        ({"token_mode": "ragged"}, {"visible": True, "ragged": True, "keep": 2 * K}),
        ({"external": "encoder.onnx.data"}, {"visible": True}),
        ({"images": "uint8"}, {"visible": True, "images": "uint8"}),
        ({"images": "float16", "features": "float16"}, {"visible": True, "images": "float16"}),
    ],
    ids=["dynamic", "fixed", "full", "ragged", "external data", "uint8", "float16"],
)
def test_the_same_as_onnxruntime(tmp_path: Path, bundle: dict[str, Any], inputs: dict[str, Any]) -> None:
    path = write_bundle(tmp_path / "b", **bundle)
    samples = golden_inputs(**inputs)
    with load(path) as engine:
        found = engine.run(samples)
    assert list(found) == list(OUTPUTS)
    tolerance = 5e-3 if bundle.get("features") == "float16" else TOLERANCE  # float16 has eleven bits
    for name, expected in reference(**samples).items():
        assert found[name].dtype == bundle.get("features", "float32")
        np.testing.assert_allclose(found[name], expected, atol=tolerance)
    if "external" not in bundle:  # ONNX Runtime cannot infer shapes from constants that are outside of the graph
        with load_engine(Bundle.load(path), "onnxruntime", EngineOptions(threads=1)) as other:
            for name, expected in other.run(samples).items():
                np.testing.assert_allclose(found[name], expected, atol=tolerance)


def test_any_batch_and_length(visible_bundle: Path) -> None:
    samples = golden_inputs(visible=True, keep=N)
    with load(visible_bundle) as engine:
        for batch, keep in ((1, N), (SAMPLES, 1), (2, 3), (1, N)):
            inputs = {
                "images": samples["images"][:batch],
                "ids_keep": np.ascontiguousarray(samples["ids_keep"][:batch, :keep]),
            }
            tokens = engine.run(inputs)["tokens"]
            assert tokens.shape == (batch, keep, D)
            np.testing.assert_allclose(tokens, reference(**inputs)["tokens"], atol=TOLERANCE)


def test_results_stay_as_they_are(visible_bundle: Path) -> None:
    samples = golden_inputs(visible=True)
    with load(visible_bundle) as engine:
        first = engine.run(samples)
        kept = {name: array.copy() for name, array in first.items()}
        engine.run({**samples, "images": samples["images"] + 1})
    for name, array in first.items():
        np.testing.assert_array_equal(array, kept[name])
        assert array.flags.owndata


def test_inputs_of_any_layout(visible_bundle: Path) -> None:
    samples = golden_inputs(visible=True)
    ids = samples["ids_keep"][:1].repeat(SAMPLES, axis=0)
    frozen = np.asfortranarray(samples["images"])
    frozen.flags.writeable = False
    with load(visible_bundle) as engine:
        found = engine.run({"ids_keep": np.broadcast_to(ids[0], ids.shape), "images": frozen})
    np.testing.assert_allclose(found["cls"], reference(samples["images"], ids)["cls"], atol=TOLERANCE)


def test_outputs_are_the_named_ones_in_order(visible_bundle: Path) -> None:
    with load(visible_bundle) as engine:
        assert list(engine.run(golden_inputs(visible=True), ["pooled", "cls"])) == ["pooled", "cls"]


def test_names_are_the_graph_s_own(tmp_path: Path) -> None:
    """OpenVINO gives a tensor the names of all Identity nodes around it."""
    graph = GraphBuilder("aliases")
    x = graph.node("Identity", [graph.input("x", np.float32, ["B", 3])], "x_again")
    y = graph.node("Neg", [x], "y_inner")
    graph.output("second", y, ["B", 3])
    graph.output("first", y, ["B", 3])
    graph.save(tmp_path / "aliases.onnx")
    with open_graph(tmp_path / "aliases.onnx", "ov") as engine:
        assert (engine.input_names, engine.output_names) == (("x",), ("second", "first"))
        found = engine.run({"x": np.ones((2, 3), np.float32)})
    for array in found.values():
        np.testing.assert_array_equal(array, -np.ones((2, 3), np.float32))


def test_threads_take_turns(visible_bundle: Path) -> None:
    samples = golden_inputs(visible=True)
    with load(visible_bundle) as engine, ThreadPoolExecutor(4) as pool:
        calls = [
            {name: array[index % SAMPLES : index % SAMPLES + 1] for name, array in samples.items()}
            for index in range(40)
        ]
        for inputs, found in zip(calls, pool.map(engine.run, calls), strict=True):
            np.testing.assert_allclose(found["tokens"], reference(**inputs)["tokens"], atol=TOLERANCE)


# --- a graph for each shape ------------------------------------------------------------------------------------------


def test_shapes_get_a_compiled_graph_of_their_own(tmp_path: Path) -> None:
    samples = golden_inputs(visible=True)
    few = {name: array[:2] for name, array in samples.items()}
    with load(write_bundle(tmp_path / "b")) as engine:
        requests: dict[Any, Any] = engine._requests  # type: ignore[attr-defined]
        found = [engine.run(inputs) for inputs in (few, samples, few, samples)]
        assert list(requests) == [tuple(inputs[name].shape for name in engine.input_names) for inputs in (few, samples)]
        assert not any(put.partial_shape.is_dynamic for request in requests.values() for put in request.compiled.inputs)
    for outputs, again, inputs in ((found[0], found[2], few), (found[1], found[3], samples)):
        for name, expected in reference(**inputs).items():
            np.testing.assert_allclose(outputs[name], expected, atol=TOLERANCE)
            np.testing.assert_array_equal(again[name], outputs[name])


def test_a_graph_for_one_shape_that_computes_something_else_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mae_deploy.runtime.engines.openvino._NOISE", -1.0)
    samples = golden_inputs(visible=True)
    with load(write_bundle(tmp_path / "b")) as engine:
        engine.run(samples)
        assert list(engine._requests.values()) == [engine._request]  # type: ignore[attr-defined]


def test_the_first_four_shapes_of_a_small_graph_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = golden_inputs(visible=True, keep=6)
    path = write_bundle(tmp_path / "b", external="encoder.onnx.data")
    size = sum((path / name).stat().st_size for name in ("encoder.onnx", "encoder.onnx.data"))
    for limit, expected in ((size - 1, 0), (size, 4)):
        monkeypatch.setattr("mae_deploy.runtime.engines.openvino._SPECIAL_BYTES", limit)
        with load(path) as engine:
            for keep in (1, 2, 3, 4, 5, 6):
                inputs = {**samples, "ids_keep": samples["ids_keep"][:, :keep]}
                assert [engine.run(inputs)["tokens"].shape for _ in range(2)] == [(SAMPLES, keep, D)] * 2
            assert len(engine._requests) == expected  # type: ignore[attr-defined]


# --- settings --------------------------------------------------------------------------------------------------------


def test_what_it_is(full_bundle: Path) -> None:
    with load(full_bundle, device="auto") as engine:
        assert (engine.name, engine.device) == ("openvino", "cpu")
        assert openvino.__version__.startswith(engine.version)
        assert engine.version.replace(".", "").isdigit()


OPENVINO: dict[str, Any] = {"engine": "openvino"}


@pytest.mark.parametrize(
    ("manifest", "bf16"),
    [
        ({"precision": "fp32"}, False),
        ({"precision": "fp16"}, False),
        ({"precision": "bf16", **OPENVINO}, True),
        ({"precision": "bf16", "typing": "strong", **OPENVINO}, False),  # the graph's own types say where it is BF16
        ({"precision": "bf16"}, False),  # proven on ONNX Runtime, which computed in FP32
        ({"precision": "int8", "quantization": {"rest": "bf16"}, **OPENVINO}, True),
        ({"precision": "int8", "quantization": {"rest": "fp32"}, **OPENVINO}, False),
    ],
)
def test_settings(tmp_path: Path, manifest: dict[str, Any], bf16: bool) -> None:
    capable = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    with load(
        write_bundle(tmp_path / "b", precision=manifest["precision"], change=lambda found: found.update(manifest))
    ) as engine:
        setting = settings_of(engine)
        assert setting("INFERENCE_PRECISION_HINT").to_string() == ("bf16" if bf16 and capable else "f32")
        assert setting("INFERENCE_NUM_THREADS") == 1
        assert str(setting("PERFORMANCE_HINT")).endswith("LATENCY")
        assert setting("ENABLE_CPU_PINNING") is False, (
            "pinned to the first core, as every other process with one thread"
        )


def test_a_cpu_without_bf16_computes_in_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Core(openvino.Core):  # type: ignore[misc, name-defined]
        def get_property(self, device: str, name: str) -> Any:
            return ["FP32", "INT8"] if name == "OPTIMIZATION_CAPABILITIES" else super().get_property(device, name)

    monkeypatch.setattr(openvino, "Core", Core)
    with load(write_bundle(tmp_path / "b", precision="bf16")) as engine:
        assert settings_of(engine)("INFERENCE_PRECISION_HINT").to_string() == "f32"


# --- affinity --------------------------------------------------------------------------------------------------------

BINDING = """
import json, os, sys, threading
import numpy as np
from pathlib import Path
from mae_deploy.errors import ConfigError
from mae_deploy.runtime.engines.base import EngineOptions
from mae_deploy.runtime.registry import open_graph

graph, core = Path(sys.argv[1]), int(sys.argv[2])
before = os.sched_getaffinity(0)
engine = open_graph(graph, "openvino", EngineOptions(affinity=(core,)))
seen, done, main = set(), threading.Event(), threading.get_native_id()

def watch():
    while not done.is_set():
        seen.add(tuple(sorted(os.sched_getaffinity(main))))

watcher = threading.Thread(target=watch)
watcher.start()
for _ in range(30):
    engine.run({"x": np.ones((256, 1024), np.float32)})
done.set()
watcher.join()
assert os.sched_getaffinity(0) == before
open_graph(graph, "openvino", EngineOptions(affinity=(core,), threads=1))
open_graph(graph, "openvino")
refused = []
for other in before - {core}:
    try:
        open_graph(graph, "openvino", EngineOptions(affinity=(other,)))
    except ConfigError as error:
        refused.append(str(error))
threads = engine._request.compiled.get_property("INFERENCE_NUM_THREADS")
print(json.dumps({"seen": sorted(seen), "threads": threads, "refused": refused}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux binds threads to cores")
def test_affinity(tmp_path: Path) -> None:
    """In a process of its own: the first engine's cores hold for all that follow."""
    graph = GraphBuilder("product")
    x = graph.input("x", np.float32, ["B", 1024])
    graph.output(
        "y", graph.node("MatMul", [x, graph.weight("w", np.eye(1024, dtype=np.float32))], "product"), ["B", 1024]
    )
    graph.save(tmp_path / "product.onnx")
    usable = sorted(os.sched_getaffinity(0))
    core = usable[-1]
    command = [sys.executable, "-c", BINDING, str(tmp_path / "product.onnx"), str(core)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [core] in found["seen"], "bound while it runs"
    assert all(cores in ([core], usable) for cores in found["seen"])
    assert found["threads"] == 1
    assert len(found["refused"]) == len(usable) - 1
    assert all(
        f"computes on the cores {core} since its first engine was loaded" in refused for refused in found["refused"]
    )


def test_an_affinity_after_engines_without_one(full_bundle: Path) -> None:
    with (
        load(full_bundle),
        pytest.raises(ConfigError, match="computes on any core since its first engine was loaded") as caught,
    ):
        load(full_bundle, affinity=(min(os.sched_getaffinity(0)),) if sys.platform == "linux" else (0,))
    assert "process of its own" in (caught.value.hint or "")


# --- errors ----------------------------------------------------------------------------------------------------------


def test_cuda(full_bundle: Path) -> None:
    with pytest.raises(ConfigError, match="OpenVINO runs on the CPU here, not on 'cuda'"):
        load(full_bundle, device="cuda")


@pytest.mark.parametrize("content", [b"", b"not a graph", None], ids=["empty", "text", "cut short"])
def test_a_broken_graph_with_the_right_hash(
    full_bundle: Path, content: bytes | None, capfd: pytest.CaptureFixture[str]
) -> None:
    graph = full_bundle / "encoder.onnx"
    graph.write_bytes(graph.read_bytes()[:-100] if content is None else content)
    rehash(full_bundle)
    with pytest.raises(MaeDeployError, match=r"encoder\.onnx") as caught:
        load(full_bundle)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_graph_that_is_not_the_manifest_s(tmp_path: Path) -> None:
    path = write_bundle(tmp_path / "b", change=lambda manifest: manifest["graph"]["outputs"].pop())
    with pytest.raises(CheckFailed, match=r"logits.*its manifest says"):
        load(path)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((3, 3, 6, 14), np.float32),
        np.zeros((2, 3, 6, 14)),
        np.zeros((2, 3, 6), np.float32),
        np.zeros(2, object),
    ],
)
def test_inputs_that_the_graph_refuses(
    tmp_path: Path, images: np.ndarray[Any, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    samples = golden_inputs(visible=False)["images"][:2]
    with load(write_bundle(tmp_path / "b", batch=2, token_mode="full")) as engine:
        with pytest.raises(MaeDeployError, match="OpenVINO failed: ") as caught:
            engine.run({"images": images})
        assert "\n" not in str(caught.value)
        np.testing.assert_allclose(engine.run({"images": samples})["cls"], reference(samples)["cls"], atol=TOLERANCE)
    assert capfd.readouterr().err == ""


def test_closing(full_bundle: Path) -> None:
    with load(full_bundle) as engine:
        pass
    engine.close()
    with pytest.raises(MaeDeployError, match="closed"):
        engine.run(golden_inputs(visible=False))


SIGNALS = """
import faulthandler, os, signal, sys, threading
from mae_deploy.runtime import Backbone

faulthandler.enable()
for _ in range(3):
    engines = [Backbone.load(sys.argv[1], "openvino", threads=1)]
    thread = threading.Thread(target=engines.clear)
    thread.start()
    thread.join()
signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
os.kill(os.getpid(), signal.SIGUSR1)
"""


def test_signals_are_handled_after_another_thread_has_freed_an_engine(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SIGNALS, str(write_bundle(tmp_path / "b"))], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr
