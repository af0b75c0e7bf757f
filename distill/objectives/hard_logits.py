"""Hard logits: the class that the teacher decides on is the student's label.

Touvron et al., Training data-efficient image transformers & distillation through attention (DeiT):
https://arxiv.org/abs/2012.12877 Half of it and half of the cross-entropy with the labels is G2SD's second stage:
https://arxiv.org/abs/2302.14771
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from mae_deploy.distill.objectives.base import Objective, View
from mae_deploy.models.taps import Tap, Taps


class HardLogits(Objective):
    """Cross-entropy with the teacher's most likely class, the mean over all images, labelled or not."""

    def __init__(self) -> None:
        super().__init__((Tap("logits"),), (Tap("logits"),))

    def forward(self, student: Taps, teacher: Taps, view: View) -> Tensor:
        """`(B, classes)` of both to a scalar."""
        return F.cross_entropy(student[Tap("logits")].float(), teacher[Tap("logits")].argmax(dim=1))
