"""`mae-deploy eval`: a checkpoint and its bundle get the same right, classes are matched by name, and a bundle needs no
torch.
"""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mae_deploy.cli import main
from mae_deploy.export.config import ExportConfig
from mae_deploy.export.run import run_export
from mae_deploy.images.find import find_images
from mae_deploy.images.read import read_image
from mae_deploy.runtime import Backbone
from tests.data.image_folders import spoil, write_noise
from tests.export.tiny_exports import CLASS_NAMES
from tests.models.tiny_models import ENCODER
from tests.test_cli import TRAINING, run_without

NUM_PATCHES = ENCODER.num_patches
NAMES = CLASS_NAMES[:4]


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """`val/` with 5, 4, 3 and 2 images of four of the eleven classes."""
    for index, name in enumerate(NAMES):
        write_noise(tmp_path / "data" / "val" / name, 5 - index, first=10 * index, low=40 * index)
    return tmp_path / "data"


def evaluate(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    assert main(["eval", *map(str, arguments), "--num-workers", "0", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def by_hand(bundle: Path, folder: Path) -> tuple[float, float]:
    """Top-1 and top-5 from the runtime's logits, image by image."""
    backbone = Backbone.load(bundle)
    first = five = count = 0
    for name in NAMES:
        for path in find_images(folder / name):
            ranked = np.argsort(-backbone([read_image(path)]).logits[0])
            first += CLASS_NAMES[ranked[0]] == name
            five += name in [CLASS_NAMES[index] for index in ranked[:5]]
            count += 1
    return 100 * first / count, 100 * five / count


def test_a_checkpoint_and_its_bundle(
    exported: Path, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, checkpoint = exported / "classifier", exported / "checkpoints" / "classifier"
    found = evaluate(capsys, bundle, labelled, "--batch-size", "3", "--confusion", tmp_path / "bundle.csv")
    other = evaluate(
        capsys, checkpoint, labelled, "--batch-size", "4", "--device", "cpu", "--confusion", tmp_path / "checkpoint.csv"
    )
    same = ("images", "top1", "top5", "classes", "unreadable", "data")
    assert {key: found[key] for key in same} == {key: other[key] for key in same}
    assert (found["top1"], found["top5"]) == by_hand(bundle, labelled / "val")
    assert 0 < found["top5"] < 100  # the test can tell
    assert (found["on"], other["on"]) == ("fp32 on onnxruntime", "torch on cpu")
    assert {name: entry["images"] for name, entry in found["classes"].items()} == {
        **dict.fromkeys(CLASS_NAMES, 0),
        **dict(zip(NAMES, (5, 4, 3, 2), strict=True)),
    }
    assert found["classes"][CLASS_NAMES[-1]]["top1"] is None
    assert (tmp_path / "bundle.csv").read_text() == (tmp_path / "checkpoint.csv").read_text()
    with (tmp_path / "bundle.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["true class", *CLASS_NAMES]
    assert [sum(map(int, row[1:])) for row in rows] == [5, 4, 3, 2, *[0] * 7]
    right = sum(int(row[1 + index]) for index, row in enumerate(rows))
    assert 100 * right / 14 == pytest.approx(found["top1"])


@pytest.fixture(scope="module")
def visible(exported: Path) -> Path:
    """The classifier as a graph of some patches."""
    out = exported / "visible-classifier"
    run_export(
        ExportConfig(
            checkpoint=exported / "checkpoints" / "classifier", out=out, tokens="visible", samples=exported / "photos"
        )
    )
    return out


def test_shares_of_the_patches(
    exported: Path, visible: Path, labelled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint and its bundle see the same patches, in batches of any size; all of them are what `eval` sees
    anyway.
    """
    shares = ("--keep-ratio", "1,0.5,0.2")
    found = evaluate(capsys, visible, labelled, *shares, "--batch-size", "3")
    other = evaluate(
        capsys, exported / "checkpoints" / "classifier", labelled, *shares, "--batch-size", "4", "--device", "cpu"
    )
    assert found["keep_ratios"] == other["keep_ratios"]
    whole = evaluate(capsys, exported / "classifier", labelled)
    rows = found["keep_ratios"]
    assert [(row["keep_ratio"], row["patches"]) for row in rows] == [
        (1, NUM_PATCHES),
        (0.5, NUM_PATCHES // 2),
        (0.2, NUM_PATCHES // 5),
    ]
    assert (rows[0]["top1"], rows[0]["top5"]) == (whole["top1"], whole["top5"]) == (found["top1"], found["top5"])
    assert len({row["top5"] for row in rows}) > 1  # patches matter to this network
    assert rows[2] == evaluate(capsys, visible, labelled, "--keep-ratio", "0.2")["keep_ratios"][0]
    assert rows[1:] != evaluate(capsys, visible, labelled, *shares, "--seed", "5")["keep_ratios"][1:]


def test_a_table_of_shares(visible: Path, labelled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(visible), str(labelled), "--keep-ratio", "1,0.2"]) == 0
    out = capsys.readouterr().out
    assert "patches kept" in out
    assert f" {NUM_PATCHES // 5} " in out


def test_shares_that_cannot_be_seen(
    exported: Path, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for asked, message in (
        (["--keep-ratio", "0.5"], "this bundle's graph takes whole images"),
        (["--keep-ratio", "0"], "each of --keep-ratio must be above 0 and at most 1, got 0.0"),
        (["--keep-ratio", ""], "--keep-ratio '' must be at least one share"),
        (["--keep-ratio", "1,0.5", "--confusion", str(tmp_path / "matrix.csv")], "is of one --keep-ratio"),
    ):
        assert main(["eval", str(exported / "classifier"), str(labelled), *asked]) == 2
        assert message in capsys.readouterr().err


def test_a_graph_of_fixed_patches(
    exported: Path, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it takes is said as an option that gives it."""
    keep = 4
    checkpoint = exported / "checkpoints" / "classifier"
    run_export(
        ExportConfig(
            checkpoint=checkpoint, out=tmp_path / "fixed", tokens=f"visible:{keep}", samples=exported / "photos"
        )
    )
    for asked in ([], ["--keep-ratio", "1,0.1"]):
        assert main(["eval", str(tmp_path / "fixed"), str(labelled), *asked]) == 2
        error = capsys.readouterr().err
        assert f"this bundle's graph takes {keep} of {NUM_PATCHES} patches" in error
    (row,) = evaluate(capsys, tmp_path / "fixed", labelled, *error.split("such as ")[1].split())["keep_ratios"]
    assert row["patches"] == keep


def test_classes_at_the_top_of_the_folder(exported: Path, labelled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = evaluate(capsys, exported / "classifier", labelled)
    found = evaluate(capsys, exported / "classifier", labelled / "val")
    assert (found["images"], found["top5"]) == (14, whole["top5"])


def test_unreadable_images_are_named_and_left_out(
    exported: Path, labelled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = spoil(labelled / "val" / NAMES[1] / "11.png")
    both = [evaluate(capsys, exported / path, labelled) for path in ("classifier", "checkpoints/classifier")]
    for found in both:
        assert found["images"] == 13
        assert found["classes"][NAMES[1]]["images"] == 3
        assert [line.startswith(str(broken)) for line in found["unreadable"]] == [True]
    for path in find_images(labelled):
        path.write_bytes(b"")
    for model in ("classifier", "checkpoints/classifier"):
        assert main(["eval", str(exported / model), str(labelled), "--num-workers", "0"]) == 1
        assert "no readable image" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["classifier", "checkpoints/classifier"])
def test_classes_that_are_not_the_classifiers(
    exported: Path, labelled: Path, capsys: pytest.CaptureFixture[str], model: str
) -> None:
    (labelled / "val" / NAMES[0]).rename(labelled / "val" / "zebra")
    assert main(["eval", str(exported / model), str(labelled)]) == 2
    error = capsys.readouterr().err
    assert "zebra is not one of the 11 classes: class-a" in error


@pytest.mark.parametrize("kind", ["bundle", "checkpoint"])
def test_two_classes_of_one_name_are_not_counted_as_one(
    exported: Path, labelled: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source, file = {
        "bundle": ("classifier", "manifest.json"),
        "checkpoint": ("checkpoints/classifier", "metadata.json"),
    }[kind]
    shutil.copytree(exported / source, tmp_path / "twice")
    metadata = json.loads((tmp_path / "twice" / file).read_text())
    metadata["class_names"][4] = metadata["class_names"][1]
    (tmp_path / "twice" / file).write_text(json.dumps(metadata))
    assert main(["eval", str(tmp_path / "twice"), str(labelled)]) == 2
    assert f"error: the classifier calls the classes 1 and 4 '{NAMES[1]}'" in capsys.readouterr().err


def test_without_names_there_is_a_folder_for_each_class(
    exported: Path, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(exported / "checkpoints" / "classifier", tmp_path / "nameless")
    file = tmp_path / "nameless" / "metadata.json"
    metadata = json.loads(file.read_text())
    file.write_text(json.dumps({**metadata, "class_names": None}))
    assert main(["eval", str(tmp_path / "nameless"), str(labelled)]) == 2
    assert "has 4 classes, the classifier 11" in capsys.readouterr().err
    for name in CLASS_NAMES[4:]:
        write_noise(labelled / "val" / name, 1)
    found = evaluate(capsys, tmp_path / "nameless", labelled)
    assert found["images"] == 21
    assert found["top5"] == evaluate(capsys, exported / "classifier", labelled)["top5"]


@pytest.mark.parametrize(
    ("model", "message"), [("encoder", "has no logits"), ("checkpoints/encoder", "is a encoder without a head")]
)
def test_an_encoder_has_nothing_to_evaluate(
    exported: Path, labelled: Path, capsys: pytest.CaptureFixture[str], model: str, message: str
) -> None:
    assert main(["eval", str(exported / model), str(labelled)]) == 2
    assert message in capsys.readouterr().err


def test_a_confusion_matrix_is_not_overwritten(
    exported: Path, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there.csv").write_text("mine")
    assert main(["eval", str(exported / "classifier"), str(labelled), "--confusion", str(tmp_path / "there.csv")]) == 2
    assert (tmp_path / "there.csv").read_text() == "mine"
    assert main(["eval", str(exported / "classifier"), str(labelled), "--confusion", str(tmp_path / "matrix.png")]) == 2
    assert "must end in .csv" in capsys.readouterr().err


def test_a_bundle_needs_no_torch(exported: Path, labelled: Path) -> None:
    done = run_without(TRAINING, "eval", str(exported / "classifier"), str(labelled), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["images"] == 14
    done = run_without(TRAINING, "eval", str(exported / "checkpoints" / "classifier"), str(labelled))
    assert done.returncode == 3
    assert "mae-deploy[train]" in done.stderr
