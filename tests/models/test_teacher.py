"""The teacher runs to its block and no further, sees the student's patches, and never learns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mae_deploy.models.load import Loaded
from mae_deploy.models.teacher import FeatureTeacher, resize_images
from mae_deploy.models.vit import Encoder
from tests.models.tiny_models import ENCODER, metadata_of, random_images, tiny_classifier, tiny_mae

DEEP = replace(ENCODER, depth=3)
GRID = (3, 5)
"""The tiny encoder's own grid."""


def loaded(model: Encoder) -> Loaded:
    return Loaded(metadata_of(model), model.state_dict(), {})


def keep(count: int = 4) -> Tensor:
    return torch.stack([torch.randperm(15, generator=torch.Generator().manual_seed(row))[:count] for row in range(3)])


@pytest.mark.parametrize("block", [1, 2, 3])
def test_tokens_of_the_block_on_the_visible_patches(block: int) -> None:
    """The whole encoder with a hook on that block is the reference."""
    model = tiny_mae(DEEP)
    tapped: list[Tensor] = []
    model.blocks[block - 1].register_forward_hook(lambda *arguments: tapped.append(arguments[2]))
    images, ids_keep = random_images(), keep()
    model.forward_encoder(images, ids_keep)
    features = FeatureTeacher(loaded(model), GRID, block)(images, ids_keep)
    assert features.shape == (3, 1 + 4, 20)
    centred = tapped[0] - tapped[0].mean(dim=-1, keepdim=True)
    expected = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
    # A LayerNorm in another order of float32 operations, on values of a few units.
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)


def test_what_lies_behind_the_block_is_gone() -> None:
    teacher = FeatureTeacher(loaded(tiny_mae(DEEP)), GRID, 2)
    assert len(teacher.model.blocks) == 2


def test_it_gets_no_gradient() -> None:
    teacher = FeatureTeacher(loaded(tiny_mae(DEEP)), GRID, 2)
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert not teacher.model.training
    assert not teacher(random_images().requires_grad_(), keep()).requires_grad


def test_another_patch_size_is_met_by_resizing() -> None:
    """A student of 3x5 patches of 4x4 pixels: the teacher, of 2x2 patches, sees the image at 6x10."""
    model = tiny_mae(DEEP)
    images = torch.randn(3, 3, 12, 20, generator=torch.Generator().manual_seed(5))
    teacher = FeatureTeacher(loaded(model), GRID, 3)
    assert teacher.config.image_size == (6, 10)
    small = F.interpolate(images, size=(6, 10), mode="bicubic", antialias=True, align_corners=False)
    assert torch.equal(teacher(images, keep()), teacher(small, keep()))
    assert not torch.equal(small, images[:, :, ::2, ::2])


def test_another_grid_interpolates_the_teachers_positions() -> None:
    teacher = FeatureTeacher(loaded(tiny_mae(DEEP)), (2, 7), 1)
    assert teacher.config.image_size == (4, 14)
    assert teacher.model.pos_embed.shape == (1, 1 + 14, 20)
    assert teacher(torch.zeros(1, 3, 8, 28), torch.tensor([[13, 0]])).shape == (1, 3, 20)


def test_images_that_fit_are_not_resized() -> None:
    images = random_images()
    assert resize_images(images, (6, 10)) is images


def test_a_classifier_teaches_features_too() -> None:
    """With mean pooling it has no final norm, which no tap needs."""
    classifier = tiny_classifier("avg", DEEP)
    features = FeatureTeacher(loaded(classifier), GRID, 3)(random_images(), keep())
    tokens = classifier.embed(random_images(), keep())
    for block in classifier.blocks:
        tokens = block(tokens)
    torch.testing.assert_close(features, F.layer_norm(tokens, (20,)), rtol=0, atol=1e-5)  # attention in another order of sums


def test_all_patches_unless_some_are_named() -> None:
    teacher, images = FeatureTeacher(loaded(tiny_mae(DEEP)), GRID, 2), random_images()
    everything = torch.arange(15).expand(3, 15)
    torch.testing.assert_close(teacher(images), teacher(images, everything), rtol=0, atol=1e-5)  # other kernels for other layouts
