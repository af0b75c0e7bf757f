"""`mae-deploy import` as it is typed: a checkpoint of ours and a report, or one line and nothing written."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch

from mae_deploy.checkpoint import open_checkpoint, save_checkpoint
from mae_deploy.cli import main
from mae_deploy.config import from_dict
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.models.config import ObjectiveConfig
from mae_deploy.models.mae import MaskedAutoencoder
from mae_deploy.models.vit import Classifier
from mae_deploy.weights.load import load_model
from tests.data.image_folders import write_noise
from tests.models.tiny_models import (
    CLASSES,
    DECODER,
    ENCODER,
    SQUARE,
    fill,
    metadata_of,
    random_images,
    tiny_classifier,
    tiny_encoder,
    tiny_mae,
    write_original,
)

HEADS = ["--num-heads", "5", "--decoder-num-heads", "3"]


def test_an_original_checkpoint_becomes_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "mae_pretrain_vit_base.pth", tmp_path / "deep" / "checkpoint"
    model = tiny_mae(SQUARE, norm_pix_loss=False)
    write_original(source, model.state_dict(), norm_pix_loss=False)
    assert main(["import", str(source), "--out", str(out), *HEADS, "--json"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert captured.err == ""
    assert (report["source"], report["out"], report["kind"], report["licence"]) == (
        str(source),
        str(out),
        "mae",
        "CC-BY-NC-4.0",
    )
    assert (report["tensors"], report["missing"], report["unexpected"], report["reshaped"]) == (
        len(model.state_dict()),
        [],
        [],
        [],
    )
    read, loaded = load_model(out)
    assert all(torch.equal(tensor, read.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert (loaded.metadata.licence, loaded.metadata.norm_pix_loss) == ("CC-BY-NC-4.0", False)
    assert loaded.record["source"] == "mae_pretrain_vit_base.pth"


def test_the_report_for_people(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    source = write_original(tmp_path / "weights.pth", tiny_mae(SQUARE).state_dict())
    assert main(["import", str(source), "--out", str(tmp_path / "out"), *HEADS, "--image-size", "6,14"]) == 0
    printed = capsys.readouterr().out
    for expected in (
        "original or timm",
        "pos_embed: interpolated from 5x5 to 3x7 patches",
        "unspecified",
        "vit_20x2_patch2",
    ):
        assert expected in printed, expected


def test_a_classifier_runs_after_import(tmp_path: Path) -> None:
    model, images = tiny_classifier("avg"), random_images()
    source = write_original(tmp_path / "finetuned.pth", model.state_dict())
    assert (
        main(
            ["import", str(source), "--out", str(tmp_path / "out"), *HEADS, "--image-size", "6,10", "--license", "MIT"]
        )
        == 0
    )
    read, loaded = load_model(tmp_path / "out")
    assert isinstance(read, Classifier)
    with torch.no_grad():
        assert torch.equal(read(images), model(images))
    assert (loaded.metadata.licence, loaded.metadata.num_classes) == ("MIT", CLASSES)


@pytest.mark.parametrize(
    ("flag", "expected"), [((), False), (("--norm-pix-loss",), True), (("--no-norm-pix-loss",), False)]
)
def test_norm_pix_loss(tmp_path: Path, flag: tuple[str, ...], expected: bool) -> None:
    source = write_original(tmp_path / "weights.pth", tiny_mae(SQUARE).state_dict(), norm_pix_loss=False)
    assert main(["import", str(source), "--out", str(tmp_path / "out"), *HEADS, *flag]) == 0
    assert open_checkpoint(tmp_path / "out").metadata.norm_pix_loss is expected


def test_ours_imports_ours(tmp_path: Path) -> None:
    source = write_original(tmp_path / "weights.pth", tiny_mae(SQUARE).state_dict())
    assert main(["import", str(source), "--out", str(tmp_path / "one"), *HEADS]) == 0
    assert main(["import", str(tmp_path / "one"), "--out", str(tmp_path / "two"), *HEADS]) == 0
    one, two = (open_checkpoint(tmp_path / name).tensors() for name in ("one", "two"))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_a_licence_is_not_lost_by_importing_again(tmp_path: Path) -> None:
    source = write_original(tmp_path / "mae_pretrain_vit_base.pth", tiny_mae(SQUARE).state_dict(), norm_pix_loss=False)
    assert main(["import", str(source), "--out", str(tmp_path / "one"), *HEADS]) == 0
    # The folder says it all, the weights file alone at least the licence.
    assert main(["import", str(tmp_path / "one"), "--out", str(tmp_path / "two")]) == 0
    two = open_checkpoint(tmp_path / "two").metadata
    assert (two.licence, two.norm_pix_loss, two.encoder["num_heads"]) == ("CC-BY-NC-4.0", False, 5)
    assert two.provenance["parent"]["source"] == "mae_pretrain_vit_base.pth"
    (tmp_path / "one" / "model.safetensors").rename(tmp_path / "renamed.safetensors")
    assert main(["import", str(tmp_path / "renamed.safetensors"), "--out", str(tmp_path / "three"), *HEADS]) == 0
    assert open_checkpoint(tmp_path / "three").metadata.licence == "CC-BY-NC-4.0"


def test_a_checkpoint_of_ours_that_no_other_library_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = fill(MaskedAutoencoder(SQUARE, DECODER, objective=ObjectiveConfig(encoder_mask_tokens=True)))
    save_checkpoint(tmp_path / "ours", dict(model.state_dict()), metadata_of(model))
    assert main(["import", str(tmp_path / "ours"), "--out", str(tmp_path / "out")]) == 2
    assert "is ours already" in capsys.readouterr().err


class RunsOnUnpickling:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"echo run > '{self.marker}'",)


def test_code_is_refused_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, marker = tmp_path / "evil.pth", tmp_path / "marker"
    torch.save({"model": tiny_encoder(SQUARE).state_dict(), "args": RunsOnUnpickling(marker)}, source)
    assert main(["import", str(source), "--out", str(tmp_path / "out"), *HEADS]) == 1
    error, hint = capsys.readouterr().err.splitlines()
    assert error == f"error: refused to unpickle {source}: it wants to run {os.name}.system"
    assert hint.startswith("hint: ")
    assert {path.name for path in tmp_path.iterdir()} == {"evil.pth"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--num-heads", "5"], "which form no square"),
        (["--image-size", "6,10", "--num-heads", "3"], "embed_dim 20 must be a multiple of 4 and of num_heads, 3"),
        (["--image-size", "6,11", "--num-heads", "5"], "--image-size 6,11 is not a multiple of the patch size, 2"),
        (["--image-size", "6,10", "--num-heads", "5", "--decoder-num-heads", "5"], "--decoder-embed-dim 12"),
    ],
)
def test_options_that_do_not_fit_the_file(
    tmp_path: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_original(tmp_path / "weights.pth", tiny_mae(ENCODER).state_dict())
    assert main(["import", str(source), "--out", str(tmp_path / "out"), *arguments]) == 2
    assert said in capsys.readouterr().err.splitlines()[0]
    assert not (tmp_path / "out").exists()


def misfit(folder: Path) -> Path:
    tensors = {**tiny_encoder(SQUARE).state_dict(), "gamma[1]": torch.zeros(3), "norm.weight": torch.zeros(2, 3)}
    for name in (
        "norm.bias",
        *(f"blocks.1.{part}" for part in ("norm1.bias", "norm2.bias", "attn.qkv.bias", "attn.proj.bias")),
    ):
        del tensors[name]
    return write_original(folder / "weights.pth", tensors)


def test_tensors_that_do_not_fit_are_all_shown_above_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    source = misfit(tmp_path)
    assert main(["import", str(source), "--out", str(tmp_path / "out"), *HEADS]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    *table, error, hint = captured.err.splitlines()
    assert error.startswith(f"error: {source} does not fit: 5 missing: blocks.1.norm1.bias, ")
    assert error.endswith(
        "attn.proj.bias, blocks.1.norm2.bias …; 1 unexpected: gamma[1]; 1 misshapen: norm.weight (2, 3) instead of"
        " (20,)"
    )
    assert hint == "hint: if it is a timm model, say which: --model NAME"
    rows = [" ".join(line.split()) for line in table]
    for row in (
        "missing norm.bias - 20",
        "missing blocks.1.attn.qkv.bias - 60",
        "unexpected gamma[1] 3 -",
        "reshaped norm.weight 2x3 20",
    ):
        assert row in rows, row
    assert not (tmp_path / "out").exists()


def test_tensors_that_do_not_fit_are_in_the_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", str(misfit(tmp_path)), "--out", str(tmp_path / "out"), *HEADS, "--json"]) == 1
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 2
    report = json.loads(captured.out)
    assert [len(report[sort]) for sort in ("missing", "unexpected", "reshaped")] == [5, 1, 1]
    assert report["reshaped"] == [{"name": "norm.weight", "found": [2, 3], "expected": [20]}]


def test_a_model_by_timms_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # All that is built in and refused by name: tests/parity/test_timm_vit.py.
    theirs = timm.create_model("test_vit", num_classes=CLASSES)
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "weights.pth.tar")
    assert (
        main(
            [
                "import",
                str(tmp_path / "weights.pth.tar"),
                "--out",
                str(tmp_path / "out"),
                "--model",
                "test_vit",
                "--json",
            ]
        )
        == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert (report["layout"], report["architecture"], report["kind"]) == ("timm", "test_vit", "classifier")
    assert open_checkpoint(tmp_path / "out").metadata.preprocess["mean"] == [0.5, 0.5, 0.5]


def test_an_existing_folder_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_original(tmp_path / "weights.pth", tiny_encoder(SQUARE).state_dict())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    assert main(["import", str(source), "--out", str(tmp_path / "out"), *HEADS]) == 2
    assert capsys.readouterr().err.startswith(f"error: --out {tmp_path / 'out'} already exists\n")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


# --- class names -----------------------------------------------------------------------------------------------------

NUMBERS = [str(number) for number in range(CLASSES)]


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    torch.save(tiny_classifier("cls", SQUARE).state_dict(), tmp_path / "vit.pth")
    return tmp_path / "vit.pth"


def import_it(classifier: Path, *arguments: str) -> int:
    return main(["import", str(classifier), "--out", str(classifier.with_name("checkpoint")), *HEADS, *arguments])


def test_eval_counts_by_the_names_that_were_given(
    tmp_path: Path, classifier: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, name in enumerate(NUMBERS):
        write_noise(tmp_path / "data" / "val" / name, 3, first=3 * number, low=20 * number)
    evaluate = ["eval", str(tmp_path / "checkpoint"), str(tmp_path / "data"), "--num-workers", "0", "--json"]
    assert import_it(classifier) == 0
    capsys.readouterr()
    assert main(evaluate) == 2
    assert "numbered otherwise in alphabetical order" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "checkpoint")
    order = NUMBERS[::-1]
    (tmp_path / "names.txt").write_text("\n".join(order))
    assert import_it(classifier, "--class-names", str(tmp_path / "names.txt")) == 0
    capsys.readouterr()
    assert main(evaluate) == 0
    model, loaded = load_model(tmp_path / "checkpoint")
    preprocess = from_dict(Preprocess, loaded.metadata.preprocess)
    right = 0
    for path in (tmp_path / "data").rglob("*.png"):
        image = torch.from_numpy(preprocess([preprocess.read(path)]))
        with torch.no_grad():
            right += order[int(model(image).argmax())] == path.parent.name
    assert json.loads(capsys.readouterr().out)["top1"] == pytest.approx(100 * right / (3 * CLASSES))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (NUMBERS, "the order of the classes is natural, as timm's: 0 0, 1 1, 2 2, …"),
        (sorted(NUMBERS), "the order of the classes is alphabetical, as torchvision's: 0 0, 1 1, 2 10, …"),
        (NUMBERS[::-1], "the order of the classes is neither natural nor alphabetical: 0 10, 1 9, 2 8, …"),
        (None, "the file has no class names (--class-names FILE)"),
    ],
)
def test_the_order_that_is_assumed_is_said(
    classifier: Path, names: list[str] | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = []
    if names is not None:
        classifier.with_name("names.json").write_text(json.dumps(names))
        arguments = ["--class-names", str(classifier.with_name("names.json"))]
    assert import_it(classifier, *arguments, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert any(note.startswith(said) for note in report["notes"])
    assert report["classes"] == (f"0 {names[0]}, 1 {names[1]}, 2 {names[2]}, …" if names else CLASSES)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (NUMBERS[:-1], "--class-names has 10 names, and the model in .* has 11"),
        ([*NUMBERS[:-1], "3"], "calls the classes 3 and 10 '3'"),
    ],
)
def test_names_that_do_not_fit(
    classifier: Path, names: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    classifier.with_name("names.txt").write_text("\n".join(names))
    assert import_it(classifier, "--class-names", str(classifier.with_name("names.txt"))) == 2
    assert re.search(said, capsys.readouterr().err.replace("\n", " "))
    assert not classifier.with_name("checkpoint").exists()


def test_a_name_that_two_classes_of_a_model_have(classifier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {str(number): "crane" if number in (2, 7) else f"bird {number}" for number in range(CLASSES)}
    classifier.with_name("config.json").write_text(json.dumps({"id2label": names}))
    assert import_it(classifier) == 2
    error = capsys.readouterr().err
    assert "calls the classes 2 and 7 'crane'" in error
    assert "--class-names FILE" in error
    classifier.with_name("names.txt").write_text("\n".join(NUMBERS))
    assert import_it(classifier, "--class-names", str(classifier.with_name("names.txt"))) == 0


def test_names_for_an_encoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(tiny_encoder(SQUARE).state_dict(), tmp_path / "vit.pth")
    (tmp_path / "names.txt").write_text("ant\nbee")
    assert import_it(tmp_path / "vit.pth", "--class-names", str(tmp_path / "names.txt")) == 2
    assert "has no head" in capsys.readouterr().err


# --- preprocessing ---------------------------------------------------------------------------------------------------


def test_the_preprocessing_is_shown_and_can_be_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(tiny_encoder(SQUARE).state_dict(), tmp_path / "weights.pth")
    arguments = ["import", str(tmp_path / "weights.pth"), "--num-heads", "5"]
    assert main([*arguments, "--out", str(tmp_path / "guess")]) == 0
    printed = capsys.readouterr()
    assert "preprocessing: guessed, as the original MAE evaluates" in printed.err
    assert "--mean, --std, --crop-mode, --crop-pct and --interpolation" in printed.err
    rows = {words[0]: " ".join(words[1:]) for line in printed.out.splitlines() if (words := line.split())}
    assert rows["crop"] == "center, 0.875 of the resized image"
    assert rows["interpolation"] == "bicubic"
    assert (rows["mean"], rows["std"]) == ("0.485, 0.456, 0.406", "0.229, 0.224, 0.225")
    assert rows["preprocessing"].startswith("guessed")

    said = ["--mean", "0.1,0.2,0.3", "--std", "0.4,0.5,0.6", "--interpolation", "lanczos", "--crop-mode", "squash"]
    assert main([*arguments, "--out", str(tmp_path / "squash"), *said, "--crop-pct", "0.9"]) == 0
    assert "guessed" not in capsys.readouterr().err
    preprocess = from_dict(Preprocess, open_checkpoint(tmp_path / "squash").metadata.preprocess)
    assert preprocess == Preprocess(
        image_size=(10, 10),
        mean=(0.1, 0.2, 0.3),
        std=(0.4, 0.5, 0.6),
        interpolation="lanczos",
        crop_mode="squash",
        crop_pct=0.9,
    )
    assert main(["info", str(tmp_path / "squash")]) == 0
    shown = capsys.readouterr().out
    assert "squash, 0.9 of the resized image" in shown
    assert "the options of import" in shown

    assert main([*arguments, "--out", str(tmp_path / "part"), "--crop-mode", "border"]) == 0
    assert "guessed" in capsys.readouterr().err
    metadata = open_checkpoint(tmp_path / "part").metadata
    assert (metadata.preprocess["crop_mode"], metadata.preprocess["crop_pct"]) == ("border", 1.0)
    assert metadata.provenance["preprocess_from"].endswith("; but --crop-mode of import")
