"""One vector an image."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mae_deploy.distill.objectives.pooled import Pooled, Vector
from mae_deploy.models.taps import Tap
from tests.distill.objectives.tiny_taps import taps_of, view
from tests.models.tiny_models import random_tensor


@pytest.mark.parametrize("vector", ["cls", "pooled"])
def test_the_teachers_vector_is_normalised_and_the_students_projected(vector: Vector) -> None:
    objective = Pooled(vector, 12, 20)
    student, teacher = taps_of(objective)
    target = teacher[Tap(vector)]
    target = (target - target.mean(dim=1, keepdim=True)) / (target.var(dim=1, correction=0, keepdim=True) + 1e-5).sqrt()
    expected = F.smooth_l1_loss(objective.projector(student[Tap(vector)]), target, beta=2.0)
    torch.testing.assert_close(objective(student, teacher, view()), expected, rtol=1e-5, atol=0)  # float32


def test_without_a_projector_the_same_vector_costs_nothing() -> None:
    vectors = random_tensor(3, 12)
    objective = Pooled("cls", 12, 12, loss="l1", projector_kind="none")
    assert objective({Tap("cls"): vectors}, {Tap("cls"): vectors}, view()).item() == 0
    assert objective({Tap("cls"): vectors}, {Tap("cls"): torch.roll(vectors, 1, dims=0)}, view()).item() > 0.1
