"""What `export-weights` leaves behind loads strictly in timm and transformers by their own calls, and computes there
what it computes here.
"""

from __future__ import annotations

import json
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor
from transformers import AutoImageProcessor, ViTForImageClassification, ViTMAEForPreTraining, ViTMAEModel, ViTModel

from mae_deploy.checkpoint import save_checkpoint
from mae_deploy.cli import main
from mae_deploy.config import from_dict, to_dict
from mae_deploy.images.geometry import CropMode
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.models.config import EncoderConfig
from mae_deploy.models.mae import MaskedAutoencoder
from mae_deploy.models.masking import random_masking
from mae_deploy.models.vit import Encoder
from mae_deploy.weights.load import load_model
from tests.models.tiny_models import (
    CLASSES,
    ENCODER,
    SQUARE,
    metadata_of,
    random_images,
    tiny_classifier,
    tiny_encoder,
    tiny_mae,
)

NAMES = tuple(f"class {index}" for index in range(CLASSES))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is downloaded."""

    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def exported(folder: Path, model: Encoder, to: str, **more: Any) -> Path:
    save_checkpoint(folder / "checkpoint", dict(model.state_dict()), metadata_of(model, licence="MIT", **more))
    assert main(["export-weights", str(folder / "checkpoint"), "--to", to, "--out", str(folder / "out")]) == 0
    return folder / "out"


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """Within 1e-5 of the largest number: float32 sums of up to 80 products through two blocks, in another order."""
    assert ours.shape == theirs.shape
    assert ((ours - theirs).abs().max() / theirs.abs().max()).item() < 1e-5


@pytest.mark.parametrize("pool", ["avg", "cls"])
@pytest.mark.parametrize("config", [ENCODER, SQUARE])
def test_a_classifier_in_timm(tmp_path: Path, pool: Any, config: EncoderConfig) -> None:
    ours = tiny_classifier(pool, config)
    folder = exported(tmp_path, ours, "timm", class_names=NAMES)
    theirs: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert theirs.global_pool == {"avg": "avg", "cls": "token"}[pool]
    assert theirs.pretrained_cfg["label_names"] == list(NAMES)
    images = random_images(config)
    with torch.no_grad():
        assert_close(ours(images), theirs(images))


@pytest.mark.parametrize("model", [tiny_encoder(), tiny_mae()], ids=["encoder", "mae"])
def test_an_encoder_in_timm(tmp_path: Path, model: Encoder) -> None:
    theirs: Any = timm.create_model(f"local-dir:{exported(tmp_path, model, 'timm')}", pretrained=True).eval()
    assert theirs.num_classes == 0
    images = random_images()
    with torch.no_grad():
        assert_close(Encoder.forward(model, images), theirs.forward_features(images))


def test_a_preset_by_timms_name_and_path(tmp_path: Path) -> None:
    config = EncoderConfig(name="vit_tiny_patch16", image_size=(224, 224))
    ours = tiny_classifier("avg", config)
    folder = exported(tmp_path, ours, "timm")
    theirs: Any = timm.create_model(
        "vit_tiny_patch16_224",
        checkpoint_path=str(folder / "model.safetensors"),
        num_classes=CLASSES,
        global_pool="avg",
        fc_norm=True,
    ).eval()
    images = random_images(config, batch=1)
    with torch.no_grad():
        assert_close(ours(images), theirs(images))


def read_strictly(kind: Any, folder: Path, **settings: Any) -> Any:
    model, loading = kind.from_pretrained(folder, output_loading_info=True, local_files_only=True, **settings)
    assert not any(loading.values()), loading
    return model.eval()


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_an_autoencoder_in_transformers(tmp_path: Path, norm_pix_loss: bool) -> None:
    ours = tiny_mae(SQUARE, norm_pix_loss=norm_pix_loss)
    theirs = read_strictly(ViTMAEForPreTraining, exported(tmp_path, ours, "huggingface"))
    images, noise = random_images(SQUARE), torch.rand(3, 25, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        expected = theirs(images, noise=noise)
        found = ours(images, random_masking(noise, 0.75))
    assert_close(found.pixels, expected.logits)
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    # The encoder alone: transformers leaves the decoder aside by itself.
    encoder = ViTMAEModel.from_pretrained(tmp_path / "out", mask_ratio=0.0, local_files_only=True).eval()
    ordered = torch.arange(25).expand(3, 25) / 25
    with torch.no_grad():
        assert_close(ours.forward_encoder(images), encoder(images, noise=ordered).last_hidden_state)


@pytest.mark.parametrize("config", [ENCODER, SQUARE])
def test_an_encoder_in_transformers(tmp_path: Path, config: EncoderConfig) -> None:
    ours, images = tiny_encoder(config), random_images(config)
    theirs = read_strictly(ViTModel, exported(tmp_path, ours, "huggingface"), add_pooling_layer=False)
    assert theirs.config.layer_norm_eps == 1e-6
    with torch.no_grad():
        assert_close(ours(images), theirs(images).last_hidden_state)


def test_a_classifier_in_transformers(tmp_path: Path) -> None:
    ours, images = tiny_classifier("cls", SQUARE), random_images(SQUARE)
    theirs = read_strictly(ViTForImageClassification, exported(tmp_path, ours, "huggingface", class_names=NAMES))
    assert theirs.config.id2label[3] == "class 3"
    with torch.no_grad():
        assert_close(ours(images), theirs(images).logits)


def photo() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


PREPROCESS = Preprocess(
    image_size=(10, 10), crop_pct=0.625, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), interpolation="bilinear"
)


def with_preprocess(folder: Path, to: str, spec: Preprocess) -> Path:
    return exported(folder, tiny_encoder(SQUARE), to, preprocess=to_dict(spec))


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_preprocessing_in_timm(tmp_path: Path, crop_mode: CropMode) -> None:
    spec = replace(PREPROCESS, crop_mode=crop_mode)
    folder = with_preprocess(tmp_path, "timm", spec)
    theirs: Any = timm.create_model(f"local-dir:{folder}", pretrained=True)
    transform: Any = create_transform(**resolve_data_config(model=theirs))
    np.testing.assert_allclose(transform(photo()).numpy()[None], spec([photo()]), atol=1e-6)


@pytest.mark.parametrize("crop_mode", ["center", "squash"])
def test_preprocessing_in_transformers(tmp_path: Path, crop_mode: CropMode) -> None:
    spec = replace(PREPROCESS, crop_mode=crop_mode)
    folder = with_preprocess(tmp_path, "huggingface", spec)
    # The processor that resizes with Pillow, as we do; torchvision's rounds otherwise.
    theirs = AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
    np.testing.assert_allclose(theirs(photo(), return_tensors="np")["pixel_values"], spec([photo()]), atol=1e-5)
    assert main(["import", str(folder), "--out", str(tmp_path / "back")]) == 0
    assert from_dict(Preprocess, load_model(tmp_path / "back")[1].metadata.preprocess) == spec


def test_a_letterbox_is_left_out_where_there_is_none(tmp_path: Path) -> None:
    spec = replace(PREPROCESS, crop_mode="letterbox")
    timm_folder = with_preprocess(tmp_path / "a", "timm", spec)
    stated = json.loads((timm_folder / "config.json").read_text())["pretrained_cfg"]
    assert (stated["crop_mode"], stated["crop_pct"]) == ("border", 1.0)
    assert "left out: preprocessing" in (timm_folder / "README.md").read_text()
    other = with_preprocess(tmp_path / "b", "huggingface", spec)
    assert not (other / "preprocessor_config.json").exists()
    assert "left out: preprocessing" in (other / "README.md").read_text()


def test_there_and_back_again(tmp_path: Path) -> None:
    ours = tiny_mae(SQUARE)
    assert main(["import", str(exported(tmp_path, ours, "huggingface")), "--out", str(tmp_path / "back")]) == 0
    back, loaded = load_model(tmp_path / "back")
    assert isinstance(back, MaskedAutoencoder)
    assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in ours.state_dict().items())
    assert loaded.metadata.licence == "MIT"
