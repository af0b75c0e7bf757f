"""Encoder and classifier compute what timm's `VisionTransformer` computes with the same weights, and the weights go both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mae_deploy.models.convert import ImportOptions, import_weights
from mae_deploy.models.load import Loaded, model_of
from mae_deploy.models.vit import Classifier, Encoder
from tests.models.tiny_models import fill, random_tensor

# 3x5 patches take the explicit attention, 5x14 the fused one (EXPLICIT_ATTENTION_TOKENS).
IMAGE_SIZES = [(48, 80), (80, 224)]
CLASSES = 7


def timm_vit(image_size: tuple[int, int], **settings: Any) -> Any:
    return fill(timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=image_size, depth=2, num_classes=CLASSES, **settings))


def imported_from(model: nn.Module, folder: Path, image_size: tuple[int, int]) -> Encoder:
    save_file(model.state_dict(), folder / "model.safetensors")
    imported = import_weights(folder / "model.safetensors", ImportOptions(image_size=image_size))
    return model_of(Loaded(imported.metadata, imported.tensors, {}))


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """Within 1e-5 of the largest number: float32 sums of up to 768 products through two blocks, in another order."""
    assert ours.shape == theirs.shape
    assert ((ours - theirs).abs().max() / theirs.abs().max()).item() < 1e-5


@pytest.mark.parametrize("image_size", IMAGE_SIZES)
@pytest.mark.parametrize("channels", [1, 3])
def test_encoder(tmp_path: Path, image_size: tuple[int, int], channels: int) -> None:
    theirs = timm_vit(image_size, global_pool="token", in_chans=channels)
    theirs.reset_classifier(0)
    ours = imported_from(theirs, tmp_path, image_size)
    assert type(ours) is Encoder
    images = random_tensor(3, channels, *image_size)
    with torch.no_grad():
        assert_close(ours(images), theirs.forward_features(images))


@pytest.mark.parametrize("image_size", IMAGE_SIZES)
@pytest.mark.parametrize(("pooling", "pool"), [("avg", "avg"), ("token", "cls")])
def test_classifier(tmp_path: Path, image_size: tuple[int, int], pooling: str, pool: str) -> None:
    theirs = timm_vit(image_size, global_pool=pooling, fc_norm=pooling == "avg")
    ours = imported_from(theirs, tmp_path, image_size)
    assert isinstance(ours, Classifier)
    assert ours.pool == pool
    images = random_tensor(3, 3, *image_size)
    with torch.no_grad():
        assert_close(ours.forward_pooled(images), theirs.forward_head(theirs.forward_features(images), pre_logits=True))
        assert_close(ours(images), theirs(images))


def test_our_weights_load_in_timm(tmp_path: Path) -> None:
    theirs = timm_vit((48, 80), global_pool="avg", fc_norm=True)
    ours = imported_from(theirs, tmp_path, (48, 80))
    fill(ours, seed=3)
    theirs.load_state_dict(ours.state_dict())
    images = random_tensor(3, 3, 48, 80)
    with torch.no_grad():
        assert_close(theirs(images), ours(images))
