"""Decoder features: what the student's decoder makes of the masked patches is to be what the teacher's makes of them.

Huang et al., Generic-to-Specific Distillation of Masked Autoencoders (G2SD): https://arxiv.org/abs/2302.14771
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from mae_deploy.distill.config import Distance
from mae_deploy.distill.objectives.base import Objective, View
from mae_deploy.distill.objectives.distance import distance, projector
from mae_deploy.models.masking import Masking
from mae_deploy.models.taps import Tap, Taps
from mae_deploy.models.vit import gather_tokens

Patches = Literal["masked", "all"]


class DecoderFeatures(Objective):
    """The distance between linearly projected patch tokens of a student's decoder block and a teacher's normalised
    ones.
    """

    def __init__(
        self,
        student_block: int,
        teacher_block: int,
        student_dim: int,
        teacher_dim: int,
        *,
        loss: Distance = "smooth_l1",
        patches: Patches = "masked",
    ) -> None:
        super().__init__((Tap("decoder", student_block),), (Tap("decoder", teacher_block),))
        self.loss = loss
        self.patches = patches
        self.projector = projector("linear", student_dim, teacher_dim)

    def forward(self, student: Taps, teacher: Taps, view: View) -> Tensor:
        """Tokens `(B, N, D)` and `(B, N, D')` in the image's order to a scalar."""
        student_tokens, teacher_tokens = student[self.student_taps[0]], teacher[self.teacher_taps[0]]
        if self.patches == "masked":
            assert view.masking is not None  # a whole image has no masked patches
            hidden = _ids_masked(view.masking)
            student_tokens, teacher_tokens = (
                gather_tokens(student_tokens, hidden),
                gather_tokens(teacher_tokens, hidden),
            )
        return distance(self.loss, self.projector(student_tokens), teacher_tokens)


def _ids_masked(masking: Masking) -> Tensor:
    """`(B, N - K)` row-major indices of the masked patches."""
    return masking.ids_restore.argsort(dim=1)[:, masking.ids_keep.shape[1] :]
