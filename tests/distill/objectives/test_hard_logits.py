"""The teacher's decision as a label."""

from __future__ import annotations

import math

import pytest
import torch

from mae_deploy.distill.objectives.hard_logits import HardLogits
from mae_deploy.models.taps import Tap
from tests.distill.objectives.tiny_taps import view

TAP = Tap("logits")


def test_by_hand() -> None:
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
