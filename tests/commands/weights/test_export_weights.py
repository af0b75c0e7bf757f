"""`mae-deploy export-weights` as it is typed: a folder or a file that passed its proof, or nothing. What other
libraries make of it: tests/parity.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open

from mae_deploy.checkpoint import save_checkpoint
from mae_deploy.cli import main
from mae_deploy.config import to_dict
from mae_deploy.models.config import EncoderConfig, ObjectiveConfig
from mae_deploy.models.mae import MaskedAutoencoder
from mae_deploy.models.vit import Encoder
from mae_deploy.weights.load import load_model
from mae_deploy.weights.read.convert import ImportOptions, import_weights
from mae_deploy.weights.write import check as weight_proof
from mae_deploy.weights.write import foreign as weight_export
from tests.models.families import family
from tests.models.tiny_models import (
    CLASSES,
    DECODER,
    ENCODER,
    SQUARE,
    fill,
    metadata_of,
    tiny_classifier,
    tiny_encoder,
    tiny_mae,
)

PROVENANCE = {"stage": "pretrain", "config": {"mask_ratio": 0.6}, "parent": {"stage": "import", "source": "mae[1].pth"}}


def saved(folder: Path, model: Encoder, **more: Any) -> Path:
    save_checkpoint(
        folder, dict(model.state_dict()), metadata_of(model, **{"licence": "MIT", "provenance": PROVENANCE, **more})
    )
    return folder


def export(checkpoint: Path, to: str, out: Path, *arguments: str) -> int:
    return main(["export-weights", str(checkpoint), "--to", to, "--out", str(out), *arguments])


@pytest.mark.parametrize("to", ["timm", "huggingface", "original"])
def test_the_report(tmp_path: Path, to: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / ("mae.pth" if to == "original" else "mae")
    assert export(saved(tmp_path / "checkpoint", tiny_mae(SQUARE)), to, out, "--json") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    report = json.loads(captured.out)
    assert (report["out"], report["to"], report["licence"]) == (str(out), to, "MIT")
    assert report["proof"]["round_trip"] == "same tensors and settings"
    assert report["kind"] == ("encoder" if to == "timm" else "mae")
    assert bool(report["left_out"]) is (to == "timm")
    if to != "original":
        assert set(report["files"]) == {path.name for path in out.iterdir()}
        assert "of the largest" in report["proof"]["timm" if to == "timm" else "transformers"]
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", out.name}


def test_the_originals_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_mae(norm_pix_loss=False)
    checkpoint = saved(tmp_path / "checkpoint", model, licence="own")
    assert export(checkpoint, "original", tmp_path / "mae.pth") == 0
    monkeypatch.setattr(os, "getpid", lambda: 7)  # of another process, under another name: the same bytes
    assert export(checkpoint, "original", tmp_path / "other.pth") == 0
    assert (tmp_path / "other.pth").read_bytes() == (tmp_path / "mae.pth").read_bytes()
    content = torch.load(tmp_path / "mae.pth", weights_only=True)  # nothing but tensors and plain values
    assert set(content) == {"model", "mae_deploy"}
    assert content["model"].keys() == model.state_dict().keys()
    # Heads, a grid that is no square, the target and the licence come back without options.
    imported = import_weights(tmp_path / "mae.pth", ImportOptions())
    assert imported.metadata.encoder == {**to_dict(ENCODER), "name": "vit_20x2_patch2"}
    assert (imported.metadata.norm_pix_loss, imported.metadata.licence) == (False, "own")
    assert imported.metadata.decoder == metadata_of(model).decoder


@pytest.mark.parametrize("to", ["timm", "huggingface"])
def test_licence_and_provenance_go_along(tmp_path: Path, to: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        export(saved(tmp_path / "checkpoint", tiny_encoder(SQUARE), licence="CC-BY-NC-4.0"), to, tmp_path / "out") == 0
    )
    assert "licence: CC-BY-NC-4.0: these weights derive from a non-commercial release" in capsys.readouterr().err
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        header = file.metadata()
    assert (header["format"], header["licence"], json.loads(header["provenance"])) == ("pt", "CC-BY-NC-4.0", PROVENANCE)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.to_dict() == {
        "license": "cc-by-nc-4.0",
        "library_name": "timm" if to == "timm" else "transformers",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["masked-autoencoder", "vit"],
    }
    assert '"source": "mae[1].pth"' in card.text
    assert main(["import", str(tmp_path / "out"), "--out", str(tmp_path / "back")]) == 0
    metadata = load_model(tmp_path / "back")[1].metadata
    assert (metadata.licence, metadata.provenance["parent"]) == ("CC-BY-NC-4.0", PROVENANCE)


@pytest.mark.parametrize(
    ("licence", "front"),
    [
        ("own", {"license": "other", "license_name": "own"}),
        ("Our terms: ask #1", {"license": "other", "license_name": "Our terms: ask #1"}),
        ("unspecified", {"license": "unknown"}),
        ("MIT", {"license": "mit"}),
    ],
)
def test_licences_in_the_words_of_a_hub(tmp_path: Path, licence: str, front: dict[str, str]) -> None:
    assert export(saved(tmp_path / "checkpoint", tiny_encoder(SQUARE), licence=licence), "timm", tmp_path / "out") == 0
    data = ModelCard.load(tmp_path / "out" / "README.md").data.to_dict()
    assert {name: data[name] for name in data if name.startswith("license")} == front
    assert import_weights(tmp_path / "out", ImportOptions()).metadata.licence == licence


def test_the_settings_of_hugging_face(tmp_path: Path) -> None:
    names = tuple(f"class {index}" for index in range(CLASSES))
    assert (
        export(
            saved(tmp_path / "classifier", tiny_classifier("cls", SQUARE), class_names=names),
            "huggingface",
            tmp_path / "out",
        )
        == 0
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["architectures"], config["layer_norm_eps"], config["num_attention_heads"]) == (
        ["ViTForImageClassification"],
        1e-6,
        5,
    )
    assert config["id2label"]["3"] == "class 3"
    assert (
        export(saved(tmp_path / "mae", tiny_mae(SQUARE, norm_pix_loss=False)), "huggingface", tmp_path / "mae-out") == 0
    )
    config = json.loads((tmp_path / "mae-out" / "config.json").read_text())
    assert (config["norm_pix_loss"], config["mask_ratio"], config["decoder_num_attention_heads"]) == (False, 0.6, 3)


@pytest.mark.parametrize(
    ("model", "to", "said", "hint"),
    [
        (tiny_classifier("avg", SQUARE), "huggingface", "reads the class token after the last norm", "--to timm"),
        (tiny_mae(), "huggingface", "wants square images, not 6x10", ""),
    ],
)
def test_what_the_other_library_cannot_express(
    tmp_path: Path, model: Encoder, to: str, said: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(saved(tmp_path / "checkpoint", model), to, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert said in error.splitlines()[0]
    assert hint in error
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint"}


@pytest.mark.parametrize("to", ["huggingface", "original"])
def test_a_decoder_of_another_kind(tmp_path: Path, to: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = fill(MaskedAutoencoder(SQUARE, DECODER, objective=ObjectiveConfig(encoder_mask_tokens=True)))
    assert export(saved(tmp_path / "checkpoint", model), to, tmp_path / "out.pth") == 2
    assert "no decoder for target pixels with mask tokens in the encoder" in capsys.readouterr().err
    assert export(tmp_path / "checkpoint", "timm", tmp_path / "encoder") == 0


def test_groups_of_bands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metadata = metadata_of(tiny_encoder(SQUARE))
    metadata.encoder["band_groups"] = [[0, 1], [2]]
    save_checkpoint(tmp_path / "checkpoint", dict(tiny_encoder(SQUARE).state_dict()), metadata)
    assert export(tmp_path / "checkpoint", "timm", tmp_path / "out") == 2
    assert "timm has no groups of bands" in capsys.readouterr().err


@pytest.mark.parametrize("to", ["timm", "huggingface", "original"])
def test_todays_families(tmp_path: Path, to: str, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = saved(tmp_path / "checkpoint", tiny_encoder(family("DINOv3")))
    assert export(checkpoint, to, tmp_path / "out.pth") == 2
    assert "plain ViTs, and this model has rotary dinov3, position_table False" in capsys.readouterr().err
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.parametrize("to", ["timm", "huggingface", "original"])
def test_what_computes_something_else_is_not_left_behind(
    tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = saved(tmp_path / "checkpoint", tiny_encoder(SQUARE))
    spoiled = weight_export.ForeignModel

    def swap(loaded: Any, tensors: dict[str, torch.Tensor], *rest: Any) -> Any:
        one, other = [name for name in tensors if re.search(r"0\.(norm|layernorm_)\w+\.weight$", name)]
        return spoiled(loaded, {**tensors, one: tensors[other], other: tensors[one]}, *rest)

    monkeypatch.setattr(weight_export, "ForeignModel", swap)
    assert export(checkpoint, to, tmp_path / "out.pth") == 1
    assert "reads back with 2 other tensors" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint"}


def test_another_number_of_heads_is_found_here_and_by_the_other_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = saved(tmp_path / "checkpoint", tiny_encoder(SQUARE))
    config = weight_export._config
    monkeypatch.setattr(weight_export, "_config", lambda loaded: {**config(loaded), "num_attention_heads": 4})
    assert export(checkpoint, "huggingface", tmp_path / "out") == 1
    assert "reads back with heads 4 instead of 5" in capsys.readouterr().err
    monkeypatch.setattr(weight_proof, "_check_values", lambda *_: None)
    assert export(checkpoint, "huggingface", tmp_path / "out") == 1
    assert "transformers computes something else from what was written: outputs differ by" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint"}


def test_without_transformers_the_report_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "transformers" else find(name, *rest)
    )
    assert export(saved(tmp_path / "checkpoint", tiny_encoder(SQUARE)), "huggingface", tmp_path / "out", "--json") == 0
    proof = json.loads(capsys.readouterr().out)["proof"]
    assert proof == {
        "round_trip": "same tensors and settings",
        "transformers": "not installed: its outputs were not compared",
    }
    assert "- transformers: not installed" in (tmp_path / "out" / "README.md").read_text()


def test_names_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = saved(tmp_path / "checkpoint", tiny_encoder(SQUARE))
    assert export(checkpoint, "original", tmp_path / "out") == 2
    assert "is not called .pth" in capsys.readouterr().err
    assert export(checkpoint, "timm", checkpoint) == 2
    assert "already exists" in capsys.readouterr().err


def test_a_file_of_someone_elses_in_one_step(tmp_path: Path) -> None:
    torch.save(
        {"model": tiny_encoder(EncoderConfig(name="vit_nano_patch4", image_size=(12, 12))).state_dict()},
        tmp_path / "encoder.pth",
    )
    assert export(tmp_path / "encoder.pth", "timm", tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_args"]["num_heads"] == 1
