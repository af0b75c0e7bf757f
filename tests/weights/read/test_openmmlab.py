"""mmpretrain's checkpoints: renamed without loss, and what their records say of heads, target and classes is taken.

The arithmetic is mmpretrain 1.2's: tokens, predictions and logits of its own MAEViT, MAEPretrainDecoder,
VisionTransformer and ClsBatchNormNeck agreed within 5e-7 of the largest when this was written; its dependencies are too
heavy for this suite.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mae_deploy.config import from_dict
from mae_deploy.errors import CheckFailed, ConfigError
from mae_deploy.models.config import DecoderConfig, EncoderConfig
from mae_deploy.results import Result
from mae_deploy.weights.read.convert import ImportOptions, import_weights
from mae_deploy.weights.read.shapes import expected_shapes
from tests.models.tiny_models import CLASSES, DECODER, SQUARE, random_tensor, tiny_classifier, tiny_encoder, tiny_mae

NAMES = [
    (r"^decoder_norm\.", "neck.ln1."),
    (r"^(mask_token|decoder_\w+)", r"neck.\1"),
    (r"^norm\.", "backbone.ln1."),
    (r"^fc_norm\.", "backbone.ln2."),
    (r"^blocks\.", "backbone.layers."),
    (r"^patch_embed\.proj\.", "backbone.patch_embed.projection."),
    (r"^(cls_token|pos_embed)$", r"backbone.\1"),
    (r"^head\.", "head.fc."),
    (r"\.norm([12])\.", r".ln\1."),
    (r"\.mlp\.fc1\.", ".ffn.layers.0.0."),
    (r"\.mlp\.fc2\.", ".ffn.layers.1."),
]
"""The original's names to mmpretrain's, as its sources have them."""


def named_theirs(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    named: dict[str, Tensor] = OrderedDict()
    for name, tensor in tensors.items():
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        named[name] = tensor
    return named


def write_theirs(path: Path, tensors: dict[str, Tensor], config: str = "", **meta: Any) -> Path:
    """As mmengine's runner saves them."""
    torch.save(
        {"meta": {"cfg": config, "epoch": 3, "best_score": np.float64(0.7), **meta}, "state_dict": tensors}, path
    )
    return path


def test_a_pretraining_checkpoint(tmp_path: Path) -> None:
    tensors = tiny_mae(SQUARE).state_dict()
    config = """model = dict(backbone=dict(arch=dict(embed_dims=20, num_heads=5, num_layers=2), type='MAEViT'),
        neck=dict(decoder_num_heads=3, type='MAEPretrainDecoder'), head=dict(norm_pix=False, type='MAEPretrainHead'))"""
    theirs = named_theirs(tensors)
    # As mmpretrain's own documentation prints them.
    expected = {
        "backbone.ln1.weight",
        "backbone.layers.1.ffn.layers.0.0.weight",
        "neck.decoder_blocks.0.ln2.bias",
        "neck.ln1.bias",
        "neck.mask_token",
    }
    assert expected <= set(theirs)
    imported = import_weights(write_theirs(tmp_path / "epoch_3.pth", theirs, config), ImportOptions())
    assert set(imported.tensors) == set(tensors)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in imported.tensors.items())
    assert (imported.metadata.kind, imported.metadata.norm_pix_loss) == ("mae", False)
    assert from_dict(EncoderConfig, imported.metadata.encoder).num_heads == 5
    assert from_dict(DecoderConfig, imported.metadata.decoder or {}) == DECODER
    assert (imported.report["layout"], imported.report["renamed"]) == ("mmpretrain", len(tensors) - 0)


def test_without_a_record_the_heads_are_the_users(tmp_path: Path) -> None:
    file = write_theirs(tmp_path / "epoch_3.pth", named_theirs(tiny_mae(SQUARE).state_dict()))
    imported = import_weights(file, ImportOptions(num_heads=5, decoder_num_heads=3))
    assert imported.metadata.norm_pix_loss, "as in all of mmpretrain's recipes"
    assert imported.metadata.encoder["num_heads"] == 5


def test_a_fine_tuned_classifier_reads_the_average(tmp_path: Path) -> None:
    tensors, names = tiny_classifier("avg", SQUARE).state_dict(), tuple(f"class {index}" for index in range(CLASSES))
    file = write_theirs(tmp_path / "epoch_3.pth", named_theirs(tensors), dataset_meta={"classes": names})
    metadata = import_weights(file, ImportOptions(num_heads=5)).metadata
    assert (metadata.kind, metadata.pool, metadata.num_classes, metadata.class_names) == (
        "classifier",
        "avg",
        CLASSES,
        names,
    )


def test_a_linear_probe_with_its_neck(tmp_path: Path) -> None:
    tensors = tiny_classifier("cls", SQUARE).state_dict()
    mean, variance = random_tensor(20), random_tensor(20, seed=3).abs() + 0.1
    theirs = {name.replace("head.fc.", "head.layers.head."): tensor for name, tensor in named_theirs(tensors).items()}
    theirs |= {
        "neck.bn.running_mean": mean,
        "neck.bn.running_var": variance,
        "neck.bn.num_batches_tracked": torch.tensor(7),
    }
    imported = import_weights(write_theirs(tmp_path / "epoch_90.pth", theirs), ImportOptions(num_heads=5))
    assert (imported.metadata.kind, imported.metadata.pool) == ("classifier", "cls")
    assert imported.report["folded"] == ["the BatchNorm of a linear probe: into the head"]
    features = random_tensor(4, 20, seed=5)
    norm = torch.nn.BatchNorm1d(20, affine=False, eps=1e-6).eval()
    norm.load_state_dict({"running_mean": mean, "running_var": variance}, strict=False)
    expected = torch.nn.functional.linear(norm(features), tensors["head.weight"], tensors["head.bias"])
    torch.testing.assert_close(
        torch.nn.functional.linear(features, imported.tensors["head.weight"], imported.tensors["head.bias"]), expected
    )


def test_their_small_vit_has_eight_heads(tmp_path: Path) -> None:
    config = EncoderConfig(
        name="small", image_size=(16, 16), patch_size=16, embed_dim=768, depth=8, num_heads=8, mlp_ratio=3
    )
    tensors = {name: torch.zeros(shape, dtype=torch.float16) for name, shape in expected_shapes(config, None).items()}
    assert (
        import_weights(write_theirs(tmp_path / "small.pth", named_theirs(tensors)), ImportOptions()).metadata.encoder[
            "num_heads"
        ]
        == 8
    )


def test_a_backbone_alone(tmp_path: Path) -> None:
    tensors = tiny_encoder(SQUARE).state_dict()
    theirs = {name.removeprefix("backbone."): tensor for name, tensor in named_theirs(tensors).items()}
    imported = import_weights(write_theirs(tmp_path / "backbone.pth", theirs), ImportOptions(num_heads=5))
    assert imported.metadata.kind == "encoder"
    assert set(imported.tensors) == set(tensors)


def test_two_norms_at_the_end_are_refused(tmp_path: Path) -> None:
    theirs = named_theirs(tiny_classifier("avg", SQUARE).state_dict())
    theirs |= {"backbone.ln1.weight": torch.ones(20), "backbone.ln1.bias": torch.zeros(20)}
    with pytest.raises(ConfigError, match="a norm before pooling"):
        import_weights(write_theirs(tmp_path / "both.pth", theirs), ImportOptions(num_heads=5))


def test_what_remains_is_named(tmp_path: Path) -> None:
    theirs = {**named_theirs(tiny_encoder(SQUARE).state_dict()), "backbone.layers.0.attn.gamma1.weight": torch.ones(20)}
    with pytest.raises(CheckFailed, match=r"1 unexpected: blocks\.0\.attn\.gamma1\.weight") as caught:
        import_weights(write_theirs(tmp_path / "scaled.pth", theirs), ImportOptions(num_heads=5))
    assert isinstance(caught.value.result, Result)
    entry = {"name": "blocks.0.attn.gamma1.weight", "in_file": "backbone.layers.0.attn.gamma1.weight", "found": [20]}
    assert caught.value.result.data["unexpected"] == [entry]
