"""What is trained: the student, and what the objectives train beside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from mae_deploy.distill.objectives.base import Objective, View
from mae_deploy.distill.streams import Update, tapped_on_stream
from mae_deploy.models.masking import Masking
from mae_deploy.models.quantization.training import Quantizer
from mae_deploy.models.taps import Tap, tapped, unreached
from mae_deploy.models.vit import Encoder


class Distiller(nn.Module):
    """A student and its objectives. One forward pass of the student serves them all, and runs no more of it than they
    need.

    Parts of the student that no objective reaches are frozen: without a gradient they would stall distributed training.
    """

    def __init__(
        self, student: Encoder, objectives: Mapping[str, Objective], quantizer: Quantizer | None = None
    ) -> None:
        super().__init__()
        self.student = student
        self.quantizer = quantizer  # a part of the run's state: it holds the ranges that the student is rounded with
        self.objectives = nn.ModuleDict(objectives)
        self.student_taps = _taps(objective.student_taps for objective in objectives.values())
        self.teacher_taps: tuple[Tap, ...] = _taps(objective.teacher_taps for objective in objectives.values())
        for part in unreached(student, self.student_taps):
            part.requires_grad_(False)

    def forward(
        self,
        images: Tensor,
        labels: Tensor,
        masking: Masking | None,
        answers: tuple[Tensor, ...],
        seen: Update | None = None,
    ) -> dict[str, Tensor]:
        """Each objective's loss, unweighted.

        Args:
            images: `(B, C, H, W)`.
            labels: `(B,)`, `UNLABELLED` where there is none.
            masking: the patches that the student sees; None: all.
            answers: the teacher's `teacher_taps`, in their order.
            seen: what the student sees of whole images where they are frames of a stream.
        """
        view = View(images, labels, masking)
        student = (
            tapped(self.student, images, self.student_taps, masking)
            if seen is None
            else tapped_on_stream(self.student, images, seen, self.student_taps)
        )
        teacher = dict(zip(self.teacher_taps, answers, strict=True))
        return {name: objective(student, teacher, view) for name, objective in self.objectives.items()}


def _taps(wanted: Iterable[tuple[Tap, ...]]) -> tuple[Tap, ...]:
    """Each tap once."""
    return tuple(dict.fromkeys(tap for taps in wanted for tap in taps))
