"""KL divergence by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mae_deploy.distill.objectives.logits import SoftLogits
from mae_deploy.models.taps import Tap
from tests.distill.objectives.tiny_taps import view
from tests.models.tiny_models import random_tensor

TAP = Tap("logits")


def soft_logits(student: Tensor, teacher: Tensor, temperature: float) -> float:
    return float(SoftLogits(temperature)({TAP: student}, {TAP: teacher}, view()))


def test_by_hand() -> None:
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
