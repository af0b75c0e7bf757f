"""`mae-deploy benchmark` as it is typed: what is timed, fed with what, in which order, what is left out, and what the
figures mean.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from importlib import util
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from mae_deploy.cli import main
from mae_deploy.commands.benchmark import run as benchmark
from mae_deploy.commands.benchmark.roofline import Yardstick
from mae_deploy.errors import ConfigError, MaeDeployError, MissingDependency
from mae_deploy.images.read import Array
from mae_deploy.reporting import machine as reporting_machine
from mae_deploy.runtime import probe, registry
from mae_deploy.runtime import timing as runtime_benchmark
from mae_deploy.runtime.cuda.driver import Gpu
from mae_deploy.runtime.engines.base import EngineOptions
from mae_deploy.runtime.engines.onnxruntime import OnnxRuntimeEngine
from mae_deploy.runtime.timing import Timing
from tests.runtime.tiny_bundle import CLASSES, DEPTH, C, D, H, N, P, W, write_bundle
from tests.test_cli import TRAINING, run_without

FEW = ("--repeats", "2", "--warmup", "1", "--no-probe")

FLOPS_OF_5 = 2 * (5 * P * P * C * D + DEPTH * (6 * 12 * D * D + 2 * 6 * 6 * D) + D * CLASSES)
"""5 patches of 12 numbers to 13; for 6 tokens of 13 the maps of a block (12 D²) and its two products; the head."""

Call = dict[str, tuple[str, tuple[int, ...]]]


def measured(*arguments: str | Path) -> list[str]:
    return ["benchmark", *map(str, arguments), *FEW, "--json"]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """The report of a benchmark, and what it said on stderr as `said`."""

    def call(*arguments: str | Path) -> dict[str, Any]:
        assert main(measured(*arguments)) == 0
        captured = capsys.readouterr()
        report: dict[str, Any] = json.loads(captured.out)
        return {**report, "said": captured.err}

    return call


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Call]]:
    """The graph's folder, and type and shape of every input, of every call that is timed."""
    seen: list[tuple[str, Call]] = []
    original = runtime_benchmark.measure
    loaded: dict[int, str] = {}
    load, work = OnnxRuntimeEngine._load, OnnxRuntimeEngine._run
    recording = [False]

    def spy_load(self: OnnxRuntimeEngine, graph: Path, *given: Any) -> None:
        loaded[id(self)] = graph.parent.name
        load(self, graph, *given)

    def spy_run(self: OnnxRuntimeEngine, inputs: Mapping[str, Array], outputs: Any) -> dict[str, Array]:
        if recording[0] and "x" not in inputs:
            seen.append((loaded[id(self)], {name: (str(array.dtype), array.shape) for name, array in inputs.items()}))
        return work(self, inputs, outputs)

    def measure(*given: Any, **named: Any) -> Any:
        recording[0] = True
        try:
            return original(*given, **named)
        finally:
            recording[0] = False

    monkeypatch.setattr(OnnxRuntimeEngine, "_load", spy_load)
    monkeypatch.setattr(OnnxRuntimeEngine, "_run", spy_run)
    monkeypatch.setattr(benchmark, "measure", measure)
    return seen


def stranger(
    path: Path,
    *,
    images: list[Any] | None = None,
    ids: list[Any] | None = None,
    dtype: int = TensorProto.FLOAT,
    more: Any = None,
) -> Path:
    """Somebody else's graph: the sum of each image, and where there are any the sum of the patch numbers; their inputs
    have their own names.
    """
    inputs = [helper.make_tensor_value_info("pixel values", dtype, images or ["n", C, H, W])]
    nodes = [helper.make_node("ReduceSum", ["pixel values"], ["total"], keepdims=0)]
    outputs = [helper.make_tensor_value_info("total", dtype, [])]
    if ids is not None:
        inputs.append(helper.make_tensor_value_info("visible", TensorProto.INT64, ids))
        nodes.append(helper.make_node("ReduceSum", ["visible"], ["numbers"], keepdims=0))
        outputs.append(helper.make_tensor_value_info("numbers", TensorProto.INT64, []))
    body = helper.make_graph(nodes, "stranger", [*inputs, *([more] if more is not None else [])], outputs)
    path.parent.mkdir(exist_ok=True)
    onnx.save(helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def keys(report: dict[str, Any], *names: str) -> list[tuple[Any, ...]]:
    return [tuple(row[name] for name in names) for row in report["rows"]]


# --- which rows there are --------------------------------------------------------------------------------------------


def test_every_combination_takes_its_turn(
    tmp_path: Path, run: Callable[..., dict[str, Any]], calls: list[tuple[str, Call]]
) -> None:
    full, visible = write_bundle(tmp_path / "full", token_mode="full"), write_bundle(tmp_path / "visible")
    report = run(full, visible, "--keep", "3,21", "--keep-ratio", "0.5,0.001", "--batch-size", "2,1")
    images, ids = (
        {batch: ("float32", (batch, C, H, W)) for batch in (1, 2)},
        {(b, k): ("int64", (b, k)) for b in (1, 2) for k in (1, 3, 10, 21)},
    )
    one_round: list[tuple[str, Call]] = [("full", {"images": images[2]}), ("full", {"images": images[1]})]
    one_round += [("visible", {"images": images[b], "ids_keep": ids[b, k]}) for b in (2, 1) for k in (3, 21, 10, 1)]
    rounds = [calls[i : i + len(one_round)] for i in range(0, len(calls), len(one_round))]
    assert rounds[0] == one_round, "not timed"
    assert [sorted(each, key=repr) for each in rounds] == [sorted(one_round, key=repr)] * 3, "in any order"
    expected = [(str(full), "full", b, N) for b in (2, 1)] + [
        (str(visible), "visible", b, k) for b in (2, 1) for k in (3, 21, 10, 1)
    ]
    assert keys(report, "graph", "tokens", "batch", "patches") == expected
    assert {(row["calls"], row["engine"], row["device"], row["precision"]) for row in report["rows"]} == {
        (2, "onnxruntime", "cpu", "fp32")
    }
    assert report["left_out"] == []
    for row in report["rows"]:
        assert 0 < row["min_ms"] <= row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"] <= row["max_ms"]


def test_defaults_are_one_image_and_a_quarter_of_the_patches(
    tmp_path: Path, run: Callable[..., dict[str, Any]]
) -> None:
    assert keys(run(write_bundle(tmp_path / "visible")), "batch", "patches") == [(1, N // 4)]


def test_what_a_graph_fixes_is_its_own_and_other_batches_are_left_out(
    tmp_path: Path, run: Callable[..., dict[str, Any]]
) -> None:
    fixed, free = (
        write_bundle(tmp_path / "fixed", batch=2, keep=4),
        write_bundle(tmp_path / "free", profile_keep=(2, 4, 9)),
    )
    assert keys(run(fixed, free), "batch", "patches") == [(2, 4), (1, 5)]
    report = run(fixed, free, "--batch-size", "1,2", "--keep", "9,10,1,30")
    assert keys(report, "batch", "patches") == [(2, 4), (1, 9), (2, 9)]
    outside = [
        {"row": f"{free}, batch {b}, {k} patches", "why": "the graph takes 2 to 9 patches"}
        for b in (1, 2)
        for k in (10, 1, 30)
    ]
    assert report["left_out"] == [
        {"row": f"{fixed}, batch 1, 4 patches", "why": "the graph takes 2 images a call"},
        *outside,
    ]
    assert f"left out: {fixed}, batch 1, 4 patches: the graph takes 2 images a call\n" in report["said"]
    assert report["said"].count("left out: ") == 7


def test_every_form_of_graph_gets_what_it_takes(
    tmp_path: Path, run: Callable[..., dict[str, Any]], calls: list[tuple[str, Call]]
) -> None:
    ragged = write_bundle(tmp_path / "ragged", token_mode="ragged")
    pixels = write_bundle(tmp_path / "pixels", token_mode="reconstruct", outputs=["pixels"])
    byte = write_bundle(tmp_path / "byte", token_mode="full", images="uint8")
    half = write_bundle(tmp_path / "half", images="float16", features="float16", precision="fp16")
    report = run(ragged, pixels, byte, half, "--keep", "5", "--batch-size", "3")
    assert calls[:4] == [
        ("ragged", {"images": ("float32", (3, C, H, W)), "ids_keep": ("int64", (3, 5)), "num_keep": ("int64", (3,))}),
        ("pixels", {"images": ("float32", (3, C, H, W)), "ids_keep": ("int64", (3, 5))}),
        ("byte", {"images": ("uint8", (3, H, W, C))}),
        ("half", {"images": ("float16", (3, C, H, W)), "ids_keep": ("int64", (3, 5))}),
    ]
    assert keys(report, "tokens", "precision") == [
        ("ragged", "fp32"),
        ("reconstruct", "fp32"),
        ("full", "fp32"),
        ("visible", "fp16"),
    ]
    assert [row["cosine"] is None for row in report["rows"]] == [False, True, False, False]
    assert [row["gflops"] is None for row in report["rows"]] == [
        False,
        True,
        False,
        False,
    ], "nobody says how large the decoder is"


# --- somebody else's graphs ------------------------------------------------------------------------------------------


def test_somebody_elses_graphs(
    tmp_path: Path, run: Callable[..., dict[str, Any]], calls: list[tuple[str, Call]]
) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    free = stranger(tmp_path / "free" / "a.onnx", images=["n", None, None, None], ids=["n", "k"])
    fixed = stranger(tmp_path / "fixed" / "b.onnx", images=[2, 1, 5, 8], dtype=TensorProto.FLOAT16, ids=[2, 6])
    whole = stranger(tmp_path / "whole" / "c.onnx")
    report = run(bundle, "--against", f"{free},{fixed},{whole}", "--keep", "4,7", "--batch-size", "1,2")
    timed = [row for row in calls[: len(calls) // 3] if row[0] != "bundle"]
    every = {b: ("float32", (b, C, H, W)) for b in (1, 2)}
    assert timed == [
        *(("free", {"pixel values": every[b], "visible": ("int64", (b, k))}) for b in (1, 2) for k in (4, 7)),
        ("fixed", {"pixel values": ("float16", (2, 1, 5, 8)), "visible": ("int64", (2, 6))}),
        *(("whole", {"pixel values": every[b]}) for b in (1, 2)),
    ]
    others = [row for row in report["rows"] if row["graph"] != str(bundle)]
    assert [row["patches"] for row in others] == [4, 7, 4, 7, 6, None, None]
    assert {
        (
            row["tokens"],
            row["precision"],
            row["cosine"],
            row["top1"],
            row["gflop_per_image"],
            row["gflops"],
            row["gemm_share"],
        )
        for row in others
    } == {(None,) * 7}
    assert [row["size_bytes"] for row in others] == [
        path.stat().st_size for path in (free, free, free, free, fixed, whole, whole)
    ]
    assert report["left_out"] == [{"row": f"{fixed}, batch 1, 6 patches", "why": "the graph takes 2 images a call"}]


def test_size_is_that_of_the_graph_and_the_weights_beside_it(
    tmp_path: Path, run: Callable[..., dict[str, Any]]
) -> None:
    bundle, other = write_bundle(tmp_path / "bundle"), tmp_path / "other.onnx"
    onnx.save(
        onnx.load(bundle / "encoder.onnx"), other, save_as_external_data=True, location="my weights", size_threshold=500
    )
    sizes = [row["size_bytes"] for row in run(bundle, "--against", other)["rows"]]
    assert sizes == [
        (bundle / "encoder.onnx").stat().st_size,
        other.stat().st_size + (tmp_path / "my weights").stat().st_size,
    ]
    assert (tmp_path / "my weights").stat().st_size > 500


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ({"more": ("scale", TensorProto.FLOAT, [1])}, "nothing is known to feed the input 'scale' with, float32 (1)"),
        (
            {"more": ("again", TensorProto.FLOAT, ["n", 3, 2, 2])},
            "nothing is known to feed the input 'again' with, float32 (n, 3, 2, 2)",
        ),
        (
            {"ids": ["n", "k"], "more": ("ids", TensorProto.INT32, ["n", "k"])},
            "nothing is known to feed the input 'ids' with, int32 (n, k)",
        ),
        ({"images": ["n", 12]}, "nothing is known to feed the input 'pixel values' with, float32 (n, 12)"),
    ],
)
def test_an_input_that_nothing_is_known_of(
    tmp_path: Path, made: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = made.pop("more", None)
    path = stranger(tmp_path / "a.onnx", more=helper.make_tensor_value_info(*more) if more else None, **made)
    assert main(measured(write_bundle(tmp_path / "bundle"), "--against", path)) == 2
    assert capsys.readouterr().err.splitlines()[0] == f"error: {path}: {said}"


def test_a_graph_without_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["n", "k"])
    body = helper.make_graph(
        [helper.make_node("Identity", ["ids"], ["y"])],
        "g",
        [ids],
        [helper.make_tensor_value_info("y", TensorProto.INT64, ["n", "k"])],
    )
    onnx.save(helper.make_model(body), tmp_path / "a.onnx")
    assert main(measured(write_bundle(tmp_path / "bundle"), "--against", tmp_path / "a.onnx")) == 2
    assert f"{tmp_path / 'a.onnx'}: no input takes images" in capsys.readouterr().err


def test_a_graph_that_refuses_its_inputs_is_left_out(tmp_path: Path, run: Callable[..., dict[str, Any]]) -> None:
    # The batch is written into a Reshape, though the input leaves it open.
    shape = helper.make_node(
        "Constant", [], ["shape"], value=helper.make_tensor("s", TensorProto.INT64, [2], [1, C * H * W])
    )
    body = helper.make_graph(
        [shape, helper.make_node("Reshape", ["images", "shape"], ["y"])],
        "g",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", C, H, W])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, C * H * W])],
    )
    onnx.save(helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "a.onnx")
    report = run(write_bundle(tmp_path / "bundle"), "--against", tmp_path / "a.onnx", "--batch-size", "1,2")
    assert keys(report, "graph", "batch")[2:] == [(str(tmp_path / "a.onnx"), 1)]
    (left_out,) = report["left_out"]
    assert left_out["row"] == f"{tmp_path / 'a.onnx'} on onnxruntime, batch 2"
    assert left_out["why"].endswith("node 'y' (Reshape) cannot be followed for 2 images: (2, 3, 6, 14) as (1, 252)")


# --- engines ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(util.find_spec("openvino") is None, reason="needs OpenVINO")
def test_two_engines(tmp_path: Path, run: Callable[..., dict[str, Any]]) -> None:
    bundle, other = write_bundle(tmp_path / "bundle"), stranger(tmp_path / "a.onnx")
    report = run(bundle, "--engine", "auto,ov,onnxruntime", "--against", other, "--keep", "4,21")
    expected = [
        (str(bundle), "onnxruntime", 4),
        (str(bundle), "onnxruntime", N),
        (str(bundle), "openvino", 4),
        (str(bundle), "openvino", N),
    ]
    assert keys(report, "graph", "engine", "patches") == [
        *expected,
        (str(other), "onnxruntime", None),
        (str(other), "openvino", None),
    ]
    assert list(report["gemm_gflops"]) == list(report["machine"]["engines"]) == ["onnxruntime", "openvino"]
    assert report["rows"][0]["cosine"] == pytest.approx(report["rows"][2]["cosine"], abs=1e-5)
    assert [row["speedup_over_full"] == 1 for row in report["rows"]] == [False, True, False, True, False, False]


def test_an_engine_that_is_not_there_is_left_out(
    tmp_path: Path,
    run: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def absent() -> Any:
        raise MissingDependency("no OpenVINO here", hint="install it")

    monkeypatch.setitem(registry.ENGINES, "openvino", absent)
    bundle = write_bundle(tmp_path / "bundle")
    report = run(bundle, "--engine", "openvino,onnxruntime")
    assert keys(report, "engine") == [("onnxruntime",)]
    assert report["left_out"] == [{"row": f"{bundle} on openvino", "why": "no OpenVINO here"}]
    assert main(measured(bundle, "--engine", "openvino")) == 3
    assert capsys.readouterr().err == "error: no OpenVINO here\nhint: install it\n"


def test_threads_and_cores_reach_the_engines(
    tmp_path: Path, run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Any, ...]] = []
    original = onnxruntime.InferenceSession

    def session(path: str, options: Any, **more: Any) -> Any:
        seen.append((Path(path).name, options.intra_op_num_threads))
        return original(path, options, **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    machine = run(write_bundle(tmp_path / "bundle"), "--threads", "1")["machine"]
    assert seen == [("encoder.onnx", 1), *[("products.onnx", 1)] * 3]
    assert (machine["threads"], machine["affinity"]) == (1, None)


# --- figures ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def stopwatch(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, int, int | None], tuple[float, ...]]:
    """Put durations by folder, batch and K in; the products take 2 ms, all others 1 ms."""
    durations: dict[tuple[str, int, int | None], tuple[float, ...]] = {}

    def measure(
        functions: Mapping[Any, Callable[[], object]], *, repeats: int, warmup: int, after_call: Any
    ) -> dict[Any, Timing]:
        def seconds(row: Any) -> tuple[float, ...]:
            return (
                (0.002,)
                if isinstance(row, Yardstick)
                else durations.get((row.subject.graph.parent.name, row.batch, row.keep), (0.001,))
            )

        return {row: Timing(seconds(row)) for row in functions}

    monkeypatch.setattr(benchmark, "measure", measure)
    return durations


def test_the_figures_by_hand(
    tmp_path: Path, run: Callable[..., dict[str, Any]], stopwatch: dict[Any, tuple[float, ...]]
) -> None:
    stopwatch |= {
        ("full", 2, None): (0.004, 0.002, 0.008),
        ("visible", 2, 5): (0.001, 0.003, 0.001),
        ("visible", 4, 5): (0.0015,),
    }
    report = run(
        write_bundle(tmp_path / "full", token_mode="full"),
        write_bundle(tmp_path / "visible"),
        "--keep",
        "5",
        "--batch-size",
        "2,4",
    )
    full, _, visible, more = report["rows"]
    assert (full["p50_ms"], full["images_per_second"], full["ratio"], full["speedup_over_full"]) == pytest.approx(
        (4, 2 / 0.004, 1, 1)
    )
    assert full["p95_ms"] == pytest.approx(7.6), "nine tenths of the way from the second to the third"
    assert (
        visible["p50_ms"],
        visible["images_per_second"],
        visible["ratio"],
        visible["speedup_over_full"],
    ) == pytest.approx((1, 2 / 0.001, 0.25, 4))
    assert (more["ratio"], more["speedup_over_full"]) == pytest.approx((0.1875, 2 / 3)), (
        "of an image; and over the full row of the same batch size"
    )
    assert visible["gflop_per_image"] == pytest.approx(FLOPS_OF_5 / 1e9)
    assert visible["gflops"] == pytest.approx(2 * FLOPS_OF_5 / 0.001 / 1e9)
    gemm = 4 * 2 * 768**3 / 0.002 / 1e9
    assert report["gemm_gflops"] == pytest.approx({"onnxruntime": gemm})
    assert visible["gemm_share"] == pytest.approx(visible["gflops"] / gemm)
    assert visible["roofline"]["compute_ms"] == pytest.approx(2 * FLOPS_OF_5 / gemm / 1e6)
    assert visible["roofline"]["call_ms"] == pytest.approx(2)
    assert report["bytes_per_second"] == pytest.approx({"onnxruntime": 4 * 64**2 / 0.002})


def test_full_is_a_row_of_its_kind(
    tmp_path: Path, run: Callable[..., dict[str, Any]], stopwatch: dict[Any, tuple[float, ...]]
) -> None:
    def wider(manifest: dict[str, Any]) -> None:
        manifest["model"] = {**manifest["model"], "name": "other"}

    bundles = [
        write_bundle(tmp_path / "visible"),
        write_bundle(tmp_path / "int8", precision="int8"),
        write_bundle(tmp_path / "pixels", token_mode="reconstruct", outputs=["pixels"]),
        write_bundle(tmp_path / "model", change=wider),
        write_bundle(tmp_path / "fixed", keep=4),
    ]
    other = stranger(tmp_path / "other" / "a.onnx", ids=["n", "k"])
    for index, name in enumerate(("visible", "int8", "pixels", "model", "fixed", "other"), start=2):
        stopwatch[name, 1, N] = (0.001 * index,)
    arguments: list[Any] = [*bundles, "--against", other, "--keep", "3,21"]
    found = run(*arguments)["rows"]
    assert [row["speedup_over_full"] for row in found] == pytest.approx([2, 1, 3, 1, 4, 1, 5, 1, 2, 7, 1]), (
        "each graph's own K = N; the fixed one's kin"
    )
    stopwatch["full", 1, None] = (0.009,)
    found = run(*arguments, write_bundle(tmp_path / "full", token_mode="full"))["rows"]
    assert [row["speedup_over_full"] for row in found[:2]] == pytest.approx([9, 4.5]), (
        "a full graph of the model is a better yardstick than K = N"
    )
    assert run(bundles[4])["rows"][0]["speedup_over_full"] is None


def test_load_time_and_memory_in_a_process_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    good, other = write_bundle(tmp_path / "good", token_mode="full"), stranger(tmp_path / "a.onnx")
    arguments = ["benchmark", str(good), "--against", str(other), "--repeats", "1", "--warmup", "0", "--json"]
    assert main(arguments) == 0
    for row in json.loads(capsys.readouterr().out)["rows"]:
        assert row["load_seconds"] > 0
        assert row["peak_mib"] is None or row["peak_mib"] > 10

    def fails(graph: Path, *_: Any, **__: Any) -> probe.Probe:
        if graph == other:
            raise MaeDeployError("killed")
        return probe.Probe(load_seconds=1.5, peak_mib=None)

    monkeypatch.setattr(benchmark, "probe_graph", fails)
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert keys(json.loads(captured.out), "load_seconds", "peak_mib") == [(1.5, None), (None, None)]
    assert f"no load time and memory: {other} on onnxruntime, batch 1: killed\n" in captured.err


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "more", "said"),
    [
        (["a", "a"], [], "a graph is named twice: a, a"),
        (["a", "./a/"], [], "a graph is named twice: a, a"),
        (["a"], ["--against", "b.onnx,b.onnx"], "a graph is named twice: a, b.onnx, b.onnx"),
        ([], [], "BUNDLES is missing"),
        (["a", "nowhere"], [], "no bundle at nowhere: there is no manifest.json"),
        (["a"], ["--against", "nowhere.onnx"], "no ONNX file at nowhere.onnx"),
        (["a"], ["--against", "a/manifest.json"], "a/manifest.json is not an ONNX model (field type 3)"),
        (["a"], ["--keep", "0,3"], "each of --keep must be at least 1, got 0,3"),
        (["a"], ["--keep-ratio", "0"], "each of --keep-ratio must be above 0 and at most 1, got 0.0"),
        (["a"], ["--keep-ratio", "0.5,1.5"], "each of --keep-ratio must be above 0 and at most 1, got 0.5,1.5"),
        (["a"], ["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (
            ["a"],
            ["--batch-size", "1,0"],
            "each of --batch-size must be at least 1, got 1,0",
        ),
        (["a"], ["--engine", "abacus"], "unknown engine 'abacus'"),
        (["a"], ["--engine", ","], "--engine '' must be at least one engine, such as onnx,ov"),
        (["a"], ["--threads", "0"], "--threads must be at least 1 and at most 4096, got 0"),
        (["a"], ["--keep", "22"], "nothing is left to time: a, batch 1, 22 patches: the graph takes 1 to 21 patches"),
        (["a"], ["--images", "nowhere"], "no such file or folder: nowhere"),
        (["a"], ["--out", "a"], "--out a already exists"),
    ],
)
def test_mistakes_are_2(
    tmp_path: Path,
    names: list[str],
    more: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_bundle(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    assert main(["benchmark", *names, *more]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[0] == f"error: {said}"


def test_a_tampered_bundle_is_not_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    with (bundle / "encoder.onnx").open("ab") as file:
        file.write(b"\0")
    assert main(measured(bundle)) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "is not the file that was exported" in captured.err


def test_without_the_training_packages(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    done = run_without(
        (*TRAINING, "matplotlib", "openvino"),
        "benchmark",
        str(bundle),
        "--repeats",
        "1",
        "--out",
        str(tmp_path / "report"),
        "--json",
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["rows"]) == 1
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["benchmark.json", "benchmark.md"]
    assert "no picture: this needs the package 'matplotlib'" in done.stderr


# --- the report ------------------------------------------------------------------------------------------------------


def test_the_report_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_bundle(Path("a[/x]"), keep=4, batch=2)
    write_bundle(Path("b"), token_mode="full")
    arguments = ["benchmark", "a[/x]", "b", "--batch-size", "1,2", "--repeats", "2", "--warmup", "1", "--no-probe"]
    assert main([*arguments, "--out", "report/one", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    folder = Path("report/one")
    assert sorted(path.name for path in folder.iterdir()) == ["benchmark.json", "benchmark.md", "benchmark.png"]
    assert json.loads((folder / "benchmark.json").read_text()) == report
    assert (folder / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    assert shlex.split(report["command"]) == [
        "mae-deploy",
        "benchmark",
        "a[/x]",
        "b",
        *arguments[3:5],
        "--no-probe",
        "--out",
        "report/one",
        *arguments[5:9],
    ]
    text = (folder / "benchmark.md").read_text()
    assert report["command"] in text
    assert "![accuracy and latency against patches](benchmark.png)" in text
    assert "- a[/x], batch 1, 4 patches: the graph takes 2 images a call" in text
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| 1 |")
    ]
    first = report["rows"][0]
    assert cells[0] == ["1", "a[/x]", "fp32", "onnxruntime", "2", "4", f"{first['p50_ms']:.2f}", "1.000"]
    assert cells[1][:4] == [
        "1",
        f"{first['p95_ms']:.2f}",
        f"{first['p99_ms']:.2f}",
        f"{first['images_per_second']:.1f}",
    ]
    assert main([*arguments, "--out", "report/one"]) == 2, "nothing is overwritten"


def test_the_tables_in_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, stopwatch: Any
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    stopwatch |= {("full", 2, None): (0.004, 0.002, 0.008), ("x]", 2, 5): (0.001, 0.003, 0.001)}
    full, visible = write_bundle(tmp_path / "full", token_mode="full"), write_bundle(tmp_path / "a[" / "x]")
    assert main(["benchmark", str(full), str(visible), "--keep", "5", "--batch-size", "2", *FEW]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()[:1] in ("1", "2")]
    assert lines[:4] == [
        ["1", str(full), "fp32", "onnxruntime", "2", str(N), "4.00", "1.000"],
        ["2", str(visible), "fp32", "onnxruntime", "2", "5", "1.00", "0.250"],
        ["1", "7.60", "7.92", "500.0", "1.00"],
        ["2", "2.80", "2.96", "2000.0", "4.00"],
    ]
    # No column for load time and memory, which nobody measured, nor for top-1, for which there are no labels.
    rate, share = 2 * FLOPS_OF_5 / 1e6, 2 * FLOPS_OF_5 / 1e6 / (4 * 2 * 768**3 / 0.002 / 1e9)
    size = (visible / "encoder.onnx").stat().st_size / 1e6
    assert lines[5][:5] == ["2", f"{FLOPS_OF_5 / 1e9:.3g}", f"{rate:.1f}", f"{100 * share:.0f}", "%"]
    assert lines[5][5:7] == ["weights", f"{size:.2f}"]
    assert [line[7:] for line in lines[4:]] == [["1.0000"], [f"{float(lines[5][7]):.4f}"]]


# --- TensorRT --------------------------------------------------------------------------------------------------------


class PlanOnCpu(OnnxRuntimeEngine):
    """Stands for an FP16 plan of one or two images, and of 2 to 5 patches."""

    name = "tensorrt"

    def __init__(self, graph: Path, options: EngineOptions) -> None:
        super().__init__(graph, options, precision="fp16", profiles=[{"B": (1, 2, 2), "K": (2, 3, 5)}])

    def _run(self, inputs: Mapping[str, Array], outputs: Any) -> dict[str, Array]:
        if len(inputs["images"]) > 2 or ("ids_keep" in inputs and not 2 <= inputs["ids_keep"].shape[1] <= 5):
            raise ConfigError("no profile holds it")
        return super()._run(inputs, outputs)


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_planned", lambda bundle, name, options, taps: PlanOnCpu(bundle.graph(), options))
    monkeypatch.setattr(
        reporting_machine,
        "gpus",
        lambda: [Gpu(index=0, name="Quick", compute_capability=(9, 0), memory_bytes=1, driver="12.4")],
    )


@pytest.mark.usefixtures("plans")
def test_plans_are_timed_at_the_sizes_that_they_were_built_for(
    tmp_path: Path, run: Callable[..., dict[str, Any]]
) -> None:
    full, visible = write_bundle(tmp_path / "full", token_mode="full"), write_bundle(tmp_path / "visible")
    report = run(
        full,
        visible,
        "--engine",
        "onnxruntime,tensorrt",
        "--keep",
        "5,7",
        "--batch-size",
        "2,4",
        "--out",
        tmp_path / "report",
    )
    on_plans = [row for row in report["rows"] if row["engine"] == "tensorrt"]
    assert [(Path(row["graph"]).name, row["batch"], row["patches"], row["precision"]) for row in on_plans] == [
        ("full", 2, N, "fp16"),
        ("visible", 2, 5, "fp16"),
    ]
    assert len(report["rows"]) == 2 + 2 + 4
    assert {left["why"] for left in report["left_out"]} == {"no profile holds it"}
    assert list(report["gemm_gflops"]) == ["onnxruntime"]
    assert [row["gemm_share"] for row in on_plans] == [None, None]
    assert [row["roofline"] for row in on_plans] == [None, None], "no GPU here tells its rates"
    assert all(row["gflops"] > 0 and row["cosine"] is not None for row in on_plans)
    assert on_plans[1]["speedup_over_full"] == pytest.approx(on_plans[0]["p50_ms"] / on_plans[1]["p50_ms"])
    assert report["machine"]["gpu"] == "Quick, CUDA 12.4"
    assert "| GPU | Quick, CUDA 12.4 |" in (tmp_path / "report" / "benchmark.md").read_text()


@pytest.mark.usefixtures("plans")
def test_files_of_others_run_on_an_engine_that_reads_them(tmp_path: Path, run: Callable[..., dict[str, Any]]) -> None:
    report = run(
        write_bundle(tmp_path / "full", token_mode="full"),
        "--engine",
        "trt",
        "--against",
        stranger(tmp_path / "other.onnx"),
    )
    assert keys(report, "engine", "precision") == [("tensorrt", "fp16"), ("onnxruntime", None)]
    assert list(report["gemm_gflops"]) == ["onnxruntime"]
