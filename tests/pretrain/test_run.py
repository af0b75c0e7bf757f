"""A pretraining run learns, and leaves a run folder that says what it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mae_deploy.checkpoint import OWN_LICENCE, open_checkpoint
from mae_deploy.cli import main
from mae_deploy.config import from_dict, to_dict
from mae_deploy.data.config import CropConfig, DataConfig
from mae_deploy.data.sources.open import unlabelled_images
from mae_deploy.models.mae import MaskedAutoencoder
from mae_deploy.pretrain.config import PretrainConfig
from mae_deploy.pretrain.run import run_pretrain
from mae_deploy.recipe import read_recipe
from mae_deploy.training.state.run_folder import read_metrics
from mae_deploy.weights.load import load_model
from tests.data.image_folders import spoil
from tests.training.tiny_runs import DECODER, ENCODER, optim, pretraining


def test_the_run_folder(images: Path, tmp_path: Path) -> None:
    config = pretraining(images, tmp_path / "run", optim=optim(epochs=3), pictures_every=2)
    summary = run_pretrain(config)
    found = {
        path.relative_to(tmp_path / "run").as_posix()
        for path in (tmp_path / "run").rglob("*")
        if path.is_file() and "tfevents" not in path.name
    }
    state = {"state/optimizer.safetensors", "state/progress.json"}
    assert found == {
        "config.yaml",
        "data.json",
        "environment.json",
        "metrics.jsonl",
        "reconstruction-0002.png",
        "reconstruction-0003.png",
    } | {
        f"checkpoints/{name}/{file}" for name in ("step-6",) for file in ("model.safetensors", "metadata.json", *state)
    }
    assert (tmp_path / "run" / "checkpoints" / "last").resolve().name == "step-6"
    assert from_dict(PretrainConfig, read_recipe(tmp_path / "run" / "config.yaml")) == config
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [list(line) for line in lines] == [
        ["step", "epoch", "loss", "grad_norm", "lr", "skipped", "images_per_second", "data_wait"]
    ] * 6
    assert (summary["steps"], summary["first_loss"]) == (6, lines[0]["loss"])

    (events,) = (tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*")
    board = EventAccumulator(str(events)).Reload()
    # TensorBoard keeps float32.
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [
        (line["step"], pytest.approx(line["loss"], rel=1e-7)) for line in lines
    ]


def test_the_checkpoint_says_what_it_is_and_where_it_came_from(images: Path, tmp_path: Path) -> None:
    config = pretraining(
        images, tmp_path / "run", norm_pix_loss=False, images=DataConfig(num_workers=0, mean=(0.4, 0.5, 0.6))
    )
    run_pretrain(config)
    metadata = open_checkpoint(tmp_path / "run").metadata
    assert (metadata.kind, metadata.norm_pix_loss, metadata.licence, metadata.step) == ("mae", False, OWN_LICENCE, 4)
    assert metadata.encoder == to_dict(ENCODER)
    assert metadata.decoder == to_dict(DECODER)
    assert metadata.preprocess["mean"] == [0.4, 0.5, 0.6]
    assert metadata.provenance == {
        "stage": "pretrain",
        "config": to_dict(config),
        "data": unlabelled_images(images).fingerprint(),
    }
    model, _ = load_model(tmp_path / "run")
    assert isinstance(model, MaskedAutoencoder)
    assert not model.norm_pix_loss


def test_it_learns_what_can_be_learnt(tmp_path: Path) -> None:
    """Ramps of grey from left to right: any patch tells what the others look like."""
    folder = tmp_path / "ramps"
    folder.mkdir()
    for number in range(10):
        ramp = np.tile(np.linspace(10 * number, 10 * number + 120, 60), (60, 1))
        Image.fromarray(ramp.astype(np.uint8)).save(folder / f"{number}.png")
    config = pretraining(
        folder, tmp_path / "run", augment=CropConfig(hflip=0.0), optim=optim(epochs=40, lr=2e-2, warmup_epochs=2.0)
    )
    summary = run_pretrain(config)
    assert summary["first_loss"] > 0.9  # of targets with variance 1 and an untrained decoder
    assert summary["last_loss"] < 0.3 * summary["first_loss"]


@pytest.mark.parametrize(("channels", "size"), [(1, (15, 10)), (4, (5, 20)), (3, (10, 10))])
def test_other_channels_and_sizes(images: Path, tmp_path: Path, channels: int, size: tuple[int, int]) -> None:
    model = replace(ENCODER, in_chans=channels, image_size=size)
    run_pretrain(pretraining(images, tmp_path / "run", model=model, optim=optim(epochs=1)))
    checkpoint = open_checkpoint(tmp_path / "run")
    tensors = checkpoint.tensors()
    assert tensors["patch_embed.proj.weight"].shape == (12, channels, 5, 5)
    assert tensors["decoder_pred.weight"].shape == (25 * channels, 8)
    assert tensors["pos_embed"].shape == (1, 1 + model.num_patches, 12)
    assert len(checkpoint.metadata.preprocess["mean"]) == channels
    with Image.open(tmp_path / "run" / "reconstruction-0001.png") as picture:
        assert picture.mode == {1: "L", 3: "RGB", 4: "RGBA"}[channels]


def test_a_folder_as_people_have_them(images: Path, tmp_path: Path) -> None:
    """Every kind of file in one tree, some of them broken: the run says which, and goes on with the others."""
    folder = images / "albums" / "2024"
    folder.mkdir(parents=True)
    with Image.open(images / "00.png") as photo:
        photo.convert("L").save(folder / "grey.JPG")
        photo.convert("CMYK").save(folder / "print.jpg")
        photo.convert("P").save(folder / "palette.gif")
        photo.convert("RGBA").save(folder / "cut-out.webp")
        photo.resize((1, 1)).save(folder / "pixel.bmp")
        photo.resize((997, 2)).save(folder / "strip.png")
    Image.fromarray(np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)).save(folder / "scan.tiff")
    spoil(images / "03.png")
    (folder / "empty.jpg").touch()
    (folder / "notes.jpg").write_text("no image", encoding="utf-8")
    (folder / "gone.png").symlink_to("nowhere.png")
    (folder / "readme.txt").write_text("no image, and not called one", encoding="utf-8")
    summary = run_pretrain(pretraining(images, tmp_path / "run", optim=optim(epochs=5)))
    assert summary["steps"] == 5 * 4  # of 21 files that are called images
    listed = (tmp_path / "run" / "unreadable.txt").read_text(encoding="utf-8").splitlines()
    assert sorted(Path(line.partition(": ")[0]).name for line in listed) == [
        "03.png",
        "empty.jpg",
        "gone.png",
        "notes.jpg",
    ]


def test_position_embeddings_stay_fixed(images: Path, tmp_path: Path) -> None:
    run_pretrain(pretraining(images, tmp_path / "run"))
    tensors = open_checkpoint(tmp_path / "run").tensors()
    untrained = MaskedAutoencoder(ENCODER, DECODER)
    assert torch.equal(tensors["pos_embed"], untrained.pos_embed)
    assert torch.equal(tensors["decoder_pos_embed"], untrained.decoder_pos_embed)


def test_the_seed_decides_weights_order_and_masks(images: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run_pretrain(pretraining(images, tmp_path / name, seed=seed))
    losses = {name: [line["loss"] for line in read_metrics(tmp_path / name)] for name in "abc"}
    assert losses["a"] == losses["b"] != losses["c"]


def test_pictures_show_the_first_readable_images(images: Path, tmp_path: Path) -> None:
    spoil(images / "00.png")
    run_pretrain(pretraining(images, tmp_path / "run", optim=optim(epochs=1)))
    with Image.open(tmp_path / "run" / "reconstruction-0001.png") as picture:
        # Eight rows of 150 pixels (15, enlarged ten times) and three columns of 100, 4 apart.
        assert picture.size == (3 * 100 + 2 * 4, 8 * 150 + 7 * 4)


# --- from weights ----------------------------------------------------------------------------------------------------


def test_a_run_goes_on_from_the_weights_of_another(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model is that of --init without any other option; at learning rate 0 it stays as it was, decoder and all."""
    run_pretrain(pretraining(images, tmp_path / "first"))
    recipe = tmp_path / "still.yaml"
    recipe.write_text("{images: {num_workers: 0}, optim: {epochs: 1, batch_size: 5, lr: 0}, device: cpu}\n")
    out = tmp_path / "second"
    call = ["pretrain", str(images), "--init", str(tmp_path / "first"), "--recipe", str(recipe), "--out"]
    assert main([*call, str(out)]) == 0
    assert f"start: tiny of {tmp_path / 'first'}, with its decoder" in capsys.readouterr().err
    first, second = (open_checkpoint(run) for run in (tmp_path / "first", out))
    assert (second.metadata.encoder, second.metadata.decoder) == (first.metadata.encoder, first.metadata.decoder)
    assert second.metadata.provenance["parent"]["sha256"] == first.record()["sha256"]
    tensors = second.tensors()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in first.tensors().items())

    assert main([*call, str(tmp_path / "third"), "--image-size", "20,10", "--decoder-depth", "2"]) == 0
    assert f"start: tiny of {tmp_path / 'first'}, a new decoder" in capsys.readouterr().err
    third = open_checkpoint(tmp_path / "third").metadata
    assert (third.encoder["image_size"], third.decoder and third.decoder["decoder_depth"]) == ([20, 10], 2)

    assert main([*call, str(tmp_path / "fourth"), "--model", "vit_nano_patch4"]) == 2
    assert "error: --init has name tiny, not vit_nano_patch4" in capsys.readouterr().err
    assert not (tmp_path / "fourth").exists()


def test_the_licence_of_the_weights_is_inherited(images: Path, tmp_path: Path) -> None:
    run_pretrain(pretraining(images, tmp_path / "first"))
    metadata = next((tmp_path / "first" / "checkpoints").glob("step-*")) / "metadata.json"
    metadata.write_text(metadata.read_text().replace('"licence": "own"', '"licence": "CC-BY-NC-4.0"'))
    run_pretrain(pretraining(images, tmp_path / "second", init=tmp_path / "first"))
    assert open_checkpoint(tmp_path / "second").metadata.licence == "CC-BY-NC-4.0"
