"""`mae-deploy verify` as it is typed: 0 for what was exported, 1 for anything else, and what was found is printed
either way.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from mae_deploy.cli import main
from mae_deploy.errors import MissingDependency
from mae_deploy.runtime import verify
from mae_deploy.runtime.alone import Died
from mae_deploy.runtime.layers import LayerReport
from mae_deploy.runtime.tensorrt import api as tensorrt_api
from tests.commands.test_doctor import run_with, write_module
from tests.data.image_folders import write_noise
from tests.export.tiny_exports import write_checkpoint
from tests.models.tiny_models import tiny_encoder
from tests.reporting.printed import cells
from tests.runtime.tiny_bundle import rehash, write_bundle
from tests.test_cli import TRAINING, run_without

TRIALS = ("K=1", "K=15", "black, white, noise")
FORMS = ("run again", "permuted ids_keep", "sorted ids_keep", "sample alone", "other batches", "largest batch")
SHOWN = ("golden", *TRIALS, *FORMS)
"""Of these each output has a row."""
OUTPUTS = ("cls", "tokens", "pooled")


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    """An exported encoder of its own, in a folder whose name is no valid markup."""
    return Path(shutil.copytree(exported / "encoder", tmp_path / "a[" / "x]"))


def perturb(bundle: Path, weight: str = "blocks.1.mlp.fc2.weight", by: float = 0.01) -> None:
    """Change one number of one weight, and make the hashes right again."""
    model = onnx.load(bundle / "encoder.onnx")
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == weight)
    values = numpy_helper.to_array(tensor).copy()
    values.flat[3] += by
    tensor.CopyFrom(numpy_helper.from_array(values, weight))
    onnx.save(model, bundle / "encoder.onnx")
    rehash(bundle)


# --- what was exported -----------------------------------------------------------------------------------------------


def test_what_was_exported_passes(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["verify", str(bundle)]) == 0
    captured = capsys.readouterr()
    assert captured.err == f"Next: mae-deploy predict '{bundle}' IMAGES\n"
    assert captured.out.startswith(f"{bundle} on onnxruntime {onnxruntime.__version__} (cpu), 8 samples\n")
    found = cells(captured.out)
    checked = [[check, output] for check in SHOWN for output in OUTPUTS]
    before = [["as exported", output] for output in OUTPUTS]  # on this machine
    assert [row[:2] for row in found] == [*checked, *before, ["preprocessing", "frame"]]
    assert {row[-1] for row in found} == {"ok"}


@pytest.mark.parametrize(("tokens", "then"), [("cached", "stream VIDEO {}"), ("cached:3", "benchmark {}")])
def test_a_stream_is_what_comes_next_of_a_cached_bundle(
    tmp_path: Path, tokens: str, then: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tiny_encoder())
    assert main(["export", str(checkpoint), "--out", str(tmp_path / "b"), "--tokens", tokens]) == 0
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "b")]) == 0
    assert capsys.readouterr().err == f"Next: mae-deploy {then.format(tmp_path / 'b')}\n"


def test_json(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(bundle), "--json", "--threads", "1"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    found = json.loads(captured.out)
    assert (found["passed"], found["bundle"], found["num_samples"], found["failures"]) == (True, str(bundle), 8, [])
    assert [(row["check"], row["name"]) for row in found["outputs"]] == [("golden", output) for output in OUTPUTS]
    # Three orders of magnitude inside the tolerance: float32's own noise.
    assert all(row["passed"] and row["cosine"] > 0.999999 and row["max_abs"] < 1e-5 for row in found["outputs"])
    assert [row["check"] for row in found["trials"]] == [name for name in TRIALS for _ in OUTPUTS]
    assert len(found["invariances"]) == len(FORMS) * len(OUTPUTS)


def test_without_the_training_packages(bundle: Path) -> None:
    done = run_without(TRAINING, "verify", str(bundle), "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["passed"] is True


# --- files that are not what was exported ----------------------------------------------------------------------------


def never(*_: Any, **__: Any) -> None:
    pytest.fail("a file was parsed before its hash was checked")


@pytest.mark.parametrize("name", ["encoder.onnx", "golden.npz"])
def test_a_tampered_file_is_1_before_anything_is_parsed(
    bundle: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)
    monkeypatch.setattr(onnxruntime, "InferenceSession", never)
    monkeypatch.setattr(np, "load", never)
    assert main(["verify", str(bundle)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    error, hint = captured.err.splitlines()
    assert error.startswith(f"error: {bundle / name} is not the file that was exported: expected SHA-256 ")
    assert hint == "hint: copy the bundle again, or export it again"


def test_the_spies_stand_where_files_are_parsed(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def watch(module: Any, name: str) -> None:
        original = getattr(module, name)

        def spy(*given: Any, **named: Any) -> Any:
            seen.append(name)
            return original(*given, **named)

        monkeypatch.setattr(module, name, spy)

    watch(onnxruntime, "InferenceSession")
    watch(np, "load")
    assert main(["verify", str(bundle)]) == 0
    assert seen == ["InferenceSession", "load"]


def test_a_missing_file(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (bundle / "golden.npz").unlink()
    assert main(["verify", str(bundle)]) == 1
    assert capsys.readouterr().err.startswith(f"error: {bundle / 'golden.npz'} is missing\nhint: ")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema_version": 99}'])
def test_a_broken_manifest(bundle: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    (bundle / "manifest.json").write_text(content)
    assert main(["verify", str(bundle)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert len(captured.err.splitlines()) <= 2


# --- graphs that compute something else ------------------------------------------------------------------------------


def test_other_weights_under_the_right_hash(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    perturb(bundle)
    assert main(["verify", str(bundle)]) == 1
    captured = capsys.readouterr()
    results = {(row[0], row[1]): row[-1] for row in cells(captured.out)}
    assert {output for check, output in results if check == "golden" and results[check, output] == "miss"} == set(
        OUTPUTS
    )
    assert {result for (check, _), result in results.items() if check in FORMS} == {"ok"}
    assert captured.err.startswith(f"error: {bundle} misses parity: golden: cls: ")
    assert len(captured.err.splitlines()) == 1


def test_a_miss_in_json(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    perturb(bundle)
    assert main(["verify", str(bundle), "--json"]) == 1
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["passed"] is False
    assert [row["passed"] for row in found["outputs"]] == [False] * 3
    assert len(found["failures"]) > len(OUTPUTS)
    assert captured.err.count("golden: ") == len(OUTPUTS)  # what follows from that is in the table


def test_not_a_number_in_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(write_bundle(tmp_path / "bundle", flaw="nan")), "--json"]) == 1

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is no JSON")

    found = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert {row["max_abs"] for row in found["outputs"]} == {None}
    assert "NaN or infinite" in found["outputs"][0]["reason"]


# --- block by block --------------------------------------------------------------------------------------------------


def blocks_of(printed: str) -> list[list[str]]:
    """The rows of the table of blocks."""
    return [row for row in cells(printed.partition("after each block")[2]) if len(row) > 1]


def test_layers(bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["verify", str(bundle), "--layers"]) == 0
    printed = capsys.readouterr().out
    blocks = blocks_of(printed)
    assert [row[0] for row in blocks] == ["0", "1"]
    assert blocks[0][5] == "-"
    assert all(float(row[4]) > 80 and len(row) == 7 for row in blocks)
    assert printed.splitlines()[-1] == "no block is below 80 dB"
    assert len(cells(printed.partition("after each block")[0])) == (len(SHOWN) + 1) * len(OUTPUTS) + 1


def test_the_block_that_loses_precision_is_named(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    perturb(bundle, "blocks.1.mlp.fc2.weight")
    assert main(["verify", str(bundle), "--layers"]) == 1
    captured = capsys.readouterr()
    assert [row[7:] for row in blocks_of(captured.out)] == [[], ["here"]]
    assert captured.out.splitlines()[-1].startswith("precision is lost in block 1, the first below 80 dB: ")
    assert "precision is lost" not in captured.err, "the exit code is that of the outputs"


def test_layers_in_json_without_the_training_packages(bundle: Path) -> None:
    perturb(bundle, "blocks.0.mlp.fc2.weight")
    done = run_without(TRAINING, "verify", str(bundle), "--layers", "--json")
    assert done.returncode == 1
    layers = json.loads(done.stdout)["layers"]
    assert (layers["lost_at"], layers["floor_db"], layers["num_samples"]) == (0, 80, 2)
    assert [row["block"] for row in layers["blocks"]] == [0, 1]
    assert {"cosine", "centred_cosine", "sqnr_db", "max_abs", "peak", "drop_db"} <= set(layers["blocks"][0])


def test_a_block_that_overflows_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_bundle(tmp_path / "bundle", flaw="block")
    assert main(["verify", str(path), "--layers", "--json"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["layers"]["blocks"][1]["peak"] is None
    assert "precision is lost in block 1: the output has " in captured.err


def test_a_block_that_overflows_is_1_although_the_outputs_pass(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LayerReport, "broken", property(lambda report: report.layers[1]))
    assert main(["verify", str(bundle), "--layers"]) == 1
    assert capsys.readouterr().err.startswith(f"error: {bundle} misses parity: ")


def test_a_bundle_without_block_outputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_bundle(tmp_path / "bundle", change=lambda manifest: manifest["graph"].update(blocks=[]))
    assert main(["verify", str(path)]) == 0
    capsys.readouterr()
    assert main(["verify", str(path), "--layers"]) == 2
    assert (
        capsys.readouterr().err
        == f"error: the bundle {path} holds no outputs of its blocks\nhint: export the bundle again\n"
    )


# --- usage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--engine", "abacus"], 2, "unknown engine 'abacus'"),
        (["--engine", "trt"], 3, "no NVIDIA driver"),
        (["--threads", "0"], 2, "--threads must be at least 1 and at most 4096, got 0"),
        (["--device", "cuda"], 3, "this ONNX Runtime cannot use CUDA"),
    ],
)
def test_what_cannot_be_done_here(
    bundle: Path,
    arguments: list[str],
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def no_gpu(_: int) -> None:
        raise MissingDependency("there is no NVIDIA driver")

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(tensorrt_api, "require_gpu", no_gpu)
    assert main(["verify", str(bundle), *arguments]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err.splitlines()[0]


def test_no_bundle_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path / "a[/x]")]) == 2
    assert capsys.readouterr().err.startswith(f"error: no bundle at {tmp_path / 'a[/x]'}: there is no manifest.json\n")


def test_nan_is_said_with_the_block_where_it_begins_and_a_line_an_output(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    perturb(bundle, by=float("nan"))
    assert main(["verify", str(bundle), "--json"]) == 1
    captured = capsys.readouterr()
    first, *rest = captured.err.splitlines()
    assert first.startswith(
        f"error: {bundle} misses parity: block 1 is the first with NaN or infinite values, after a largest value of "
    )
    assert [line.split(":")[2] for line in rest] == [f" {output}" for output in OUTPUTS]
    assert len(json.loads(captured.out)["failures"]) > len(OUTPUTS), "what follows from it is in the result"


# --- an engine that dies ---------------------------------------------------------------------------------------------

CRASH = "import ctypes; ctypes.string_at(0)"


@pytest.mark.parametrize("engine", ["ov", "auto"])
def test_an_engine_that_dies_is_a_line_and_an_exit_code(bundle: Path, tmp_path: Path, engine: str) -> None:
    """OpenVINO 2026.4 dies of SIGSEGV where it compiles some small graphs."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps({**manifest, "engine": "openvino"}))
    write_module(tmp_path / "site", "openvino", CRASH)
    done = run_with(tmp_path / "site", "verify", str(bundle), "--engine", engine, "--json")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        "error: openvino cannot run this graph: its process dies of SIGSEGV\n"
        "hint: use another engine, such as onnxruntime, or another version of this one\n"
    )


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_an_export_whose_engine_dies_leaves_nothing(
    exported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    precision: str,
) -> None:
    def die(*_: object) -> None:
        raise Died("dies of SIGSEGV")

    monkeypatch.setattr(verify, "run_alone", die)
    write_noise(tmp_path / "photos", 128 if precision == "int8" else 1)
    (tmp_path / "out").mkdir()
    line = ["export", str(exported / "checkpoints" / "encoder"), "--out", str(tmp_path / "out" / "b")]
    int8 = ["--precision", precision, "--calib-data", str(tmp_path / "photos")] if precision == "int8" else []
    assert main([*line, "--engine", "openvino", *int8, "--num-samples", "2"]) == 1
    assert "error: openvino cannot run this graph: its process dies of SIGSEGV\n" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []
