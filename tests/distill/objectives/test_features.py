"""The student's projected tokens against the teacher's."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from mae_deploy.distill.objectives.features import Features
from mae_deploy.models.taps import Tap
from tests.distill.objectives.tiny_taps import PAIRS, taps_of, view
from tests.models.tiny_models import random_tensor


def test_the_defaults_are_smooth_l1_behind_one_linear_layer() -> None:
    torch.manual_seed(3)
    expected = torch.nn.Linear(12, 20)
    torch.manual_seed(3)
    objective = Features(((2, 3),), 12, 20)
    student, teacher = taps_of(objective)
    loss = F.smooth_l1_loss(expected(student[Tap("tokens", 2)]), teacher[Tap("tokens", 3)], beta=2.0)
    assert torch.equal(objective(student, teacher, view()), loss)


def test_pairs_are_averaged_and_each_has_its_projector() -> None:
    objective = Features(PAIRS, 12, 20, loss="mse")
    student, teacher = taps_of(objective)
    assert objective.student_taps == (Tap("tokens", 2), Tap("tokens", 4))
    assert objective.teacher_taps == (Tap("tokens", 3), Tap("tokens", 6))
    each = [
        F.mse_loss(project(student[Tap("tokens", own)]), teacher[Tap("tokens", its)])
        for project, (own, its) in zip(objective.projectors, PAIRS, strict=True)
    ]
    assert torch.equal(objective(student, teacher, view()), torch.stack(each).mean())
    assert each[0] != each[1]


def test_a_student_whose_tokens_are_the_teachers_costs_nothing() -> None:
    """Without a projector, scale and offset of a token do not count: the teacher's are normalised."""
    tokens = random_tensor(2, 5, 12)
    objective = Features(((1, 1),), 12, 12, projector_kind="none")
    tap = Tap("tokens", 1)
    teacher = {tap: F.layer_norm(tokens, (12,))}
    assert objective({tap: tokens}, teacher, view()).item() == 0
    assert objective({tap: 3 * tokens + 2}, teacher, view()).item() < 1e-6  # float32, and LayerNorm's eps
    assert objective({tap: -tokens}, teacher, view()).item() > 0.1
