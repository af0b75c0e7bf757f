"""Soft logits: the student's distribution over the classes is to be the teacher's, at a temperature.

Hinton et al., Distilling the Knowledge in a Neural Network: https://arxiv.org/abs/1503.02531
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from mae_deploy.distill.objectives.base import Objective, View
from mae_deploy.models.taps import Tap, Taps


class SoftLogits(Objective):
    """KL divergence of the student's softmax from the teacher's, times the temperature's square; the mean over all
    images, labelled or not.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__((Tap("logits"),), (Tap("logits"),))
        self.temperature = temperature

    def forward(self, student: Taps, teacher: Taps, view: View) -> Tensor:
        """`(B, classes)` of both to a scalar."""
        own, its = (F.log_softmax(taps[Tap("logits")].float() / self.temperature, dim=1) for taps in (student, teacher))
        return F.kl_div(own, its.detach(), reduction="batchmean", log_target=True) * self.temperature**2
