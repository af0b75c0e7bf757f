"""torchvision's ViTs compute here what they compute there."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.models import ViT_B_16_Weights
from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

from mae_deploy.checkpoint import NON_COMMERCIAL, UNKNOWN_LICENCE
from mae_deploy.config import from_dict
from mae_deploy.errors import ConfigError
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.weights.load import LoadedWeights, at_image_size, model_of
from mae_deploy.weights.read.convert import Imported, ImportOptions, import_weights

SIZES: dict[str, Any] = {"patch_size": 8, "num_layers": 2, "num_heads": 3, "hidden_dim": 48, "mlp_dim": 80}
OPTIONS = ImportOptions(num_heads=3)


def torchvision_vit(image_size: int = 40, **settings: Any) -> VisionTransformer:
    torch.manual_seed(5)
    model = VisionTransformer(image_size=image_size, **SIZES, **{"num_classes": 7, **settings}).eval()
    for tensor in model.state_dict().values():
        tensor.normal_(std=0.3)
    return model


def logits_of(imported: Imported, images: torch.Tensor, size: int | None = None) -> torch.Tensor:
    loaded = LoadedWeights(imported.metadata, imported.tensors, {})
    with torch.no_grad():
        logits: torch.Tensor = model_of(at_image_size(loaded, None if size is None else (size, size)))(images)
    return logits


@pytest.mark.parametrize("old", [False, True], ids=["names of today", "names before 0.14"])
def test_logits_are_torchvisions(tmp_path: Path, old: bool) -> None:
    model, images = torchvision_vit(), torch.randn(2, 3, 40, 40)
    tensors = model.state_dict()
    if old:
        tensors = {
            name.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): tensor
            for name, tensor in tensors.items()
        }
    torch.save(tensors, tmp_path / "vit.pth")
    imported = import_weights(tmp_path / "vit.pth", OPTIONS)
    assert (imported.metadata.kind, imported.metadata.pool, imported.report["layout"]) == (
        "classifier",
        "cls",
        "torchvision",
    )
    with torch.no_grad():
        expected = model(images)
    # Sums in another order: float32 rounding of logits around 5.
    torch.testing.assert_close(logits_of(imported, images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("at_import", [False, True], ids=["at export", "at import"])
def test_another_image_size_is_interpolated_as_torchvision_does(tmp_path: Path, at_import: bool) -> None:
    model, images = torchvision_vit(), torch.randn(2, 3, 56, 56)
    torch.save({"model": model.state_dict()}, tmp_path / "vit.pth")
    larger = torchvision_vit(56)
    larger.load_state_dict(interpolate_embeddings(56, 8, OrderedDict(model.state_dict())))
    options = ImportOptions(num_heads=3, image_size=(56, 56) if at_import else None)
    imported = import_weights(tmp_path / "vit.pth", options)
    with torch.no_grad():
        expected = larger(images)
    torch.testing.assert_close(logits_of(imported, images, 56), expected, rtol=1e-5, atol=1e-5)


def test_a_release_is_known_by_its_file_name(tmp_path: Path) -> None:
    torch.save(torchvision_vit(num_classes=1000).state_dict(), tmp_path / "vit_b_16_swag-9ac1b537.pth")
    imported = import_weights(tmp_path / "vit_b_16_swag-9ac1b537.pth", OPTIONS)
    preprocess = from_dict(Preprocess, imported.metadata.preprocess)
    assert (preprocess.crop_pct, preprocess.interpolation, imported.metadata.licence) == (
        1.0,
        "bicubic",
        NON_COMMERCIAL,
    )
    names = ViT_B_16_Weights.IMAGENET1K_V1.meta["categories"]
    assert imported.metadata.class_names == tuple(names)


def test_other_files_get_the_usual_preprocessing_and_say_so(tmp_path: Path) -> None:
    torch.save(torchvision_vit().state_dict(), tmp_path / "mine.pth")
    imported = import_weights(tmp_path / "mine.pth", OPTIONS)
    preprocess = from_dict(Preprocess, imported.metadata.preprocess)
    assert (preprocess.crop_pct, preprocess.interpolation, imported.metadata.licence) == (
        0.875,
        "bilinear",
        UNKNOWN_LICENCE,
    )
    assert "guessed, that of most of torchvision's ViTs" in imported.report["preprocess_from"]


def test_a_layer_before_the_head_is_refused(tmp_path: Path) -> None:
    torch.save(torchvision_vit(representation_size=5).state_dict(), tmp_path / "vit.pth")
    with pytest.raises(ConfigError, match=r"heads\.pre_logits\.weight, and our encoder and classifier have neither"):
        import_weights(tmp_path / "vit.pth", OPTIONS)
