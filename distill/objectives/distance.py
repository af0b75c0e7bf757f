"""How far predicted vectors are from a teacher's, whatever they stand for, and what brings the student's to the
teacher's width.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from mae_deploy.distill.config import Distance, Projector
from mae_deploy.errors import ConfigError

_SMOOTH_L1_BETA = 2.0
"""Of Data2vec and G2SD: quadratic up to two standard deviations of a normalised target."""


def _smooth_l1(predicted: Tensor, target: Tensor) -> Tensor:
    return F.smooth_l1_loss(predicted, target, beta=_SMOOTH_L1_BETA)


def _cosine(predicted: Tensor, target: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(predicted, target, dim=-1).mean()


_DISTANCES: dict[Distance, Callable[[Tensor, Tensor], Tensor]] = {
    "smooth_l1": _smooth_l1,
    "l1": F.l1_loss,
    "mse": F.mse_loss,
    "cosine": _cosine,
}


def distance(kind: Distance, predicted: Tensor, target: Tensor) -> Tensor:
    """The mean distance of `(…, D)` vectors, a scalar in float32 without a gradient for the target.

    `smooth_l1` has beta 2; `cosine` is 1 minus the cosine of the angle between two vectors, the others are means over
    their elements.
    """
    return _DISTANCES[kind](predicted.float(), target.detach().float())


class NormaliseTokens(nn.Module):
    """LayerNorm without parameters, in float32, as teachers normalise their tokens."""

    def forward(self, vectors: Tensor) -> Tensor:
        """`(…, D) -> (…, D)`."""
        return F.layer_norm(vectors.float(), vectors.shape[-1:])


def projector(kind: Projector, student_dim: int, teacher_dim: int) -> nn.Module:
    """From the student's width to the teacher's: a linear layer, two of them with a GELU between, or none, which only
    normalises.

    Raises:
        ConfigError: none, and the widths differ.
    """
    if kind == "linear":
        return nn.Linear(student_dim, teacher_dim)
    if kind == "mlp":
        return nn.Sequential(nn.Linear(student_dim, teacher_dim), nn.GELU(), nn.Linear(teacher_dim, teacher_dim))
    if student_dim != teacher_dim:
        raise ConfigError(
            f"without a projector the student's width {student_dim} would have to be the teacher's {teacher_dim}",
            hint="use --projector linear",
        )
    return NormaliseTokens()
