"""DIST: the student's probabilities are to rise and fall with the teacher's, over the classes of an image and over the
images of a class.

Huang et al., Knowledge Distillation from A Stronger Teacher: https://arxiv.org/abs/2205.10536
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from mae_deploy.distill.objectives.base import Objective, View
from mae_deploy.models.taps import Tap, Taps


class DistLogits(Objective):
    """One minus Pearson's correlation of probabilities: the mean over images of that between classes, plus the mean
    over classes of that between images; both times the temperature's square.

    The second is as good as the batch of one process is large; a batch of one image has no correlation, and its second
    term is 1.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__((Tap("logits"),), (Tap("logits"),))
        self.temperature = temperature

    def forward(self, student: Taps, teacher: Taps, view: View) -> Tensor:
        """`(B, classes)` of both to a scalar."""
        own, its = (F.softmax(taps[Tap("logits")].float() / self.temperature, dim=1) for taps in (student, teacher))
        its = its.detach()
        return (2 - _pearson(own, its, dim=1).mean() - _pearson(own, its, dim=0).mean()) * self.temperature**2


def _pearson(first: Tensor, second: Tensor, dim: int) -> Tensor:
    """Correlation along an axis; 0 where one of both is constant."""
    return F.cosine_similarity(
        first - first.mean(dim=dim, keepdim=True), second - second.mean(dim=dim, keepdim=True), dim=dim
    )
