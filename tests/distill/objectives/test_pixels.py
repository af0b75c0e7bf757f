"""The student's own reconstruction loss."""

from __future__ import annotations

import torch

from mae_deploy.distill.objectives.pixels import Pixels
from mae_deploy.models.taps import Tap, tapped
from tests.distill.objectives.tiny_taps import view
from tests.models.tiny_models import tiny_mae


def test_it_is_the_autoencoders_loss() -> None:
    student, seen = tiny_mae(), view()
    assert seen.masking is not None
    objective = Pixels(student.forward_loss)
    taps = tapped(student, seen.images, objective.student_taps, seen.masking)
    assert torch.equal(objective(taps, {}, seen), student(seen.images, seen.masking).loss)
    assert list(objective.parameters()) == []  # the student's are the student's


def test_the_target_itself_costs_nothing() -> None:
    student, seen = tiny_mae(), view()
    assert Pixels(student.forward_loss)({Tap("pixels"): student.target(seen.images)}, {}, seen).item() == 0
