"""The student's view: by mask ratio, by keep ratio, whole; and which draw it follows from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mae_deploy.distill.config import CacheConfig, DistillConfig, FeatureObjectiveConfig, RunKind
from mae_deploy.distill.masks import Masks
from mae_deploy.errors import ConfigError
from mae_deploy.models.masking import random_masking
from mae_deploy.training.step import StepBatch
from tests.models.tiny_models import ENCODER, random_images

N = ENCODER.num_patches


def masks(kind: RunKind = "features", **more: Any) -> Masks:
    config = DistillConfig(
        data=Path("data"), teacher=Path("teacher"), student="vit_nano_patch4", out=Path("out"), **more
    )
    return Masks(config, kind, ENCODER)


def batch(step: int = 0, **more: Any) -> StepBatch:
    return StepBatch(random_images(), torch.zeros(3, dtype=torch.int64), step=step, **more)


def test_the_mask_ratio_is_the_runs_on_features() -> None:
    found = masks(features=FeatureObjectiveConfig(mask_ratio=0.6))
    view = found(batch())
    assert view is not None
    assert all(map(torch.equal, view, random_masking(batch().rand(N), 0.6)))
    assert (found.always, found.ever, found.settings) == (True, True, {"mask_ratio": 0.6})
    on_logits = masks("logits", features=FeatureObjectiveConfig(mask_ratio=0.6))
    assert (on_logits(batch()), on_logits.always, on_logits.ever, on_logits.settings) == (None, False, False, None)


def test_the_whole_image() -> None:
    found = masks(features=FeatureObjectiveConfig(mask_ratio=0.0))
    assert (found(batch()), found.always, found.ever, found.settings) == (None, False, False, None)


@pytest.mark.parametrize("kind", ["features", "logits"])
def test_a_number_of_patches_for_each_step(kind: RunKind) -> None:
    found = masks(kind, keep_ratio=(0.2, 1.0))
    assert (found.always, found.ever, found.settings) == (False, True, None)
    views = [found(batch(step)) for step in range(60)]
    assert {N if view is None else view.ids_keep.shape[1] for view in views} == set(range(3, N + 1))


def test_one_number_of_patches() -> None:
    found = masks("logits", keep_ratio=(0.4, 0.4))
    view = found(batch())
    assert view is not None
    assert view.ids_keep.shape == (3, 6)
    assert (found.always, found.settings) == (True, {"kept": 6})


def test_fixed_views_have_masks_of_their_own() -> None:
    given = {"items": torch.tensor([4, 5, 4]), "view": torch.tensor([0, 0, 1])}
    fixed = masks(features=FeatureObjectiveConfig(mask_ratio=0.6), caching=CacheConfig(fixed_views=2))
    first, later = fixed(batch(0, **given)), fixed(batch(7, **given))
    assert first is not None
    assert later is not None
    assert torch.equal(first.ids_keep, later.ids_keep)
    assert not torch.equal(first.ids_keep[0], first.ids_keep[2])
    other = replace(batch(7, **given), items=torch.tensor([3, 5, 9]))
    again = fixed(other)
    assert again is not None
    assert torch.equal(again.ids_keep[1], first.ids_keep[1])
    assert not torch.equal(again.ids_keep[0], first.ids_keep[0])


def test_something_must_be_left_to_see() -> None:
    with pytest.raises(ConfigError, match=r"--mask-ratio 0\.95 of 15 patches leaves nothing to see"):
        masks(features=FeatureObjectiveConfig(mask_ratio=0.95))
