"""`mae-deploy info` says what a path is, whichever link of the chain it is."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from mae_deploy.checkpoint import save_checkpoint
from mae_deploy.cli import main
from mae_deploy.models.config import EncoderConfig
from mae_deploy.models.vit import Encoder
from tests.models.tiny_models import CLASSES, fill, metadata_of, tiny_classifier, write_original
from tests.runtime.tensorrt.planned_bundle import planned
from tests.runtime.tiny_bundle import write_bundle

PROVENANCE = {
    "stage": "distill",
    "teacher": {"stage": "finetune", "parent": {"stage": "import"}},
    "parent": {"stage": "pretrain"},
}


def info(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["info", str(path), "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    found: dict[str, Any] = json.loads(captured.out)
    return found


def shown(path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["info", str(path)]) == 0
    return capsys.readouterr().out


def checkpoint(folder: Path) -> Path:
    model = tiny_classifier("cls")
    save_checkpoint(
        folder,
        model.state_dict(),
        metadata_of(model, licence="CC-BY-NC-4.0", provenance=PROVENANCE, metrics={"top1": 0.75}, step=17),
    )
    return folder


def test_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint(tmp_path / "checkpoint")
    data = info(folder, capsys)
    assert (data["type"], data["path"], data["kind"], data["num_classes"], data["step"]) == (
        "checkpoint",
        str(folder),
        "classifier",
        CLASSES,
        17,
    )
    assert (data["licence"], data["metrics"], data["provenance"]) == ("CC-BY-NC-4.0", {"top1": 0.75}, PROVENANCE)
    assert info(folder / "model.safetensors", capsys) == data
    printed = shown(folder, capsys, monkeypatch)
    for expected in (
        "tiny, 3x6x10, patch 2, 20 wide, 2 blocks, 5 heads",
        "CC-BY-NC-4.0",
        "distill (teacher: finetune < import) < pretrain",
        "17",
    ):
        assert expected in printed, expected


@pytest.mark.parametrize("length", [0, 6, -1, None], ids=["empty", "in the length", "in the last weight", "missing"])
@pytest.mark.parametrize("kind", ["checkpoint", "bundle"])
def test_a_file_that_is_not_whole(
    tmp_path: Path, kind: str, length: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint(tmp_path / "x") if kind == "checkpoint" else write_bundle(tmp_path / "x")
    file = folder / ("model.safetensors" if kind == "checkpoint" else "encoder.onnx")
    if length is None:
        file.unlink()
    else:
        os.truncate(file, length % file.stat().st_size)
    assert main(["info", str(folder)]) == 1
    found = capsys.readouterr()
    assert str(file) in found.err
    assert not found.out


def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = checkpoint(tmp_path / "run" / "checkpoints" / "last")
    (tmp_path / "run" / "environment.json").write_text(json.dumps({"torch": "2"}))
    data = info(tmp_path / "run", capsys)
    assert (data["type"], data["path"], data["environment"]) == ("run", str(last), {"torch": "2"})


def test_a_run_without_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    assert main(["info", str(tmp_path)]) == 2
    assert "is a run without a checkpoint yet" in capsys.readouterr().err


def test_a_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def keep_the_record(manifest: dict[str, Any]) -> None:
        manifest["provenance"] = {"checkpoint": PROVENANCE}
        manifest["engine"] = "tensorrt"
        manifest["parity"] = {"onnx-fp32": {"engine": "onnxruntime"}}

    bundle = write_bundle(tmp_path / "bundle", keep=4, batch=2, change=keep_the_record)
    data = info(bundle, capsys)
    assert (data["type"], data["path"], data["token_mode"], data["keep"], data["licence"]) == (
        "bundle",
        str(bundle),
        "visible",
        4,
        "Apache-2.0",
    )
    printed = shown(bundle, capsys, monkeypatch)
    assert "made for tensorrt" in " ".join(printed.split())
    assert "checked on onnxruntime" in " ".join(printed.split())
    for expected in (
        "visible, K = 4",
        "Apache-2.0",
        "distill (teacher: finetune < import) < pretrain",
        "cls, tokens, pooled, logits",
        "tiny, 3x6x14, patch 2",
    ):
        assert expected in printed, expected


def test_what_a_bundle_was_checked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = write_bundle(
        tmp_path / "bundle", token_mode="ragged", batch=2, precision="int8", images="uint8", profile_keep=(2, 5, 9)
    )
    printed = " ".join(shown(bundle, capsys, monkeypatch).split())
    for expected in (
        "ragged",
        "B = 2, K = 2 to 9, usually 5",
        "onnxruntime",
        "int8, chosen by the engine",
        "policy dynamic",
        "uint8, normalised in the graph",
    ):
        assert expected in printed, expected


def test_the_engines_of_a_bundle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = planned(tmp_path / "bundle").path
    assert [entry["gpu"] for entry in info(bundle, capsys)["engines"]] == ["Orin"]
    assert "fp16, TensorRT 10.3.0, Orin, B:1,8,32 K:1,4,21, 0.50 ms" in " ".join(
        shown(bundle, capsys, monkeypatch).split()
    )


def test_a_bundle_without_a_record_of_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert info(write_bundle(tmp_path / "bundle"), capsys)["provenance"] == {"checkpoint": "none"}


def test_a_weights_file_of_the_original(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = fill(Encoder(EncoderConfig(name="vit_nano_patch4", image_size=(12, 12))))
    data = info(write_original(tmp_path / "mae_pretrain_vit_base.pth", model.state_dict()), capsys)
    assert (data["type"], data["kind"], data["model"], data["image_size"], data["licence"]) == (
        "weights",
        "encoder",
        "vit_nano_patch4",
        [12, 12],
        "CC-BY-NC-4.0",
    )


@pytest.mark.parametrize("name", ["absent", "folder"])
def test_nothing_that_we_know(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "folder").mkdir()
    assert main(["info", str(tmp_path / name)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / name} is not a run, checkpoint, weights file or bundle\n"


def test_a_file_that_is_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    assert main(["info", str(tmp_path / "notes.txt")]) == 1
    assert "notes.txt" in capsys.readouterr().err
