"""Losses on logits, by hand and against NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mae_deploy.distill.objectives.logits import DistLogits, HardLogits, Labels, SoftLogits
from mae_deploy.models.taps import Tap
from tests.distill.objectives.tiny_taps import view
from tests.models.tiny_models import random_tensor

TAP = Tap("logits")


def soft_logits(student: Tensor, teacher: Tensor, temperature: float) -> float:
    return float(SoftLogits(temperature)({TAP: student}, {TAP: teacher}, view()))


def test_soft_logits_by_hand() -> None:
    """Teacher 3/4 and 1/4, student 1/2 and 1/2: 3/4 ln 3/2 + 1/4 ln 1/2 = 0.130812."""
    teacher = torch.tensor([[3.0, 1.0]]).log()
    student = torch.zeros(1, 2)
    assert soft_logits(student, teacher, 1.0) == pytest.approx(0.130812, abs=1e-6)  # the digits given
    # At temperature 2 the teacher has √3 to 1, that is 0.633975 and 0.366025; times 2²: 4 (0.633975 ln 1.267949 +
    # 0.366025 ln 0.732051).
    assert soft_logits(student, teacher, 2.0) == pytest.approx(4 * 0.036341, abs=1e-5)


def test_it_is_zero_for_the_same_distribution_and_positive_otherwise() -> None:
    logits, other = random_tensor(5, 3), random_tensor(5, 3, seed=2)
    # Softmax does not see a constant; float32 rounds it.
    assert soft_logits(logits + 2, logits, 1.0) == pytest.approx(0, abs=1e-6)
    assert soft_logits(other, logits, 1.0) > 0.1


def test_it_is_the_mean_over_the_batch() -> None:
    teacher, student = torch.tensor([[3.0, 1.0]]).log(), torch.zeros(1, 2)
    once, twice = (soft_logits(student.repeat(n, 1), teacher.repeat(n, 1), 1.0) for n in (1, 2))
    assert twice == pytest.approx(once, rel=1e-6)  # a float32 sum divided by its count


def test_it_follows_the_teacher_and_not_the_reverse() -> None:
    """KL is not symmetric: a student that is sure and wrong costs more than one that is unsure."""
    sure, unsure = torch.tensor([[10.0, 0.0]]), torch.zeros(1, 2)
    assert soft_logits(sure, unsure, 1.0) == pytest.approx(5 - math.log(2), abs=1e-3)  # e^-10 is left out
    assert soft_logits(unsure, sure, 1.0) == pytest.approx(math.log(2), abs=1e-3)


# --- DIST ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_dist_is_the_correlation_over_classes_and_over_images(temperature: float) -> None:
    student, teacher = random_tensor(5, 7), random_tensor(5, 7, seed=2)
    own, its = (torch.softmax(logits.double() / temperature, dim=1).numpy() for logits in (student, teacher))
    classes = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(own, its, strict=True)])
    images = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(own.T, its.T, strict=True)])
    found = DistLogits(temperature)({TAP: student}, {TAP: teacher}, view())
    assert float(found) == pytest.approx((classes + images) * temperature**2, rel=1e-5)  # float32


def test_dist_by_hand() -> None:
    """Two classes and two images with opposite answers: all correlations are -1, so both terms are 2."""
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    found = DistLogits()({TAP: logits}, {TAP: -logits}, view())
    assert float(found) == pytest.approx(4, rel=1e-6)


def test_the_same_ranks_and_distances_cost_nothing_in_dist() -> None:
    """A student that is less sure, evenly so, agrees: that is what KL does not forgive."""
    logits = random_tensor(5, 7)
    assert abs(float(DistLogits()({TAP: logits}, {TAP: logits}, view()))) < 1e-6  # float32
    flatter = (0.5 * logits.softmax(dim=1) + 0.5 / 7).log()
    assert abs(float(DistLogits()({TAP: flatter}, {TAP: logits}, view()))) < 1e-5


def test_one_image_and_even_answers_have_gradients_in_dist() -> None:
    for student in (random_tensor(1, 7), torch.zeros(3, 7)):
        student.requires_grad_()
        loss = DistLogits()({TAP: student}, {TAP: random_tensor(*student.shape, seed=2)}, view())
        loss.backward()
        assert student.grad is not None
        assert student.grad.isfinite().all()
        assert loss.isfinite()


# --- the teacher's decision as a label -------------------------------------------------------------------------------


def test_hard_logits_by_hand() -> None:
    """Softmax 1/4 and 3/4; the teacher decides on the second class, then on the first, however narrowly."""
    student = torch.tensor([[0.0, math.log(3)]]).repeat(2, 1)
    teacher = torch.tensor([[-1.0, 9.0], [0.1, 0.0]])
    found = HardLogits()({TAP: student}, {TAP: teacher}, view())
    assert float(found) == pytest.approx((math.log(4 / 3) + math.log(4)) / 2, rel=1e-6)


def test_a_student_that_is_sure_of_the_teachers_class_costs_nothing() -> None:
    teacher = torch.tensor([[0.2, 0.1, 0.0], [0.0, 0.0, 1.0]])
    sure = torch.tensor([[1e3, 0.0, 0.0], [0.0, 0.0, 1e3]])
    assert HardLogits()({TAP: sure}, {TAP: teacher}, view()).item() == 0
    assert HardLogits()({TAP: -sure}, {TAP: teacher}, view()).item() > 100


# --- labels ----------------------------------------------------------------------------------------------------------


def label_loss(logits: Tensor, labels: list[int]) -> Tensor:
    loss = Labels()({Tap("logits"): logits}, {}, view(labels=labels))
    assert isinstance(loss, Tensor)
    return loss


def test_labels_by_hand() -> None:
    """Softmax 1/4 and 3/4."""
    logits = torch.tensor([[0.0, math.log(3)]]).repeat(3, 1)
    assert label_loss(logits, [0, 1, 1]).item() == pytest.approx((math.log(4) + 2 * math.log(4 / 3)) / 3, rel=1e-6)
    # Unlabelled images count neither above nor below the line.
    assert label_loss(logits, [0, -1, -1]).item() == pytest.approx(math.log(4), rel=1e-6)


def test_without_labels_their_loss_is_zero_with_a_gradient_that_is_a_number() -> None:
    logits = random_tensor(3, 2).requires_grad_()
    loss = label_loss(logits, [-1, -1, -1])
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert (logits.grad == 0).all()
