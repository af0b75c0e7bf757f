"""A linear probe's BatchNorm vanishes into its head without changing a logit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mae_deploy.errors import CheckFailed
from mae_deploy.models.vit import Classifier
from mae_deploy.weights.load import LoadedWeights, model_of
from mae_deploy.weights.read.convert import ImportOptions, import_weights
from mae_deploy.weights.read.linear_probe import fold_batch_norm
from tests.models.tiny_models import SQUARE, random_images, random_tensor, tiny_classifier, write_original


def probe(*, affine: bool = False) -> nn.Sequential:
    """A head as the original's main_linprobe.py makes it, with statistics of widely different size."""
    norm = nn.BatchNorm1d(20, affine=affine, eps=1e-6)
    with torch.no_grad():
        norm.running_mean.copy_(random_tensor(20) * 3)  # type: ignore[union-attr]
        norm.running_var.copy_(10 ** random_tensor(20, seed=2))  # type: ignore[union-attr]
        for seed, parameter in enumerate(norm.parameters()):
            parameter.copy_(random_tensor(20, seed=seed + 5))
    head = nn.Linear(20, 11)
    with torch.no_grad():
        head.weight.copy_(random_tensor(11, 20, seed=3))
        head.bias.copy_(random_tensor(11, seed=4))
    return nn.Sequential(norm, head).eval()


def assert_same_logits(logits: Tensor, expected: Tensor) -> None:
    """float32: 20 products, and what a variance of 0.01 makes of their rounding."""
    assert ((logits - expected).abs().max() / expected.abs().max()).item() < 2e-6


@pytest.mark.parametrize("affine", [False, True])
def test_the_logits_stay(affine: bool) -> None:
    model = probe(affine=affine)
    tensors = {f"head.{name}": tensor for name, tensor in model.state_dict().items()}
    assert "head.0.num_batches_tracked" in tensors
    fold_batch_norm(tensors, "head.0", "head.1")
    assert set(tensors) == {"head.weight", "head.bias"}
    features = random_tensor(64, 20, seed=9)
    assert_same_logits(nn.functional.linear(features, tensors["head.weight"], tensors["head.bias"]), model(features))


@pytest.mark.parametrize("pool", ["cls", "avg"])
def test_an_originals_checkpoint(tmp_path: Path, pool: str) -> None:
    backbone, head = tiny_classifier("cls" if pool == "cls" else "avg", SQUARE), probe()
    tensors = {name: tensor for name, tensor in backbone.state_dict().items() if not name.startswith("head.")}
    tensors |= {f"head.{name}": tensor for name, tensor in head.state_dict().items()}
    imported = import_weights(write_original(tmp_path / "checkpoint-89.pth", tensors), ImportOptions(num_heads=5))
    assert imported.report["folded"] == ["the BatchNorm of a linear probe: into the head"]
    assert (imported.metadata.kind, imported.metadata.pool, imported.metadata.num_classes) == ("classifier", pool, 11)
    model, images = model_of(LoadedWeights(imported.metadata, imported.tensors, {})), random_images(SQUARE)
    assert isinstance(model, Classifier)
    with torch.no_grad():
        assert_same_logits(model(images), head(backbone.forward_pooled(images)))


@pytest.mark.parametrize("lost", ["head.0.running_var", "head.1.weight", "head.1.bias"])
def test_parts_that_do_not_fit(lost: str) -> None:
    tensors = {f"head.{name}": tensor for name, tensor in probe().state_dict().items()}
    del tensors[lost]
    with pytest.raises(CheckFailed, match=r"BatchNorm head\.0 and the linear layer head\.1 do not fit"):
        fold_batch_norm(tensors, "head.0", "head.1")
