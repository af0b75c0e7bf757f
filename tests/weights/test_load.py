"""A checkpoint becomes the model that wrote it, and starts another model from its encoder; what does not fit is
refused.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from mae_deploy.checkpoint import save_checkpoint
from mae_deploy.cli import main
from mae_deploy.errors import CheckFailed, ConfigError
from mae_deploy.files import write_json
from mae_deploy.models.config import EncoderConfig, ObjectiveConfig
from mae_deploy.models.mae import MaskedAutoencoder
from mae_deploy.models.position import interpolate_position_embedding
from mae_deploy.models.vit import Classifier, Encoder
from mae_deploy.weights.load import (
    LoadedWeights,
    at_image_size,
    build_model,
    encoder_of,
    load_model,
    load_strict,
    model_of,
    read_weights,
    start_autoencoder_from,
    start_from,
)
from tests.models.tiny_models import (
    CLASSES,
    DECODER,
    ENCODER,
    fill,
    metadata_of,
    random_images,
    tiny_classifier,
    tiny_encoder,
    tiny_mae,
    write_original,
)

MODELS: dict[str, Callable[[], Encoder]] = {
    "encoder": tiny_encoder,
    "mae": tiny_mae,
    "avg": lambda: tiny_classifier("avg"),
    "cls": lambda: tiny_classifier("cls"),
}


def loaded_from(model: Encoder) -> LoadedWeights:
    return LoadedWeights(metadata_of(model), model.state_dict(), {})


@pytest.mark.parametrize(
    ("change", "decoded"),
    [
        ({}, True),
        ({"norm_pix_loss": False}, False),
        ({"decoder": replace(DECODER, decoder_depth=2)}, False),
        ({"objective": ObjectiveConfig(target="pca", target_dim=7)}, False),
        ({"objective": ObjectiveConfig(encoder_mask_tokens=True)}, False),
        ({"objective": ObjectiveConfig(loss="l1", loss_on="all")}, True),  # another loss of the same prediction
    ],
)
def test_an_autoencoder_starts_with_the_decoder_that_predicts_the_same(change: dict[str, Any], decoded: bool) -> None:
    source = tiny_mae()
    model = MaskedAutoencoder(ENCODER, **{"decoder": DECODER, "norm_pix_loss": True, **change})
    assert start_autoencoder_from(model, loaded_from(source)) is decoded
    own, given = model.state_dict(), source.state_dict()
    assert all(torch.equal(own[name], given[name]) for name in tiny_encoder().state_dict())
    same = torch.equal(own["decoder_blocks.0.attn.qkv.weight"], given["decoder_blocks.0.attn.qkv.weight"])
    assert same is decoded


def test_an_autoencoder_starts_from_classifiers_and_other_image_sizes() -> None:
    for pool in ("avg", "cls"):  # mean-pooled, it has no norm behind its last block
        model = MaskedAutoencoder(ENCODER, DECODER)
        assert not start_autoencoder_from(model, loaded_from(tiny_classifier(pool)))
    larger = MaskedAutoencoder(replace(ENCODER, image_size=(8, 12)), DECODER)
    assert start_autoencoder_from(larger, loaded_from(tiny_mae()))
    assert larger.decoder_pos_embed.shape == (1, 1 + 4 * 6, 12)


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_gives_the_same_model(tmp_path: Path, name: str) -> None:
    model = MODELS[name]()
    save_checkpoint(
        tmp_path / "checkpoint", model.state_dict(), metadata_of(model, licence="MIT", provenance={"stage": "test"})
    )
    read, loaded = load_model(tmp_path / "checkpoint")
    assert type(read) is type(model)
    assert not read.training
    assert {tensor.device.type for tensor in read.state_dict().values()} == {"cpu"}
    images = random_images()
    with torch.no_grad():
        assert torch.equal(Encoder.forward(read, images), Encoder.forward(model, images))
    assert all(torch.equal(tensor, read.state_dict()[key]) for key, tensor in model.state_dict().items())
    assert loaded.encoder_config == ENCODER
    assert loaded.metadata.licence == "MIT"
    assert loaded.record["stage"] == "test"
    assert len(loaded.record["sha256"]) == 64


def test_settings_of_the_model_survive() -> None:
    mae = build_model(metadata_of(tiny_mae(norm_pix_loss=False)))
    assert isinstance(mae, MaskedAutoencoder)
    assert not mae.norm_pix_loss
    assert mae.decoder_config == DECODER
    classifier = build_model(metadata_of(tiny_classifier("cls")))
    assert isinstance(classifier, Classifier)
    assert classifier.pool == "cls"


def test_frozen_tables_stay_frozen() -> None:
    model = model_of(loaded_from(tiny_mae()))
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == [
        "pos_embed",
        "decoder_pos_embed",
    ]


def test_a_file_of_the_original_is_read_as_it_is(tmp_path: Path) -> None:
    config = EncoderConfig(name="vit_nano_patch4", image_size=(12, 12))
    model = fill(Encoder(config))
    file = write_original(tmp_path / "mae_pretrain_vit_base.pth", model.state_dict())
    read, loaded = load_model(file)
    assert loaded.record["path"] == str(file)
    assert loaded.record["stage"] == "import"
    assert loaded.metadata.licence == "CC-BY-NC-4.0"
    images = random_images(config)
    with torch.no_grad():
        assert torch.equal(read(images), model(images))


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no weights at"):
        read_weights(tmp_path)


def test_the_encoder_of_an_autoencoder() -> None:
    mae, images = tiny_mae(), random_images()
    encoder = encoder_of(loaded_from(mae))
    assert type(encoder) is Encoder
    with torch.no_grad():
        assert torch.equal(encoder(images), mae.forward_encoder(images))
    assert type(encoder_of(loaded_from(tiny_classifier("avg")))) is Classifier


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm.bias": None}, r"Missing key\(s\).*norm\.bias"),
        ({"norm.scale": torch.ones(20)}, r"Unexpected key\(s\).*norm\.scale"),
        ({"norm.bias": torch.ones(19)}, r"size mismatch for norm\.bias"),
    ],
)
def test_tensors_that_do_not_fit(change: dict[str, torch.Tensor | None], message: str) -> None:
    tensors = {name: tensor for name, tensor in {**tiny_encoder().state_dict(), **change}.items() if tensor is not None}
    with pytest.raises(CheckFailed, match=message) as caught:
        load_strict(tiny_encoder(), tensors)
    assert "\n" not in str(caught.value)


# --- starting from another model's weights ---------------------------------------------------------------------------


def test_mean_pooling_starts_without_the_checkpoints_norm() -> None:
    mae = tiny_mae()
    model = fill(Classifier(ENCODER, num_classes=CLASSES), seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    started = start_from(model, loaded_from(mae)).state_dict()
    for name, tensor in started.items():
        fresh = name.split(".")[0] in ("fc_norm", "head")
        assert torch.equal(tensor, before[name] if fresh else mae.state_dict()[name]), name
    assert not torch.equal(before["blocks.0.norm1.weight"], mae.state_dict()["blocks.0.norm1.weight"])


def test_class_token_pooling_starts_with_the_checkpoints_norm() -> None:
    mae = tiny_mae()
    started = start_from(
        fill(Classifier(ENCODER, num_classes=CLASSES, pool="cls"), seed=1), loaded_from(mae)
    ).state_dict()
    assert torch.equal(started["norm.weight"], mae.state_dict()["norm.weight"])


def test_an_autoencoder_keeps_its_own_decoder() -> None:
    source, model = tiny_mae(seed=0), tiny_mae(seed=1)
    own = model.decoder_pred.weight.clone()
    start_from(model, loaded_from(source))
    assert torch.equal(model.decoder_pred.weight, own)
    assert torch.equal(model.blocks.get_parameter("1.mlp.fc1.weight"), source.blocks.get_parameter("1.mlp.fc1.weight"))


def test_another_image_size_interpolates_the_positions() -> None:
    source, target = tiny_encoder(), replace(ENCODER, image_size=(10, 14))
    started = start_from(fill(Encoder(target), seed=1), loaded_from(source))
    expected = interpolate_position_embedding(source.pos_embed, (3, 5), (5, 7))
    assert torch.equal(started.pos_embed, expected)


@pytest.mark.parametrize(
    ("field", "value"),
    [("patch_size", 1), ("in_chans", 1), ("embed_dim", 40), ("depth", 3), ("num_heads", 1), ("mlp_ratio", 3.0)],
)
def test_another_architecture_is_refused(field: str, value: float) -> None:
    config = replace(ENCODER, **{field: value})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"the checkpoint's encoder has {field} "):
        start_from(Encoder(config), loaded_from(tiny_encoder()))


def test_an_encoder_cannot_start_from_a_mean_pooled_classifier() -> None:
    # Such a checkpoint has no final norm: a silent start would leave a random one.
    with pytest.raises(CheckFailed, match=r"lacks 2 tensors of the encoder, norm\.weight among them"):
        start_from(Encoder(ENCODER), loaded_from(tiny_classifier("avg")))


def test_mean_pooling_starts_from_mean_pooling() -> None:
    source = tiny_classifier("avg")
    started = start_from(fill(Classifier(ENCODER, num_classes=3), seed=1), loaded_from(source))
    assert torch.equal(started.cls_token, source.cls_token)


@pytest.mark.parametrize("size", [(48, 48), (24, 56), (32, 32)])
def test_a_timm_models_positions_are_interpolated_as_timm_does(tmp_path: Path, size: tuple[int, int]) -> None:
    torch.manual_seed(3)
    model: Any = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, num_classes=7).eval()
    torch.nn.init.normal_(model.pos_embed, std=0.5)
    torch.nn.init.normal_(model.head.weight, std=0.5)
    torch.save(model.state_dict(), tmp_path / "tiny.pth")
    timm_model = {"architecture": "vit_tiny_patch16_224", "model_args": {"img_size": 32, "patch_size": 8, "depth": 1}}
    write_json(tmp_path / "config.json", {**timm_model, "pretrained_cfg": {}})
    assert main(["import", str(tmp_path / "tiny.pth"), "--out", str(tmp_path / "checkpoint")]) == 0
    loaded = at_image_size(read_weights(tmp_path / "checkpoint"), size)
    model.set_input_size(size)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        # Sums in another order: float32 rounding of logits around 5. Without timm's antialiasing: 0.3.
        torch.testing.assert_close(model_of(loaded)(images), model(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_file_of_another_precision_computes(dtype: torch.dtype, tmp_path: Path) -> None:
    """Somebody may have halved a checkpoint's file."""
    from safetensors.torch import load, save

    from tests.hostile.run import FIXTURES

    shutil.copytree(FIXTURES / "checkpoints/imported", tmp_path / "checkpoint")
    file = tmp_path / "checkpoint/model.safetensors"
    file.write_bytes(save({name: tensor.to(dtype) for name, tensor in load(file.read_bytes()).items()}))
    model, _ = load_model(tmp_path / "checkpoint")
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
