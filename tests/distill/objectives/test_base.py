"""What holds for every objective: who gets a gradient, and in which precision the loss is taken."""

from __future__ import annotations

import pytest
import torch

from tests.distill.objectives.tiny_taps import every_objective, taps_of, view

NAMES = list(every_objective())


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_student_and_objective_and_not_the_teacher(name: str) -> None:
    objective = every_objective()[name]
    student, teacher = ({tap: tensor.requires_grad_() for tap, tensor in taps.items()} for taps in taps_of(objective))
    loss = objective(student, teacher, view())
    assert (loss.shape, loss.dtype) == ((), torch.float32)
    assert loss.item() > 0
    loss.backward()
    for tensor in (*student.values(), *objective.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
        assert tensor.grad.any()
    assert [tap for tap, tensor in teacher.items() if tensor.grad is not None] == []


@pytest.mark.parametrize(
    "name", [name for name, objective in every_objective().items() if not list(objective.parameters())]
)
def test_low_precision_is_computed_in_float32(name: str) -> None:
    """Under autocast, bf16 taps give what the same numbers give in float32 outside of it."""
    objective = every_objective()[name]
    student, teacher = ({tap: tensor.bfloat16() for tap, tensor in taps.items()} for taps in taps_of(objective))
    expected = objective(
        {tap: tensor.float() for tap, tensor in student.items()},
        {tap: tensor.float() for tap, tensor in teacher.items()},
        view(),
    )
    with torch.autocast("cpu", torch.bfloat16):
        found = objective(student, teacher, view())
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "name", [name for name, objective in every_objective().items() if list(objective.parameters())]
)
def test_behind_a_projector_the_loss_is_float32(name: str) -> None:
    objective = every_objective()[name]
    student, teacher = taps_of(objective)
    expected = objective(student, teacher, view())
    with torch.autocast("cpu", torch.bfloat16):
        found = objective({tap: tensor.bfloat16() for tap, tensor in student.items()}, teacher, view())
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=0.02)  # bf16 keeps 8 bits
