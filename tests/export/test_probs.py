"""A classifier's softmax as an output: proven on every engine, and read by every command that tells classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mae_deploy.cli import main
from mae_deploy.images.find import find_images
from mae_deploy.runtime import Backbone
from tests.data.image_folders import write_noise
from tests.export.tiny_exports import CLASS_NAMES, write_checkpoint
from tests.models.tiny_models import tiny_classifier, tiny_encoder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of the classifier, in folders of splits."""
    for split in ("train", "val"):
        for number, name in enumerate(CLASS_NAMES):
            write_noise(tmp_path / "photos" / split / name, 2, first=2 * number)
    return tmp_path / "photos"


@pytest.mark.parametrize(
    ("pool", "precision", "engine", "mode"),
    [
        ("avg", "fp32", "onnx", "full"),
        ("cls", "fp16", "onnx", "visible"),
        ("avg", "fp16", "openvino", "ragged"),
        ("cls", "bf16", "openvino", "full"),
    ],
)
def test_parity_on_every_engine(
    tmp_path: Path, photos: Path, pool: Any, precision: str, engine: str, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if engine == "openvino":
        pytest.importorskip("openvino")
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tiny_classifier(pool), licence="own")
    bundle = tmp_path / "bundle"
    more = ["--engine", engine, "--precision", precision, "--tokens", mode, "--samples", str(photos)]
    assert main(["export", str(checkpoint), "--out", str(bundle), "--outputs", "logits,probs", *more]) == 0
    capsys.readouterr()
    assert main(["verify", str(bundle), "--json"]) == 0
    assert {check["name"] for check in json.loads(capsys.readouterr().out)["outputs"]} == {"logits", "probs"}
    if (precision, engine) != ("bf16", "openvino"):
        assert main(["verify", str(bundle), "--engine", "onnxruntime"]) == 0
    with Backbone.load(bundle) as backbone:
        found = backbone([backbone.read(path) for path in find_images(photos)])
    assert found.probs.dtype == np.float32
    exponents = np.exp(found.logits - found.logits.max(axis=1, keepdims=True))
    np.testing.assert_allclose(found.probs, exponents / exponents.sum(axis=1, keepdims=True), atol=1e-6)  # FP32 softmax


def test_where_there_is_nothing_else_every_command_reads_classes_from_it(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_checkpoint(
        tmp_path / "checkpoint", tiny_classifier("avg"), licence="own", class_names=CLASS_NAMES
    )
    found: dict[str, list[Any]] = {}
    for output in ("logits", "probs"):
        bundle = tmp_path / output
        more = ["--outputs", output, "--samples", str(photos)]
        assert main(["export", str(checkpoint), "--out", str(bundle), *more]) == 0
        capsys.readouterr()
        found[output] = []
        for command in (
            ["predict", str(bundle), str(photos), "--top-k", "3"],
            ["eval", str(bundle), str(photos)],
            ["benchmark", str(bundle), "--images", str(photos / "val"), "--repeats", "1", "--no-probe"],
        ):
            assert main([*command, "--json"]) == 0
            found[output].append(json.loads(capsys.readouterr().out))
    (predicted, evaluated, timed), (from_logits, by_logits, timed_logits) = found["probs"], found["logits"]
    for row, other in zip(predicted["predictions"], from_logits["predictions"], strict=True):
        assert [entry["class"] for entry in row["classes"]] == [entry["class"] for entry in other["classes"]]
        # Probabilities are rounded to six digits.
        assert [entry["probability"] for entry in row["classes"]] == pytest.approx(
            [entry["probability"] for entry in other["classes"]], abs=2e-6
        )
    for key in ("top1", "top5", "classes"):
        assert evaluated[key] == by_logits[key]
    assert timed["rows"][0]["top1"] == timed_logits["rows"][0]["top1"] is not None


def test_encoders_have_none(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tiny_encoder(), licence="own")
    assert main(["export", str(checkpoint), "--out", str(tmp_path / "bundle"), "--outputs", "probs"]) == 2
    assert "error: this model has no output 'probs'" in capsys.readouterr().err
