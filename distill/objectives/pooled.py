"""One vector an image: the student's CLS token or pooled tokens, projected, are to be the teacher's.

This is what teachers that are not masked autoencoders offer. The teacher's vector is normalised, without affine.
Zhang et al., Accessing Vision Foundation Models via ImageNet-1K (Proteus): https://arxiv.org/abs/2407.10366
Shang et al., Theia: Distilling Diverse Vision Foundation Models for Robot Learning: https://arxiv.org/abs/2407.20179
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from mae_deploy.distill.config import Distance, Projector
from mae_deploy.distill.objectives.base import Objective, View
from mae_deploy.distill.objectives.distance import NormaliseTokens, distance, projector
from mae_deploy.models.taps import Tap, Taps

Vector = Literal["cls", "pooled"]


class Pooled(Objective):
    """The distance between the student's projected vector and the teacher's normalised one.

    Raises:
        ConfigError: no projector, and the widths differ.
    """

    def __init__(
        self,
        vector: Vector,
        student_dim: int,
        teacher_dim: int,
        *,
        loss: Distance = "smooth_l1",
        projector_kind: Projector = "linear",
    ) -> None:
        super().__init__((Tap(vector),), (Tap(vector),))
        self.loss = loss
        self.projector = projector(projector_kind, student_dim, teacher_dim)
        self.normalise = NormaliseTokens()

    def forward(self, student: Taps, teacher: Taps, view: View) -> Tensor:
        """`(B, D)` and `(B, D')` to a scalar."""
        return distance(
            self.loss, self.projector(student[self.student_taps[0]]), self.normalise(teacher[self.teacher_taps[0]])
        )
