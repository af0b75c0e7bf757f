"""Logits: the student's distribution over the classes is to be the teacher's, or to fit its decisions or the labels."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from mae_deploy.data.sources.base import UNLABELLED
from mae_deploy.distill.objectives.base import Objective, View
from mae_deploy.models.taps import Tap, Taps


class SoftLogits(Objective):
    """KL divergence of the student's softmax from the teacher's, times the temperature's square; the mean over all
    images, labelled or not.

    Hinton et al., Distilling the Knowledge in a Neural Network: https://arxiv.org/abs/1503.02531
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__((Tap("logits"),), (Tap("logits"),))
        self.temperature = temperature

    def forward(self, student: Taps, teacher: Taps, view: View) -> Tensor:
        """`(B, classes)` of both to a scalar."""
        student_log_probs, teacher_log_probs = (
            F.log_softmax(taps[Tap("logits")].float() / self.temperature, dim=1) for taps in (student, teacher)
        )
        return (
            F.kl_div(student_log_probs, teacher_log_probs.detach(), reduction="batchmean", log_target=True)
            * self.temperature**2
        )


class DistLogits(Objective):
    """DIST: the student's probabilities are to rise and fall with the teacher's, over the classes of an image and over
    the images of a class.

    One minus Pearson's correlation of probabilities: the mean over images of that between classes, plus the mean
    over classes of that between images; both times the temperature's square.

    The second is as good as the batch of one process is large; a batch of one image has no correlation, and its second
    term is 1.

    Huang et al., Knowledge Distillation from A Stronger Teacher: https://arxiv.org/abs/2205.10536
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__((Tap("logits"),), (Tap("logits"),))
        self.temperature = temperature

    def forward(self, student: Taps, teacher: Taps, view: View) -> Tensor:
        """`(B, classes)` of both to a scalar."""
        student_probs, teacher_probs = (
            F.softmax(taps[Tap("logits")].float() / self.temperature, dim=1) for taps in (student, teacher)
        )
        teacher_probs = teacher_probs.detach()
        return (
            2
            - _pearson(student_probs, teacher_probs, dim=1).mean()
            - _pearson(student_probs, teacher_probs, dim=0).mean()
        ) * self.temperature**2


def _pearson(first: Tensor, second: Tensor, dim: int) -> Tensor:
    """Correlation along an axis; 0 where one of both is constant."""
    return F.cosine_similarity(
        first - first.mean(dim=dim, keepdim=True), second - second.mean(dim=dim, keepdim=True), dim=dim
    )


class HardLogits(Objective):
    """Cross-entropy with the teacher's most likely class, the mean over all images, labelled or not.

    Touvron et al., Training data-efficient image transformers & distillation through attention (DeiT):
    https://arxiv.org/abs/2012.12877 Half of it and half of the cross-entropy with the labels is G2SD's second stage:
    https://arxiv.org/abs/2302.14771
    """

    def __init__(self) -> None:
        super().__init__((Tap("logits"),), (Tap("logits"),))

    def forward(self, student: Taps, teacher: Taps, view: View) -> Tensor:
        """`(B, classes)` of both to a scalar."""
        return F.cross_entropy(student[Tap("logits")].float(), teacher[Tap("logits")].argmax(dim=1))


class Labels(Objective):
    """Cross-entropy with the labels: the mean over the labelled images of the batch; 0 where none is labelled."""

    def __init__(self) -> None:
        super().__init__((Tap("logits"),))

    def forward(self, student: Taps, teacher: Taps, view: View) -> Tensor:
        """`(B, classes)` and the view's labels to a scalar."""
        labelled = view.labels != UNLABELLED
        total = F.cross_entropy(student[Tap("logits")].float(), view.labels, ignore_index=UNLABELLED, reduction="sum")
        return total / labelled.sum().clamp(min=1)
