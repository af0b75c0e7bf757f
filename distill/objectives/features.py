"""Features: the student's tokens, projected, are to be the teacher's normalised tokens of the same patches.

On visible patches while the student reconstructs: Bai et al., Masked Autoencoders Enable Efficient Knowledge Distillers
(DMAE): https://arxiv.org/abs/2208.12256. Several pairs of blocks: Zhao et al., Asymmetric Masked Distillation (AMD):
https://arxiv.org/abs/2311.03149
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mae_deploy.distill.config import Distance, Projector
from mae_deploy.distill.objectives.base import Objective, Pairs, View
from mae_deploy.distill.objectives.distance import distance, projector
from mae_deploy.models.taps import Tap, Taps


class Features(Objective):
    """The mean over pairs of blocks of the distance between tokens, the CLS token among them; a projector for each
    pair.

    Raises:
        ConfigError: no projector, and the widths differ.
    """

    def __init__(
        self,
        pairs: Pairs,
        student_dim: int,
        teacher_dim: int,
        *,
        loss: Distance = "smooth_l1",
        projector_kind: Projector = "linear",
    ) -> None:
        super().__init__(
            tuple(Tap("tokens", student_block) for student_block, _ in pairs),
            tuple(Tap("tokens", teacher_block) for _, teacher_block in pairs),
        )
        self.loss = loss
        self.projectors = nn.ModuleList(projector(projector_kind, student_dim, teacher_dim) for _ in pairs)

    def forward(self, student: Taps, teacher: Taps, view: View) -> Tensor:
        """Tokens `(B, 1 + K, D)` and `(B, 1 + K, D')` to a scalar."""
        each = zip(self.projectors, self.student_taps, self.teacher_taps, strict=True)
        return torch.stack(
            [
                distance(self.loss, project(student[student_tap]), teacher[teacher_tap])
                for project, student_tap, teacher_tap in each
            ]
        ).mean()
