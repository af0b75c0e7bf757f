"""The whole chain through the command line, on a few small images: every link reads what the link before it wrote."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mae_deploy.cli import main
from tests.data.image_folders import write_classes, write_noise

Command = Callable[..., dict[str, Any]]

# 3x2 patches of 5x5 pixels: nothing equals anything else.
RECIPE = """
model: {name: tiny, image_size: [15, 10], patch_size: 5, embed_dim: 12, depth: 2, num_heads: 3}
decoder: {decoder_depth: 1, decoder_embed_dim: 8, decoder_num_heads: 2}
optim: {batch_size: 5, lr: 1.0e-3, warmup_epochs: 0.5}
"""
TRAINING = ("--num-workers", 0, "--device", "cpu", "--seed", 3)
PLAIN = ("--drop-path", 0, "--label-smoothing", 0, "--mixup", 0, "--cutmix", 0, "--reprob", 0, "--auto-augment", "none")
STUDENT = ("--student", "vit_nano_patch4", "--patch-size", 5, "--batch-size", 5, "--lr", 1e-3, "--warmup-epochs", 0)


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command that must succeed, in a folder with `photos` and `labelled`; returns its JSON."""
    monkeypatch.chdir(tmp_path)
    write_noise(Path("photos"), 11)
    write_classes(Path("labelled"))
    Path("tiny.yaml").write_text(RECIPE)

    def run(*arguments: object) -> dict[str, Any]:
        assert main([*map(str, arguments), "--json"]) == 0, capsys.readouterr().err
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return run


def test_the_chain(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    # Pretrain, and look at it.
    pretrained = command("pretrain", "photos", "--out", "runs/mae", "--recipe", "tiny.yaml", "--epochs", 2, *TRAINING)
    assert (pretrained["steps"], pretrained["unreadable"]) == (4, 0)
    assert 0 < pretrained["last_loss"] < 10
    drawn = command(
        "reconstruct",
        "photos",
        "--checkpoint",
        "runs/mae",
        "--out",
        "pictures/grid.png",
        "--num-images",
        3,
        "--device",
        "cpu",
    )
    assert drawn["images"] == 3
    with Image.open("pictures/grid.png") as picture:
        # Three rows of three cells, 15x10 pixels enlarged ten times to at least 96, with gaps of four.
        assert picture.size == (3 * 104 - 4, 3 * 154 - 4)

    # Fine-tune it, and distil it: features without labels, then logits.
    tuned = command(
        "finetune",
        "labelled",
        "--init",
        "runs/mae",
        "--out",
        "runs/classifier",
        "--epochs",
        8,
        "--batch-size",
        6,
        "--lr",
        2e-2,
        *PLAIN,
        *TRAINING,
    )
    assert tuned["top1"] == 100, "dark and light are easily told apart"
    student = command(
        "distill", "photos", "--teacher", "runs/mae", "--out", "runs/student", "--epochs", 2, *STUDENT, *TRAINING
    )
    assert student["steps"] == 4
    distilled = command(
        *(
            "distill",
            "labelled",
            "--teacher",
            "runs/classifier",
            "--init",
            "runs/student",
            "--unlabelled",
            "photos",
            "--out",
            "runs/student-classifier",
        ),
        *("--epochs", 4, *STUDENT, *TRAINING),
    )
    assert distilled["steps"] == 4 * (23 // 5), "12 labelled images and 11 without labels"

    # Export: full, any number of patches, exactly two.
    full = command(
        "export", "runs/student-classifier", "--out", "bundles/classifier", "--engine", "onnx", "--tokens", "full"
    )
    assert full["samples"] == "6 images of labelled/val"
    assert [row["name"] for row in full["parity"]] == ["logits", "pooled"]
    visible = command("export", "runs/student", "--out", "bundles/visible", "--tokens", "visible", "--num-samples", 5)
    assert (visible["samples"], visible["licence"]) == ("5 images of photos", "own")
    command(
        "export", "runs/mae", "--out", "bundles/visible-2", "--tokens", "visible:2", "--batch", 1, "--samples", "photos"
    )
    pixels = command(
        "export",
        "runs/mae",
        "--out",
        "bundles/decoder",
        "--tokens",
        "reconstruct",
        "--pixels",
        "image",
        "--precision",
        "fp16",
    )
    assert (pixels["samples"], [row["name"] for row in pixels["parity"]]) == ("11 images of photos", ["pixels"])

    # Verify and run.
    tokens = ["cls", "tokens", "pooled"]
    for name, outputs in (
        ("classifier", ["logits", "pooled"]),
        ("visible", tokens),
        ("visible-2", tokens),
        ("decoder", ["pixels"]),
    ):
        verified = command("verify", f"bundles/{name}")
        assert verified["passed"] is True
        assert [row["name"] for row in verified["outputs"]] == outputs
    predicted = command("predict", "bundles/classifier", "labelled/val", "--top-k", 1)
    right = [Path(row["path"]).parent.name == row["classes"][0]["class"] for row in predicted["predictions"]]
    assert len(right) == 6
    # What PyTorch measured on these images for the best checkpoint is what the graph does with their files.
    assert sum(right) / len(right) * 100 == pytest.approx(distilled["best_top1"])
    written = command("predict", "bundles/visible", "photos", "--num-keep", 2, "--out", "features.npz")
    assert written["outputs"] == {"cls": [11, 64], "pooled": [11, 64]}
    with np.load("features.npz") as archive:
        assert archive["paths"].tolist() == [f"photos/{number:02d}.png" for number in range(11)]
    rows = main(
        [
            "benchmark",
            "bundles/classifier",
            "bundles/visible",
            "--repeats",
            "2",
            "--warmup",
            "0",
            "--no-probe",
            "--json",
        ]
    )
    assert rows == 0
    assert [row["patches"] for row in json.loads(capsys.readouterr().out)["rows"]] == [6, 1]

    # Whoever holds the bundle knows where it came from.
    record = command("info", "bundles/classifier")["provenance"]["checkpoint"]
    assert (record["stage"], record["objective"], record["metrics"]) == (
        "distill",
        "logits",
        {"top1": distilled["best_top1"]},
    )
    assert (record["teacher"]["stage"], record["teacher"]["parent"]["stage"]) == ("finetune", "pretrain")
    assert (record["parent"]["stage"], record["parent"]["objective"], record["parent"]["teacher"]["stage"]) == (
        "distill",
        "features",
        "pretrain",
    )
    assert command("info", "runs/student-classifier")["provenance"]["teacher"] == record["teacher"]

    # Weights alone come back through import, with a licence that the bundle inherits.
    shutil.copy("runs/mae/checkpoints/last/model.safetensors", "weights.safetensors")
    imported = command(
        *(
            "import",
            "weights.safetensors",
            "--out",
            "checkpoints/imported",
            "--image-size",
            "15,10",
            "--num-heads",
            3,
            "--decoder-num-heads",
            2,
        ),
        *("--license", "CC-BY-NC-4.0"),
    )
    assert (imported["kind"], imported["missing"], imported["unexpected"]) == ("mae", [], [])
    again = command(
        "export",
        "checkpoints/imported",
        "--out",
        "bundles/imported",
        "--tokens",
        "visible:2",
        "--batch",
        1,
        "--samples",
        "photos",
    )
    assert again["licence"] == "CC-BY-NC-4.0"
    for name in ("visible-2", "imported"):
        command("predict", f"bundles/{name}", "photos", "--num-keep", 2, "--out", f"{name}.npz")
    with np.load("visible-2.npz") as one, np.load("imported.npz") as other:
        for output in one.files:
            np.testing.assert_array_equal(one[output], other[output])

    # What is damaged on the way is refused, and nothing is left half-written.
    with open("bundles/classifier/encoder.onnx", "ab") as file:
        file.write(b"\0")
    for arguments in (["verify", "bundles/classifier"], ["predict", "bundles/classifier", "photos"]):
        assert main(arguments) == 1
        assert "is not the file that was exported" in capsys.readouterr().err
    assert list(Path().rglob(".partial-*")) == []
