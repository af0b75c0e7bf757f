"""DIST against NumPy's correlation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mae_deploy.distill.objectives.dist_logits import DistLogits
from mae_deploy.models.taps import Tap
from tests.distill.objectives.tiny_taps import view
from tests.models.tiny_models import random_tensor

TAP = Tap("logits")


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_it_is_the_correlation_over_classes_and_over_images(temperature: float) -> None:
    student, teacher = random_tensor(5, 7), random_tensor(5, 7, seed=2)
    own, its = (torch.softmax(logits.double() / temperature, dim=1).numpy() for logits in (student, teacher))
    classes = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(own, its, strict=True)])
    images = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(own.T, its.T, strict=True)])
    found = DistLogits(temperature)({TAP: student}, {TAP: teacher}, view())
    assert float(found) == pytest.approx((classes + images) * temperature**2, rel=1e-5)  # float32


def test_by_hand() -> None:
    """Two classes and two images with opposite answers: all correlations are -1, so both terms are 2."""
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    found = DistLogits()({TAP: logits}, {TAP: -logits}, view())
    assert float(found) == pytest.approx(4, rel=1e-6)


def test_the_same_ranks_and_distances_cost_nothing() -> None:
    """A student that is less sure, evenly so, agrees: that is what KL does not forgive."""
    logits = random_tensor(5, 7)
    assert abs(float(DistLogits()({TAP: logits}, {TAP: logits}, view()))) < 1e-6  # float32
    flatter = (0.5 * logits.softmax(dim=1) + 0.5 / 7).log()
    assert abs(float(DistLogits()({TAP: flatter}, {TAP: logits}, view()))) < 1e-5


def test_one_image_and_even_answers_have_numbers_for_gradients() -> None:
    for student in (random_tensor(1, 7), torch.zeros(3, 7)):
        student.requires_grad_()
        loss = DistLogits()({TAP: student}, {TAP: random_tensor(*student.shape, seed=2)}, view())
        loss.backward()
        assert student.grad is not None
        assert student.grad.isfinite().all()
        assert loss.isfinite()
