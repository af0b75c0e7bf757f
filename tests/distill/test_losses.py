"""Each loss: zero where it should be, growing with the error, and right by hand; and what the feature student trains."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mae_deploy.distill.losses import FeatureDistiller, feature_loss, label_loss, logits_loss
from mae_deploy.models.masking import Masking, random_masking
from tests.models.tiny_models import ENCODER, random_images, tiny_mae

TEACHER_DIM = 7


# --- features --------------------------------------------------------------------------------------------------------


def test_feature_loss_by_hand() -> None:
    """Smooth L1 with beta 2: d²/4 below 2, |d| - 1 from there on."""
    zero = torch.zeros(1, 2, 2)
    assert float(feature_loss(zero, zero)) == 0
    found = feature_loss(torch.tensor([[[1.0, -1.0], [3.0, -4.0]]]), zero)
    assert float(found) == (0.25 + 0.25 + 2 + 3) / 4


def test_feature_loss_grows_with_the_distance_and_pulls_towards_the_target() -> None:
    target = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    distances = [float(feature_loss(target + offset, target)) for offset in (0.0, 0.5, 1.0, 5.0)]
    assert distances == sorted(distances)
    assert distances[0] == 0
    projected = (target + 0.5).requires_grad_()
    feature_loss(projected, target).backward()
    assert projected.grad is not None
    assert (projected.grad > 0).all()


def test_feature_loss_is_taken_in_float32() -> None:
    assert feature_loss(torch.zeros(1, 1, 1, dtype=torch.bfloat16), torch.ones(1, 1, 1)).dtype == torch.float32


# --- logits ----------------------------------------------------------------------------------------------------------


def test_logits_loss_by_hand() -> None:
    """Teacher 3/4 and 1/4, student 1/2 and 1/2: 3/4 ln 3/2 + 1/4 ln 1/2 = 0.130812."""
    teacher = torch.tensor([[3.0, 1.0]]).log()
    student = torch.zeros(1, 2)
    assert float(logits_loss(student, teacher, 1.0)) == pytest.approx(0.130812, abs=1e-6)  # the digits given
    # At temperature 2 the teacher has √3 to 1, that is 0.633975 and 0.366025; times 2²: 4 (0.633975 ln 1.267949 + 0.366025 ln 0.732051).
    assert float(logits_loss(student, teacher, 2.0)) == pytest.approx(4 * 0.036341, abs=1e-5)


def test_logits_loss_is_zero_for_the_same_distribution_and_positive_otherwise() -> None:
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    # Softmax does not see a constant; float32 rounds it.
    assert float(logits_loss(logits + 2, logits, 1.0)) == pytest.approx(0, abs=1e-6)
    other = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    assert float(logits_loss(other, logits, 1.0)) > 0.1


def test_logits_loss_is_the_mean_over_the_batch() -> None:
    teacher, student = torch.tensor([[3.0, 1.0]]).log(), torch.zeros(1, 2)
    once, twice = (logits_loss(student.repeat(n, 1), teacher.repeat(n, 1), 1.0) for n in (1, 2))
    assert float(twice) == pytest.approx(float(once), rel=1e-6)  # a float32 sum divided by its count


def test_logits_loss_follows_the_teacher_and_not_the_reverse() -> None:
    """KL is not symmetric: a student that is sure and wrong costs more than one that is unsure."""
    sure, unsure = torch.tensor([[10.0, 0.0]]), torch.zeros(1, 2)
    assert float(logits_loss(sure, unsure, 1.0)) == pytest.approx(5 - math.log(2), abs=1e-3)  # e^-10 is left out
    assert float(logits_loss(unsure, sure, 1.0)) == pytest.approx(math.log(2), abs=1e-3)


# --- labels ----------------------------------------------------------------------------------------------------------


def test_label_loss_by_hand() -> None:
    """Softmax 1/4 and 3/4."""
    logits = torch.tensor([[0.0, math.log(3)]]).repeat(3, 1)
    assert float(label_loss(logits, torch.tensor([0, 1, 1]))) == pytest.approx((math.log(4) + 2 * math.log(4 / 3)) / 3, rel=1e-6)
    # Unlabelled images count neither above nor below the line.
    assert float(label_loss(logits, torch.tensor([0, -1, -1]))) == pytest.approx(math.log(4), rel=1e-6)


def test_without_labels_it_is_zero_with_a_gradient_that_is_a_number() -> None:
    logits = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = label_loss(logits, torch.full((3,), -1))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert (logits.grad == 0).all()


# --- the feature student ---------------------------------------------------------------------------------------------


def distiller(*, block: int = 1, feature_weight: float = 1.0, pixel_weight: float = 1.0) -> FeatureDistiller:
    torch.manual_seed(0)
    student = tiny_mae().train()
    return FeatureDistiller(student, block=block, teacher_dim=TEACHER_DIM, feature_weight=feature_weight, pixel_weight=pixel_weight)


def batch() -> tuple[Tensor, Masking, Tensor]:
    generator = torch.Generator().manual_seed(3)
    masking = random_masking(torch.rand(3, ENCODER.num_patches, generator=generator), 0.75)
    return random_images(), masking, torch.randn(3, 1 + masking.ids_keep.shape[1], TEACHER_DIM, generator=generator)


def test_the_student_is_tapped_at_its_block() -> None:
    """Blocks one by one, and the autoencoder's own loss, are the reference."""
    model, (images, masking, features) = distiller(block=1), batch()
    student = model.student
    tokens = student.blocks[0](student.embed(images, masking.ids_keep))
    expected = F.smooth_l1_loss(F.linear(tokens, model.projector.weight, model.projector.bias), features, beta=2.0)
    found = model(images, masking, features)
    assert set(found) == {"loss", "feature_loss", "pixel_loss"}
    assert torch.equal(found["feature_loss"], expected)
    assert torch.equal(found["pixel_loss"], student(images, masking).loss)


def test_the_weights_of_both_losses() -> None:
    images, masking, features = batch()
    plain = distiller()(images, masking, features)
    found = distiller(feature_weight=0.5, pixel_weight=3.0)(images, masking, features)
    expected = 0.5 * plain["feature_loss"].item() + 3 * plain["pixel_loss"].item()
    assert found["loss"].item() == pytest.approx(expected, rel=1e-6)  # float32


def test_without_pixels_only_what_is_used_is_trained() -> None:
    """A parameter that waits for a gradient that never comes stalls distributed training."""
    model, (images, masking, features) = distiller(pixel_weight=0.0), batch()
    found = model(images, masking, features)
    assert set(found) == {"loss", "feature_loss"}
    found["loss"].backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained
    assert {name.split(".")[1] if "." in name else name for name in trained if name.startswith("student")} == {"cls_token", "patch_embed", "blocks"}
    assert not any(name.startswith("student.blocks.1.") for name in trained)


def test_with_pixels_all_is_trained() -> None:
    model, (images, masking, features) = distiller(), batch()
    model(images, masking, features)["loss"].backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {"student.pos_embed", "student.decoder_pos_embed"}
