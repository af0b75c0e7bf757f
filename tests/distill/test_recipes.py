"""Every recipe of distillation resolves, is documented, and has the objectives of its paper."""

from __future__ import annotations

from pathlib import Path

import pytest

from mae_deploy.config import from_dict, merge
from mae_deploy.distill.build import objective_weights
from mae_deploy.distill.config import DistillConfig, RunKind
from mae_deploy.distill.masks import Masks
from mae_deploy.distill.student import student_encoder
from mae_deploy.recipe import RECIPES, read_recipe

DOCS = Path(__file__).parents[2] / "docs" / "recipes.md"
OBJECTIVES: dict[str, dict[str, float]] = {
    "dmae": {"feature": 1, "pixel": 1},
    "tinymim": {"relation": 1},
    "g2sd-generic": {"decoder_feature": 1},
    "g2sd-specific": {"logits": 0.5, "label": 0.5},
    "cifar10-cpu-features": {"feature": 1},
    "cifar10-cpu-logits": {"logits": 1, "label": 0.5},
    "backbone": {"feature": 1, "cls": 1},
    "photos-160-features": {"feature": 1},
    "photos-160-logits": {"logits": 1, "label": 0.5},
}
NAMES = sorted(path.stem for path in RECIPES.glob("distill-*.yaml"))


def resolve(name: str) -> DistillConfig:
    return from_dict(DistillConfig, merge(read_recipe(name), {"data": "images", "teacher": "teacher", "out": "run"}))


def weights(config: DistillConfig) -> dict[str, float]:
    assert config.objective != "auto"
    kind: RunKind = config.objective
    masks = Masks(config, kind, student_encoder(config, image_size=(224, 224), in_chans=3))
    return {name: weight.value for name, weight in objective_weights(config, kind, masked=masks.always).items()}


def test_all_families_are_there() -> None:
    assert {family for family in OBJECTIVES if any(family in name for name in NAMES)} == set(OBJECTIVES)


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_resolves_and_is_documented(name: str) -> None:
    (expected,) = (objectives for family, objectives in OBJECTIVES.items() if family in name)
    assert weights(resolve(name)) == expected
    assert f"`{name}`" in DOCS.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "epochs", "batch"),
    [
        ("dmae-vit-base", 100, 4096),
        ("tinymim-vit-base", 300, 4096),
        ("g2sd-generic-vit-small", 300, 4096),
        ("g2sd-specific-vit-small", 200, 1024),
    ],
)
def test_epochs_and_effective_batches(name: str, epochs: int, batch: int) -> None:
    optim = resolve(f"distill-{name}").optim
    assert (optim.epochs, optim.batch_size * optim.accum_iter) == (epochs, batch)
