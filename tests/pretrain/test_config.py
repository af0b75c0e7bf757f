"""Settings that cannot work are refused where they are given, with the value in the message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mae_deploy.errors import ConfigError
from mae_deploy.models.config import DecoderConfig, ObjectiveConfig
from mae_deploy.pretrain.config import FinetuneConfig, MixConfig, PretrainConfig
from mae_deploy.training.config import OptimConfig
from tests.training.tiny_runs import pretraining

HERE = Path()


def test_the_papers_recipes_are_the_defaults() -> None:
    """Tables 8 and 9."""
    pretrain = PretrainConfig(data=str(HERE), out=HERE)
    assert pretrain.optim == OptimConfig(epochs=800, blr=1.5e-4, weight_decay=0.05, betas=(0.9, 0.95), min_lr=0.0)
    assert (pretrain.mask_ratio, pretrain.norm_pix_loss, pretrain.augment.min_scale, pretrain.augment.hflip) == (
        0.75,
        True,
        0.2,
        0.5,
    )
    assert (pretrain.decoder.decoder_depth, pretrain.decoder.decoder_embed_dim, pretrain.decoder.decoder_num_heads) == (
        8,
        512,
        16,
    )
    finetune = FinetuneConfig(data=HERE, out=HERE, init=HERE)
    assert finetune.optim == OptimConfig(epochs=100, blr=5e-4, weight_decay=0.05, betas=(0.9, 0.999), min_lr=1e-6)
    assert (finetune.layer_decay, finetune.augment.min_scale) == (0.65, 0.08)
    assert finetune.mix == MixConfig(
        drop_path=0.1, label_smoothing=0.1, mixup=0.8, cutmix=1.0, reprob=0.25, auto_augment="rand-m9-mstd0.5-inc1"
    )


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1])
def test_mask_ratios_that_are_none(ratio: float) -> None:
    with pytest.raises(ConfigError, match=f"--mask-ratio must be above 0 and below 1, got {ratio}"):
        pretraining(HERE, HERE, mask_ratio=ratio)


def test_mask_ratios_that_leave_nothing() -> None:
    """Of six patches, a ratio of 0.05 leaves int(6 · 0.95) = 5 to see and one to predict; 0.9 leaves none to see."""
    assert pretraining(HERE, HERE, mask_ratio=0.05).mask_ratio == 0.05
    with pytest.raises(ConfigError, match=r"--mask-ratio 0\.9 of 6 patches leaves nothing to see"):
        pretraining(HERE, HERE, mask_ratio=0.9)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"drop_path": 1.0}, "--drop-path must be at least 0 and below 1, got 1.0"),
        ({"label_smoothing": -0.1}, "--label-smoothing must be at least 0 and below 1, got -0.1"),
        ({"reprob": 1.0}, "--reprob must be at least 0 and below 1, got 1.0"),
        ({"mixup": -1.0}, "--mixup must be at least 0, got -1.0"),
    ],
)
def test_impossible_regularisation(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MixConfig(**values)


def test_none_turns_rand_augment_off() -> None:
    assert MixConfig(auto_augment="none").auto_augment is None
    assert MixConfig(auto_augment="None").auto_augment is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mask_sampling": "grid", "mask_ratio": 0.75}, "even number of patches down and across, not 3x2"),
        ({"mask_sampling": "block"}, "at least 4x4 patches"),
        ({"mask_patch_size": 7}, "--mask-patch-size 7 is not a multiple of the patch size, 5"),
        ({"mask_patch_size": 10}, "does not divide a grid of 3x2"),
        ({"decoder": DecoderConfig(decoder_depth=0)}, "--decoder-depth 0 leaves masked patches"),
        ({"objective": ObjectiveConfig(target="features")}, "--target features needs --teacher"),
        ({"teacher": HERE}, f"--teacher {HERE} needs --target features, not pixels"),
        (
            {"teacher": HERE, "objective": ObjectiveConfig(target="features", target_dim=3)},
            "--target-dim 3 cannot be chosen",
        ),
        (
            {"objective": ObjectiveConfig(target="pca", target_dim=76)},
            "--target-dim 76 is more than the 75 numbers of a patch",
        ),
    ],
)
def test_objectives_that_do_not_go_together(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pretraining(HERE, HERE, **values)


def test_other_numbers() -> None:
    with pytest.raises(ConfigError, match="--pictures-every must be at least 1, got 0"):
        pretraining(HERE, HERE, pictures_every=0)
    for decay in (0.0, 1.1):
        with pytest.raises(ConfigError, match=f"--layer-decay must be above 0 and at most 1, got {decay}"):
            FinetuneConfig(data=HERE, out=HERE, init=HERE, layer_decay=decay)
