"""A weights file of ours that was copied without its folder is the model that it was."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mae_deploy.checkpoint import METADATA, WEIGHTS, Metadata, find_checkpoint, open_checkpoint, save_checkpoint
from mae_deploy.cli import main
from mae_deploy.errors import CheckFailed, ConfigError
from mae_deploy.file_kinds import safetensors_header
from mae_deploy.models.config import EncoderConfig, ObjectiveConfig
from mae_deploy.models.mae import MaskedAutoencoder
from mae_deploy.models.vit import Encoder
from mae_deploy.weights.load import load_model, read_weights
from tests.models.tiny_models import CLASSES, DECODER, ENCODER, SQUARE, fill, metadata_of, tiny_classifier, tiny_mae

NAMES = tuple(f'class {chr(0x4E00 + index)} "{index}"\n' for index in range(CLASSES))
MODELS: dict[str, Callable[[], Encoder]] = {
    "classifier": lambda: tiny_classifier("avg"),
    "mae": lambda: tiny_mae(norm_pix_loss=False),
    "another target": lambda: fill(MaskedAutoencoder(ENCODER, DECODER, objective=ObjectiveConfig(target="pca"))),
    "groups of bands": lambda: fill(
        Encoder(
            EncoderConfig(
                name="tiny",
                image_size=(6, 10),
                patch_size=2,
                in_chans=5,
                embed_dim=20,
                depth=2,
                num_heads=5,
                band_groups=((0, 1), (2, 3, 4)),
            )
        )
    ),
}


def metadata_for(model: Encoder, **more: Any) -> Metadata:
    metadata = metadata_of(model, licence="MIT", provenance={"stage": "finetune", "note": "é ≠ \u2028"}, **more)
    metadata.preprocess.update(mean=[0.1] * model.config.in_chans, crop_pct=0.9)
    return metadata


def saved(folder: Path, model: Encoder, **more: Any) -> Path:
    save_checkpoint(folder, dict(model.state_dict()), metadata_for(model, **more))
    return folder


def moved(checkpoint: Path, to: Path) -> Path:
    to.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(checkpoint / WEIGHTS, to))


@pytest.mark.parametrize("name", [WEIGHTS, "best of march.safetensors"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_moved_file_keeps_everything(tmp_path: Path, kind: str, name: str) -> None:
    model = MODELS[kind]()
    more = {"class_names": NAMES} if kind == "classifier" else {}
    file = moved(saved(tmp_path / "run", model, **more), tmp_path / "elsewhere" / name)
    before, after = read_weights(tmp_path / "run"), read_weights(file)
    assert after.metadata == before.metadata
    assert after.record == {**before.record, "path": str(file)}
    read, _ = load_model(file)
    assert type(read) is type(model)
    assert read.config == model.config
    assert all(torch.equal(tensor, read.state_dict()[key]) for key, tensor in model.state_dict().items())


def test_a_folder_without_its_metadata(tmp_path: Path) -> None:
    folder = saved(tmp_path / "run", MODELS["groups of bands"]())
    before = read_weights(folder)
    (folder / METADATA).unlink()
    after = read_weights(folder)
    assert (after.metadata, after.record["path"]) == (before.metadata, str(folder / WEIGHTS))


def test_info_needs_no_torch_for_it(tmp_path: Path) -> None:
    file = moved(saved(tmp_path / "run", tiny_classifier("cls"), class_names=NAMES), tmp_path / "a.safetensors")
    code = (
        "import sys; from mae_deploy.cli import main; status = main(sys.argv[1:]);"
        " assert status == 0 and 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "info", str(file), "--json"], capture_output=True, text=True, check=True
    )
    report = json.loads(done.stdout)
    assert (report["kind"], report["encoder"]["num_heads"], report["class_names"]) == ("classifier", 5, list(NAMES))


def test_the_bytes_are_the_same_each_time(tmp_path: Path) -> None:
    model = tiny_classifier("avg")
    contents = {(saved(tmp_path / f"{index}", model, class_names=NAMES) / WEIGHTS).read_bytes() for index in range(8)}
    assert len(contents) == 1
    header = safetensors_header(tmp_path / "0" / WEIGHTS)
    assert list(header["__metadata__"]) == ["format", "licence", "mae_deploy"]
    assert load_file(tmp_path / "0" / WEIGHTS).keys() == model.state_dict().keys()


def test_a_file_copied_over_another_is_noticed(tmp_path: Path) -> None:
    first = saved(tmp_path / "first", tiny_classifier("avg"))
    second = saved(tmp_path / "second", tiny_classifier("cls"))
    moved(second, first / WEIGHTS)
    with pytest.raises(CheckFailed, match=r"the metadata\.json beside it describes: pool cls and avg"):
        open_checkpoint(first)


def test_what_a_user_edits_in_the_metadata_goes_before_the_header(tmp_path: Path) -> None:
    folder = saved(tmp_path / "run", tiny_classifier("avg"))
    record = json.loads((folder / METADATA).read_text())
    (folder / METADATA).write_text(json.dumps({**record, "licence": "CC0-1.0", "class_names": list(NAMES)}))
    metadata = read_weights(folder).metadata
    assert (metadata.licence, metadata.class_names) == ("CC0-1.0", NAMES)


@pytest.mark.parametrize(
    ("words", "beside"),
    [({"licence": "MIT"}, METADATA), ({"licence": "MIT", "provenance": '{"stage": "import"}'}, "config.json")],
)
def test_an_older_file_away_from_its_folder_is_refused(tmp_path: Path, words: dict[str, str], beside: str) -> None:
    model = tiny_classifier("avg", SQUARE)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt", **words})
    assert find_checkpoint(tmp_path / "a.safetensors") is None
    with pytest.raises(ConfigError, match=rf"older mae-deploy and moved away from its {beside}") as caught:
        read_weights(tmp_path / "a.safetensors")
    assert "--num-heads" in (caught.value.hint or "")
    arguments = ["import", str(tmp_path / "a.safetensors"), "--num-heads", "5", "--out", str(tmp_path / "checkpoint")]
    assert main(arguments) == 0
    assert read_weights(tmp_path / "checkpoint").metadata.encoder["num_heads"] == 5


@pytest.mark.parametrize("to", ["timm", "huggingface"])
def test_exported_weights_away_from_their_folder(tmp_path: Path, to: str) -> None:
    model = tiny_classifier("cls", SQUARE)
    checkpoint = saved(tmp_path / "run", model, class_names=NAMES)
    assert main(["export-weights", str(checkpoint), "--to", to, "--out", str(tmp_path / "out")]) == 0
    read, loaded = load_model(moved(tmp_path / "out", tmp_path / "elsewhere.safetensors"))
    expected = metadata_for(model, class_names=NAMES)
    for name in ("kind", "pool", "num_classes", "class_names", "licence", "preprocess"):
        assert getattr(loaded.metadata, name) == getattr(expected, name), name
    assert read.config.num_heads == 5
    assert all(torch.equal(tensor, read.state_dict()[key]) for key, tensor in model.state_dict().items())
