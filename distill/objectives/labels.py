"""Labels: cross-entropy with the labels, on the images that have one."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from mae_deploy.data.sources.base import UNLABELLED
from mae_deploy.distill.objectives.base import Objective, View
from mae_deploy.models.taps import Tap, Taps


class Labels(Objective):
    """The mean over the labelled images of the batch; 0 where none is labelled."""

    def __init__(self) -> None:
        super().__init__((Tap("logits"),))

    def forward(self, student: Taps, teacher: Taps, view: View) -> Tensor:
        """`(B, classes)` and the view's labels to a scalar."""
        labelled = view.labels != UNLABELLED
        total = F.cross_entropy(student[Tap("logits")].float(), view.labels, ignore_index=UNLABELLED, reduction="sum")
        return total / labelled.sum().clamp(min=1)
