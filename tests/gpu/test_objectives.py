"""Distillation's objectives on a GPU: the CPU's numbers, also under autocast, and nothing that waits for the device."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from mae_deploy.distill.objectives.base import Objective, View  # noqa: E402
from mae_deploy.models.masking import Masking  # noqa: E402
from mae_deploy.models.taps import Taps  # noqa: E402
from tests.distill.objectives.tiny_taps import every_objective, masking, taps_of, view  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DEVICE = "cuda"


def moved(taps: Taps) -> Taps:
    return {tap: tensor.to(DEVICE) for tap, tensor in taps.items()}


def moved_view() -> View:
    here = view()
    return View(here.images.to(DEVICE), here.labels.to(DEVICE), Masking(*(part.to(DEVICE) for part in masking())))


@pytest.mark.parametrize("name", list(every_objective()))
def test_the_cpus_loss_without_waiting(name: str) -> None:
    objective: Objective = every_objective()[name]
    student, teacher = taps_of(objective)
    expected = objective(student, teacher, view()).item()
    objective, student, teacher, seen = objective.to(DEVICE), moved(student), moved(teacher), moved_view()
    for tensor in student.values():
        tensor.requires_grad_()
    losses = []
    for mode in ("default", "error"):  # the first time kernels are chosen
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            losses.append(objective(student, teacher, seen))
            losses[-1].backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert losses[-1].item() == pytest.approx(expected, rel=1e-4)  # float32 sums in another order
    with torch.autocast(DEVICE, torch.bfloat16):
        found = objective(student, teacher, seen)
    assert found.dtype == torch.float32
    # Products of a projector are taken in bf16, of 8 bits; all others in float32.
    assert found.item() == pytest.approx(expected, rel=0.02 if list(objective.parameters()) else 1e-4)
