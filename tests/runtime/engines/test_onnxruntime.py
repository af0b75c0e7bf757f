"""Engines by name, their options, what ONNX Runtime refuses as one line, and chunks of a fixed batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from mae_deploy.cli import main
from mae_deploy.errors import CheckFailed, ConfigError, MaeDeployError, MissingDependency
from mae_deploy.images.read import Array
from mae_deploy.runtime import Bundle
from mae_deploy.runtime.cuda import driver
from mae_deploy.runtime.engines import onnxruntime as onnxruntime_engine
from mae_deploy.runtime.engines.base import Engine, EngineOptions, check_outputs, run_in_chunks
from mae_deploy.runtime.engines.onnxruntime import import_onnxruntime
from mae_deploy.runtime.registry import load_engine, open_graph
from tests.runtime.tiny_bundle import OUTPUTS, golden_inputs, reference, rehash, write_bundle


@pytest.mark.parametrize("name", ["auto", "onnx", "onnxruntime"])
def test_onnxruntime_has_three_names(full_bundle: Path, name: str) -> None:
    with load_engine(Bundle.load(full_bundle), name) as engine:
        assert (engine.name, engine.version, engine.device) == ("onnxruntime", onnxruntime.__version__, "cpu")


def test_an_unknown_engine(full_bundle: Path) -> None:
    with pytest.raises(ConfigError, match="unknown engine 'tflite'") as caught:
        load_engine(Bundle.load(full_bundle), "tflite")
    assert caught.value.hint == "known: auto, onnx, ov, trt, trt-rtx, onnxruntime, openvino, tensorrt, tensorrt-rtx"


def write_proven_on_openvino(path: Path) -> Bundle:
    return Bundle.load(
        write_bundle(path, token_mode="full", change=lambda manifest: manifest.update(engine="openvino"))
    )


def test_auto_is_the_engine_on_which_the_bundle_was_proven(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    bundle = write_proven_on_openvino(tmp_path / "b")
    with load_engine(bundle) as engine:
        assert (engine.name, engine.device) == ("openvino", "cpu")
    with load_engine(bundle, "onnx") as engine:
        assert engine.name == "onnxruntime"


def test_auto_without_the_engine_s_package_or_device_is_onnxruntime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = write_proven_on_openvino(tmp_path / "b")
    with pytest.raises(MissingDependency, match="this ONNX Runtime cannot use CUDA"):
        load_engine(bundle, options=EngineOptions(device="cuda"))
    monkeypatch.setitem(sys.modules, "openvino", None)
    with load_engine(bundle) as engine:
        assert engine.name == "onnxruntime"
    with pytest.raises(MissingDependency, match="needs the package 'openvino'") as caught:
        load_engine(bundle, "openvino")
    assert caught.value.hint == "pip install 'mae-deploy[openvino]'"


def test_auto_where_the_engine_is_installed_and_does_not_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = write_proven_on_openvino(tmp_path / "b")
    for name in [name for name in sys.modules if name.partition(".")[0] == "openvino"]:
        monkeypatch.delitem(sys.modules, name)
    broken = tmp_path / "site" / "openvino"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('libopenvino.so: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    with load_engine(bundle) as engine:
        assert engine.name == "onnxruntime"
    assert f"ONNX Runtime runs {bundle.path} instead of OpenVINO: " in caplog.text
    assert "libopenvino.so: cannot open shared object file" in caplog.text
    with pytest.raises(MissingDependency, match=r"libopenvino\.so"):
        load_engine(bundle, "openvino")


@pytest.mark.parametrize("name", ["auto", "onnx"])
def test_a_bare_graph(visible_bundle: Path, name: str) -> None:
    inputs = golden_inputs(visible=True)
    with open_graph(visible_bundle / "encoder.onnx", name) as engine:
        assert (engine.name, engine.input_names, engine.output_names) == (
            "onnxruntime",
            ("images", "ids_keep"),
            tuple(OUTPUTS),
        )
        np.testing.assert_allclose(engine.run(inputs)["cls"], reference(**inputs)["cls"], atol=1e-5)


def test_a_bare_graph_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no ONNX file at .*nothing"):
        open_graph(tmp_path / "nothing")
    (tmp_path / "text").write_text("text")
    with pytest.raises(MaeDeployError, match=r"ONNX Runtime cannot load .*text"):
        open_graph(tmp_path / "text")
    with pytest.raises(ConfigError, match="TensorRT runs bundles, not bare ONNX files"):
        open_graph(tmp_path / "text", "trt")


@pytest.mark.parametrize("threads", [0, -1])
def test_threads(threads: int) -> None:
    with pytest.raises(ConfigError, match=f"not {threads}"):
        EngineOptions(threads=threads)


@pytest.mark.parametrize(("affinity", "shown"), [((), "''"), ((0, 1, 0), "'0,1,0'"), ((-1,), "'-1'")])
def test_an_affinity_that_names_no_cores(affinity: tuple[int, ...], shown: str) -> None:
    with pytest.raises(ConfigError, match=f"not {shown}"):
        EngineOptions(affinity=affinity)


def test_the_number_of_threads() -> None:
    assert EngineOptions().num_threads is None
    assert EngineOptions(affinity=(3, 5)).num_threads == 2
    assert EngineOptions(affinity=(3, 5), threads=7).num_threads == 7


def test_options_reach_the_session(full_bundle: Path) -> None:
    engine = onnxruntime_engine.OnnxRuntimeEngine(full_bundle / "encoder.onnx", EngineOptions(threads=3))
    options = engine._session.get_session_options()
    assert options.intra_op_num_threads == 3
    assert options.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL


def test_an_unknown_device(full_bundle: Path) -> None:
    with pytest.raises(ConfigError, match="unknown device 'tpu'"):
        load_engine(Bundle.load(full_bundle), options=EngineOptions(device="tpu"))


def test_cuda_that_is_not_there(full_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(MissingDependency, match="cannot use CUDA") as caught:
        load_engine(Bundle.load(full_bundle), options=EngineOptions(device="cuda"))
    assert "onnxruntime-gpu" in (caught.value.hint or "")
    with load_engine(Bundle.load(full_bundle), options=EngineOptions(device="auto")) as engine:
        assert engine.device == "cpu"


@pytest.fixture
def gpu_package(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An ONNX Runtime that is built for CUDA, as far as the engine can tell."""
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    onnxruntime_engine._say_cpu.cache_clear()
    yield
    onnxruntime_engine._say_cpu.cache_clear()


def start_without_cuda(monkeypatch: pytest.MonkeyPatch, error: str | None) -> None:
    """There is a GPU; a session that asks for CUDA fails with the error, or has the CPU alone: ONNX Runtime itself
    falls back without an error.
    """
    session = onnxruntime.InferenceSession

    def start(path: str, options: object, providers: list[Any], enable_fallback: int) -> Any:
        assert enable_fallback == 0, "it would print to stdout"
        if len(providers) > 1:
            assert providers[0] == ("CUDAExecutionProvider", {"use_tf32": "0"})
            if error is not None:
                raise RuntimeError(error)
        return session(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime_engine, "require_gpu", lambda: None)
    monkeypatch.setattr(onnxruntime, "InferenceSession", start)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (None, "ONNX Runtime's CUDA provider did not start"),
        ("CUDA failure 35:\ndriver too old", "CUDA failure 35: driver too old"),
    ],
)
def test_auto_is_cuda_where_it_starts_not_where_it_is_installed(
    full_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    gpu_package: None,
    caplog: pytest.LogCaptureFixture,
    error: str | None,
    message: str,
) -> None:
    start_without_cuda(monkeypatch, error)
    bundle = Bundle.load(full_bundle)
    for _ in range(2):
        with load_engine(bundle, options=EngineOptions(device="auto")) as engine:
            assert engine.device == "cpu"
            assert len(engine.run(golden_inputs(visible=False))["cls"])
    assert [
        record.getMessage().startswith("device auto: ONNX Runtime computes on the CPU: ") for record in caplog.records
    ] == [True]
    assert message in caplog.text
    with pytest.raises(MaeDeployError, match=message):
        load_engine(bundle, options=EngineOptions(device="cuda"))


def test_the_gpu_package_without_a_gpu(
    full_bundle: Path, monkeypatch: pytest.MonkeyPatch, gpu_package: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """ONNX Runtime, which writes a page about it, is not even asked."""
    monkeypatch.setattr(driver, "LIBRARY", "libcuda-of-nobody.so.1")
    assert main(["verify", str(full_bundle), "--device", "auto", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["device"] == "cpu"
    assert main(["verify", str(full_bundle), "--device", "cuda", "--json"]) == 3
    assert "error: there is no NVIDIA driver here" in capsys.readouterr().err


def test_a_graph_that_cuda_and_the_cpu_refuse_says_nothing_about_cuda(
    full_bundle: Path, monkeypatch: pytest.MonkeyPatch, gpu_package: None, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(onnxruntime_engine, "require_gpu", lambda: None)
    model = onnx.load(full_bundle / "encoder.onnx")
    model.opset_import[0].version = 10**6
    onnx.save(model, full_bundle / "encoder.onnx")
    rehash(full_bundle)
    with pytest.raises(MaeDeployError, match="cannot load"):
        load_engine(Bundle.load(full_bundle), options=EngineOptions(device="auto"))
    assert caplog.text == ""


def test_without_onnxruntime(full_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependency, match="ONNX Runtime cannot be imported") as caught:
        load_engine(Bundle.load(full_bundle))
    assert caught.value.hint == "pip install onnxruntime"


def one_line(error: MaeDeployError) -> bool:
    return "\n" not in str(error) and len(str(error)) > 20


def test_a_broken_graph_with_the_right_hash(full_bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for content in (b"", b"not a graph", (full_bundle / "encoder.onnx").read_bytes()[:-100]):
        (full_bundle / "encoder.onnx").write_bytes(content)
        rehash(full_bundle)
        with pytest.raises(MaeDeployError, match=r"encoder\.onnx is not an ONNX model") as caught:
            load_engine(Bundle.load(full_bundle))
        assert one_line(caught.value)
    assert capfd.readouterr().err == ""


def test_a_graph_that_is_not_the_manifest_s(tmp_path: Path) -> None:
    path = write_bundle(tmp_path / "b", change=lambda manifest: manifest["graph"]["outputs"].pop())
    with pytest.raises(CheckFailed, match=r"logits.*its manifest says"):
        load_engine(Bundle.load(path))


def test_inputs_that_the_graph_refuses(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with load_engine(Bundle.load(write_bundle(tmp_path / "b", batch=2, token_mode="full"))) as engine:
        for images in (
            np.zeros((3, 3, 6, 14), np.float32),
            np.zeros((2, 3, 6, 14), np.float64),
            np.zeros((2, 3, 6), np.float32),
        ):
            with pytest.raises(MaeDeployError, match="ONNX Runtime failed") as caught:
                engine.run({"images": images})
            assert one_line(caught.value)
    assert capfd.readouterr().err == ""


def test_indices_out_of_range_are_an_error_of_ours(visible_bundle: Path) -> None:
    inputs = golden_inputs(visible=True)
    inputs["ids_keep"][0, 0] = 1000
    with load_engine(Bundle.load(visible_bundle)) as engine, pytest.raises(MaeDeployError, match="ONNX Runtime failed"):
        engine.run(inputs)


@pytest.mark.parametrize("names", [[], ["images"], ["images", "keep"], ["images", "ids_keep", "mask"]])
def test_inputs_by_other_names(visible_bundle: Path, names: list[str]) -> None:
    with (
        load_engine(Bundle.load(visible_bundle)) as engine,
        pytest.raises(ConfigError, match="takes the inputs images, ids_keep"),
    ):
        engine.run({name: np.zeros(3) for name in names})


def test_outputs_are_the_named_ones_in_order(visible_bundle: Path) -> None:
    inputs = golden_inputs(visible=True)
    with load_engine(Bundle.load(visible_bundle)) as engine:
        found = engine.run(inputs, ["pooled", "cls"])
    assert list(found) == ["pooled", "cls"]
    for name, array in found.items():
        np.testing.assert_allclose(array, reference(**inputs)[name], atol=1e-5)  # FP32 sums in another order


def test_closing(full_bundle: Path) -> None:
    with load_engine(Bundle.load(full_bundle)) as engine:
        pass
    engine.close()
    with pytest.raises(MaeDeployError, match="closed"):
        engine.run(golden_inputs(visible=False))


@pytest.mark.parametrize(
    ("wanted", "message"),
    [(["depth"], "no output 'depth'"), ([], "no output was asked for"), (["cls", "x", "y"], "no output 'x, y'")],
)
def test_unknown_outputs(wanted: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check_outputs(wanted, ["cls", "tokens"])
    assert caught.value.hint == "this graph has: cls, tokens"


def test_outputs_without_doubles_and_all_by_default() -> None:
    assert check_outputs(["b", "a", "b"], ["a", "b", "c"]) == ("b", "a")
    assert check_outputs("cls", ["cls", "l"]) == ("cls",)
    assert check_outputs(None, ["a", "b"]) == ("a", "b")


class Recorder(Engine):
    """Returns its input, and remembers the batches."""

    name = version = device = "recorder"
    input_names: tuple[str, ...] = ("x",)
    output_names: tuple[str, ...] = ("x",)

    def _load(self, graph: Path, options: EngineOptions, precision: str, taps: tuple[str, ...]) -> None:
        self.batches: list[list[int]] = []

    def _run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        self.batches.append(inputs["x"][:, 0].tolist())
        return {"x": inputs["x"] * 10}

    def _close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("batch", "total", "batches"),
    [
        (None, 7, [[0, 1, 2, 3, 4, 5, 6]]),
        (3, 7, [[0, 1, 2], [3, 4, 5], [6, 6, 6]]),
        (3, 6, [[0, 1, 2], [3, 4, 5]]),
        (5, 2, [[0, 1, 1, 1, 1]]),
        (1, 2, [[0], [1]]),
    ],
)
def test_chunks(batch: int | None, total: int, batches: list[list[int]]) -> None:
    engine = Recorder(Path(), EngineOptions())
    x = np.arange(total * 2).reshape(total, 2) // 2
    np.testing.assert_array_equal(run_in_chunks(engine, {"x": x}, batch=batch)["x"], x * 10, strict=True)
    assert engine.batches == batches


@pytest.mark.parametrize(
    ("total", "keep", "runs"),
    [(1, 4, [2]), (3, 4, [3]), (4, 4, [3, 3]), (5, 4, [5]), (6, 4, [5, 5]), (2, 9, [5]), (7, 10, [7])],
)
def test_chunks_of_the_sizes_that_an_engine_takes(total: int, keep: int, runs: list[int]) -> None:
    profiles = ({"B": [2, 2, 3], "K": [4, 4, 4]}, {"B": [5, 5, 5], "K": [1, 2, 9]})
    engine = Recorder(Path(), EngineOptions(), profiles=profiles)
    engine.input_names = ("x", "ids_keep")
    inputs = {"x": np.arange(total * 2).reshape(total, 2), "ids_keep": np.zeros((total, keep), np.int64)}
    np.testing.assert_array_equal(run_in_chunks(engine, inputs, batch=None)["x"], inputs["x"] * 10, strict=True)
    assert [len(batch) for batch in engine.batches] == runs, "with no range for K, the engine itself refuses"


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_an_engine_writes_nothing_at_home(full_bundle: Path, tmp_path: Path, engine: str) -> None:
    """Left to themselves, ONNX Runtime keeps a device id and a database of what it sends, and OpenVINO an id."""
    home = tmp_path / "home"
    home.mkdir()
    probe = f"""
from mae_deploy.runtime import Backbone
with Backbone.load({str(full_bundle)!r}, engine={engine!r}) as backbone:
    backbone(backbone.bundle.golden()["images"])
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "ORT_", "CI"))}
    done = subprocess.run(
        [sys.executable, "-c", probe], env={**environment, "HOME": str(home)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert list(home.rglob("*")) == []


def test_telemetry_that_a_user_asks_for_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    import_onnxruntime()
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "0"
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY")
    import_onnxruntime()
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"


def test_an_engine_s_package_is_imported_when_it_loads_and_torch_never(visible_bundle: Path) -> None:
    probe = f"""
import sys
from mae_deploy.runtime import Backbone, predict, timing, verify
from mae_deploy.runtime.engines import onnxruntime, openvino
assert not {{"onnxruntime", "openvino"}} & set(sys.modules)
backbone = Backbone.load({str(visible_bundle)!r})
assert "onnxruntime" in sys.modules and "openvino" not in sys.modules
assert verify.verify_bundle(backbone.bundle).passed
assert not [name for name in sys.modules if name.startswith("mae_deploy.runtime.tensorrt")], "what concerns GPUs alone"
from mae_deploy.runtime.tensorrt import open_plan, plans
assert not {{"mae_deploy.runtime.tensorrt.build", "mae_deploy.runtime.tensorrt.add_engine"}} & set(sys.modules)
assert not {{"torch", "onnx", "timm", "yaml", "mae_deploy.config"}} & set(sys.modules), sorted(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
