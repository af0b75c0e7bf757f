"""MAE-Lite's checkpoints: the model out of its training, with the heads that its tensors do not show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mae_deploy.errors import ConfigError
from mae_deploy.models.config import DecoderConfig, EncoderConfig
from mae_deploy.models.mae import MaskedAutoencoder
from mae_deploy.models.vit import Classifier
from mae_deploy.weights.read.convert import Imported, ImportOptions, import_weights
from tests.models.tiny_models import fill

# MAE-Lite's ViT-T, shallow: the width tells it.
TINY = EncoderConfig(name="lite", image_size=(32, 32), patch_size=16, embed_dim=192, depth=2, num_heads=12)
LITE_DECODER = DecoderConfig(decoder_depth=1, decoder_embed_dim=96, decoder_num_heads=3)
RECORDS = {"start_epoch": 400, "best_top1": 0.0, "best_top5": 0.0, "best_top1_epoch": 0, "scheduler": {}, "scaler": {}}


def lite_mae() -> dict[str, Tensor]:
    return dict(fill(MaskedAutoencoder(TINY, LITE_DECODER)).state_dict())


def import_lite(
    file: Path,
    tensors: dict[str, Tensor],
    prefix: str = "module.model.",
    records: dict[str, Any] = RECORDS,
    **options: Any,
) -> Imported:
    torch.save(
        {**records, "optimizer": {}, "model": {f"{prefix}{name}": tensor for name, tensor in tensors.items()}}, file
    )
    return import_weights(file, ImportOptions(**options))


@pytest.mark.parametrize("prefix", ["module.model.", "model."])
def test_the_model_of_a_training(tmp_path: Path, prefix: str) -> None:
    tensors = lite_mae()
    imported = import_lite(tmp_path / "last_epoch_ckpt.pth.tar", tensors, prefix)
    assert set(imported.tensors) == set(tensors)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in imported.tensors.items())
    assert imported.report["layout"] == "MAE-Lite"
    assert imported.metadata.encoder["num_heads"] == 12
    assert imported.metadata.decoder == {"decoder_depth": 1, "decoder_embed_dim": 96, "decoder_num_heads": 3}


def test_parts_of_training_are_left_aside(tmp_path: Path) -> None:
    more = {
        "ema_model.module.norm.weight": torch.zeros(192),
        "tch_model.norm.weight": torch.zeros(768),
        "attn_adapter.adapter11.weight": torch.zeros(12, 12, 1, 1),
    }
    torch.save(
        {**RECORDS, "model": {**{f"model.{name}": tensor for name, tensor in lite_mae().items()}, **more}},
        tmp_path / "last_epoch_ckpt.pth.tar",
    )
    imported = import_weights(tmp_path / "last_epoch_ckpt.pth.tar", ImportOptions())
    assert set(imported.tensors) == set(lite_mae())
    assert imported.report["dropped"] == ["attn_adapter.*", "ema_model.*", "tch_model.*"]


def test_a_fine_tuned_one(tmp_path: Path) -> None:
    tensors = dict(fill(Classifier(TINY, num_classes=5)).state_dict())
    metadata = import_lite(tmp_path / "mae_tiny_400e_ft_300e.pth.tar", tensors, "model.", {}).metadata
    assert (metadata.kind, metadata.pool, metadata.num_classes, metadata.encoder["num_heads"]) == (
        "classifier",
        "avg",
        5,
        12,
    )


def test_others_with_that_prefix_are_none_of_its(tmp_path: Path) -> None:
    # A ViT-T of anybody else has 3 heads, and the tensors are the same.
    imported = import_lite(tmp_path / "lightning.pth", lite_mae(), "model.", {})
    assert (imported.metadata.encoder["num_heads"], imported.report["layout"]) == (3, "original or timm")
    assert any("the heads are not in the file: 3" in note for note in imported.report["notes"])
    asked = import_lite(tmp_path / "lightning.pth", lite_mae(), "model.", {}, num_heads=12)
    assert asked.metadata.encoder["num_heads"] == 12


def test_decoupled_distillation_leaves_its_encoder(tmp_path: Path) -> None:
    # A third block with nothing but a query and key; the decoder reads an earlier one.
    tensors = lite_mae()
    half = {
        f"blocks.2.{name.removeprefix('blocks.1.')}": tensor
        for name, tensor in tensors.items()
        if name.startswith(("blocks.1.norm1", "blocks.1.attn.qkv"))
    }
    imported = import_lite(tmp_path / "mae_tiny_distill_d2_400e.pth.tar", {**tensors, **half})
    assert imported.metadata.kind == "encoder"
    assert imported.metadata.encoder["depth"] == 2
    assert set(half) < set(imported.report["dropped"])
    assert "earlier block" in imported.report["notes"][0]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("blocks.0.attn.rpe.relative_position_bias_table", "relative positions"),
        ("head_dist.weight", "a distillation token"),
        ("blocks.0.attn.q_bias", "BEiT"),
    ],
)
def test_what_its_other_recipes_add_is_refused(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        import_lite(tmp_path / "mae_tiny_400e_ft_rpe_1000e.pth.tar", {**lite_mae(), name: torch.zeros(3)})
