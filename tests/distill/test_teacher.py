"""The teacher of logits, and which block a student follows unless it is told."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mae_deploy.distill.teacher import LogitsTeacher, resolve_block
from mae_deploy.errors import ConfigError
from mae_deploy.models.load import Loaded
from mae_deploy.models.vit import Encoder
from tests.models.tiny_models import metadata_of, random_images, tiny_classifier, tiny_mae


def loaded(model: Encoder) -> Loaded:
    return Loaded(metadata_of(model), model.state_dict(), {})


def test_three_quarters_up_unless_told() -> None:
    assert [resolve_block(None, depth, "--teacher-block") for depth in (1, 2, 4, 12, 24)] == [1, 2, 3, 9, 18]
    assert resolve_block(2, 3, "--teacher-block") == 2
    for block in (0, 4):
        with pytest.raises(ConfigError, match=f"--teacher-block {block} must be within 1 and 3"):
            resolve_block(block, 3, "--teacher-block")


@pytest.mark.parametrize("pool", ["avg", "cls"])
def test_logits_of_a_classifier_at_its_own_size(pool: str) -> None:
    classifier = tiny_classifier("avg" if pool == "avg" else "cls")
    teacher = LogitsTeacher(loaded(classifier))
    images = random_images()
    found = teacher(images.requires_grad_())
    assert torch.equal(found, classifier(images))
    assert not found.requires_grad
    large = torch.randn(2, 3, 18, 30, generator=torch.Generator().manual_seed(0))
    assert torch.equal(teacher(large), classifier(F.interpolate(large, size=(6, 10), mode="bicubic", antialias=True, align_corners=False)))


def test_logits_need_a_classifier() -> None:
    with pytest.raises(ConfigError, match="logits need a fine-tuned teacher, this one is a mae"):
        LogitsTeacher(loaded(tiny_mae()))
