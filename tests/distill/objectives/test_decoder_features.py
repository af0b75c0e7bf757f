"""Only what the decoder makes of masked patches counts, each against its own place."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from mae_deploy.distill.objectives.base import View
from mae_deploy.distill.objectives.decoder_features import DecoderFeatures
from mae_deploy.models.taps import Tap
from tests.distill.objectives.tiny_taps import taps_of, view

STUDENT, TEACHER = Tap("decoder", 1), Tap("decoder", 2)


def test_masked_patches_by_a_boolean_mask() -> None:
    objective = DecoderFeatures(1, 2, 6, 10)
    student, teacher = taps_of(objective)
    seen = view()
    assert seen.masking is not None
    hidden = seen.masking.mask.bool()
    expected = F.smooth_l1_loss(objective.projector(student[STUDENT][hidden]), teacher[TEACHER][hidden], beta=2.0)
    # The same numbers in another order.
    torch.testing.assert_close(objective(student, teacher, seen), expected, rtol=1e-6, atol=0)


def test_visible_patches_change_nothing_unless_all_are_asked_for() -> None:
    objective, everywhere = DecoderFeatures(1, 2, 6, 10), DecoderFeatures(1, 2, 6, 10, patches="all")
    student, teacher = taps_of(objective)
    seen = view()
    assert seen.masking is not None
    visible = seen.masking.mask.unsqueeze(-1) == 0
    changed = {STUDENT: torch.where(visible, student[STUDENT] + 1, student[STUDENT])}
    assert torch.equal(objective(changed, teacher, seen), objective(student, teacher, seen))
    assert everywhere(changed, teacher, seen) != everywhere(student, teacher, seen)


def test_it_is_zero_where_the_projection_is_the_teachers() -> None:
    objective = DecoderFeatures(1, 2, 6, 10, loss="l1")
    student, _ = taps_of(objective)
    teacher = {TEACHER: objective.projector(student[STUDENT])}
    # Picked and then projected, or projected and then picked: float32 sums.
    assert objective(student, teacher, view()).item() < 1e-6


def test_all_patches_need_no_masking() -> None:
    objective = DecoderFeatures(1, 2, 6, 10, patches="all")
    student, teacher = taps_of(objective)
    seen = view()
    assert torch.equal(
        objective(student, teacher, View(seen.images, seen.labels, None)), objective(student, teacher, seen)
    )
