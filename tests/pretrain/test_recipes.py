"""Every recipe of pretraining and what judges it resolves, and those of the paper have the paper's numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mae_deploy.config import from_dict, merge
from mae_deploy.evaluation.config import LinprobeConfig
from mae_deploy.models.config import ObjectiveConfig
from mae_deploy.pretrain.config import FinetuneConfig, PretrainConfig
from mae_deploy.recipe import RECIPES, read_recipe
from mae_deploy.training.config import OptimConfig

STAGES: dict[str, tuple[type, dict[str, str]]] = {
    "pretrain": (PretrainConfig, {}),
    "ablation": (PretrainConfig, {}),
    "finetune": (FinetuneConfig, {"init": "run"}),
    "linprobe": (LinprobeConfig, {"init": "run"}),
}
DOCS = Path(__file__).parents[2] / "docs" / "recipes.md"


def resolve(name: str) -> Any:
    config, more = STAGES[name.partition("-")[0]]
    return from_dict(config, merge(read_recipe(name), {"data": "images", "out": "run", **more}))


def effective(optim: OptimConfig) -> int:
    return optim.batch_size * optim.accum_iter


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in RECIPES.glob("*.yaml") if not path.stem.startswith(("quickstart", "distill")))
)
def test_every_recipe_resolves_and_is_documented(name: str) -> None:
    resolve(name)
    assert f"`{name}`" in DOCS.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("size", "patch", "width", "depth", "heads"),
    [("base", 16, 768, 12, 12), ("large", 16, 1024, 24, 16), ("huge", 14, 1280, 32, 16)],
)
@pytest.mark.parametrize("epochs", [400, 800, 1600])
def test_pretraining_is_table_8(size: str, epochs: int, patch: int, width: int, depth: int, heads: int) -> None:
    config = resolve(f"pretrain-vit-{size}" + ("" if epochs == 800 else f"-{epochs}"))
    model, optim = config.model, config.optim
    assert (model.patch, model.width, model.blocks, model.heads, model.image_size) == (
        patch,
        width,
        depth,
        heads,
        (224, 224),
    )
    assert (optim.epochs, effective(optim), optim.blr, optim.lr, optim.min_lr, optim.warmup_epochs) == (
        epochs,
        4096,
        1.5e-4,
        None,
        0,
        40,
    )
    assert (optim.betas, optim.weight_decay, optim.clip_grad) == ((0.9, 0.95), 0.05, None)
    assert (config.mask_ratio, config.mask_sampling, config.norm_pix_loss, config.objective) == (
        0.75,
        "random",
        True,
        ObjectiveConfig(),
    )
    assert (config.decoder.decoder_depth, config.decoder.decoder_embed_dim, config.decoder.heads) == (8, 512, 16)
    assert (config.augment.min_scale, config.augment.max_scale, config.augment.hflip, config.augment.color_jitter) == (
        0.2,
        1.0,
        0.5,
        0,
    )


@pytest.mark.parametrize(
    ("name", "epochs", "blr", "layer_decay", "drop_path"),
    [
        ("base", 100, 5e-4, 0.65, 0.1),
        ("large", 50, 1e-3, 0.75, 0.2),
        ("huge", 50, 1e-3, 0.75, 0.3),
        ("huge-448", 50, 1e-3, 0.75, 0.3),
    ],
)
def test_fine_tuning_is_table_9(name: str, epochs: int, blr: float, layer_decay: float, drop_path: float) -> None:
    config = resolve(f"finetune-vit-{name}")
    optim, mix = config.optim, config.mix
    assert (optim.epochs, effective(optim), optim.blr, optim.min_lr, optim.warmup_epochs) == (
        epochs,
        1024,
        blr,
        1e-6,
        5,
    )
    assert (optim.betas, optim.weight_decay) == ((0.9, 0.999), 0.05)
    assert (config.layer_decay, mix.drop_path, config.pool) == (layer_decay, drop_path, "avg")
    assert (mix.label_smoothing, mix.mixup, mix.cutmix, mix.reprob, mix.auto_augment) == (
        0.1,
        0.8,
        1.0,
        0.25,
        "rand-m9-mstd0.5-inc1",
    )
    assert config.image_size == ((448, 448) if name == "huge-448" else None)


@pytest.mark.parametrize("size", ["base", "large", "huge"])
def test_linear_probing_is_table_10(size: str) -> None:
    config = resolve(f"linprobe-vit-{size}")
    optim = config.optim
    assert (optim.epochs, effective(optim), optim.blr, optim.weight_decay, optim.warmup_epochs) == (
        90,
        16384,
        0.1,
        0,
        10,
    )
    assert (config.solver, config.pool) == ("lars", "cls")


def test_simmim() -> None:
    """Xie et al., section 4.1.2, and its published configuration."""
    config = resolve("pretrain-simmim-vit-base")
    assert config.objective == ObjectiveConfig(encoder_mask_tokens=True, loss="l1")
    assert (config.decoder.decoder_depth, config.mask_ratio, config.mask_unit, config.norm_pix_loss) == (
        0,
        0.6,
        2,
        False,
    )
    # 1e-4 for 512 images.
    assert (effective(config.optim), config.optim.blr * effective(config.optim) / 256) == (2048, pytest.approx(4e-4))


def test_cifar10_is_that_of_the_best_known_public_figure() -> None:
    pretrain, finetune = resolve("pretrain-cifar10"), resolve("finetune-cifar10")
    model, decoder = pretrain.model, pretrain.decoder
    assert (model.patch, model.width, model.blocks, model.heads, model.image_size) == (2, 192, 12, 3, (32, 32))
    assert (decoder.decoder_depth, decoder.decoder_embed_dim, decoder.heads) == (4, 192, 3)
    assert (pretrain.optim.epochs, effective(pretrain.optim), pretrain.augment.crop) == (2000, 4096, "none")
    assert (finetune.optim.epochs, effective(finetune.optim), finetune.layer_decay, finetune.pool) == (
        100,
        1024,
        1.0,
        "cls",
    )


def test_the_ablations_are_on_plain_pixels() -> None:
    config = resolve("ablation-vit-large")
    assert (config.model.name, config.optim.epochs, config.norm_pix_loss) == ("vit_large_patch16", 800, False)
