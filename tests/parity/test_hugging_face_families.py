"""What transformers computes with the same weights: DINOv2, DINOv3 and SigLIP's vision towers, at other sizes too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SiglipConfig,
    SiglipForImageClassification,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from mae_deploy.errors import ConfigError
from mae_deploy.models.vit import Encoder
from mae_deploy.weights.load import LoadedWeights, at_image_size, model_of
from mae_deploy.weights.read.convert import ImportOptions, import_weights
from tests.models.tiny_models import random_tensor
from tests.parity.test_timm_families import assert_close, settled

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 4,
}
MLP: dict[str, Any] = {"intermediate_size": 96}
TEXT: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
IDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2}


def siglip_config(**more: Any) -> SiglipConfig:
    return SiglipConfig(vision_config={**SIZES, **MLP}, text_config={**TEXT, **MLP, **IDS}, **more)


MODELS: dict[str, Any] = {
    "vit": lambda: ViTModel(ViTConfig(**SIZES, **MLP, layer_norm_eps=1e-5, hidden_act="gelu_pytorch_tanh")),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**SIZES)),
    "dinov2 SwiGLU": lambda: Dinov2Model(Dinov2Config(**SIZES, use_swiglu_ffn=True, qkv_bias=False)),
    "dinov2 registers": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SIZES, num_register_tokens=3)),
    "dinov3": lambda: DINOv3ViTModel(DINOv3ViTConfig(**SIZES, **MLP, num_register_tokens=4)),
    "dinov3 gated": lambda: DINOv3ViTModel(
        DINOv3ViTConfig(**SIZES, **MLP, use_gated_mlp=True, hidden_act="silu", rope_theta=50.0, query_bias=False)
    ),
    "siglip tower": lambda: SiglipVisionModel(SiglipVisionConfig(**SIZES, **MLP)),
    "siglip": lambda: SiglipModel(siglip_config()),
}


def loaded(model: Any, folder: Path) -> LoadedWeights:
    model.save_pretrained(folder)
    found = import_weights(folder, ImportOptions())
    return LoadedWeights(found.metadata, found.tensors, {})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_every_output_is_transformers(tmp_path: Path, kind: str) -> None:
    theirs = settled(MODELS[kind]())
    weights = loaded(theirs, tmp_path)
    family = "vit" if kind == "dinov2" else kind.split()[0]  # whose LayerScale folds into the original's ViT
    assert weights.encoder_config.name.startswith(family)
    tower: Any = theirs.vision_model if kind == "siglip" else theirs
    given = {} if kind.startswith("dino") else {"interpolate_pos_encoding": True}
    for size in (None, (40, 48)):
        weights = at_image_size(weights, size)
        ours = model_of(weights)
        images = random_tensor(2, 3, *ours.config.image_size)
        expected = tower(images, **given)
        latent: Tensor = expected.last_hidden_state
        assert_close(Encoder.forward(ours, images), latent)
        if kind.startswith("siglip"):
            assert_close(ours.pool_latent(latent), expected.pooler_output)


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_a_siglip_classifier(tmp_path: Path) -> None:
    theirs = settled(SiglipForImageClassification(siglip_config(num_labels=3)))
    ours, images = model_of(loaded(theirs, tmp_path)), random_tensor(2, 3, 28, 28)
    assert_close(ours(images), theirs(images).logits)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Dinov2ForImageClassification(Dinov2Config(**SIZES)), "the class token and the mean of the patches"),
        (lambda: DINOv3ViTModel(DINOv3ViTConfig(**SIZES, **MLP, hidden_act="relu")), "hidden_act relu"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(tmp_path: Path, make: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        loaded(make(), tmp_path)


def test_a_file_without_its_config_is_refused(tmp_path: Path) -> None:
    DINOv3ViTModel(DINOv3ViTConfig(**SIZES, **MLP)).save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"no config\.json is beside it"):
        import_weights(tmp_path / "model.safetensors", ImportOptions())
