"""Pixels: the student's own reconstruction, as in pretraining.

He et al., Masked Autoencoders Are Scalable Vision Learners: https://arxiv.org/abs/2111.06377
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mae_deploy.distill.objectives.base import Objective, View
from mae_deploy.models.taps import Tap, Taps


class Pixels(Objective):
    """The autoencoder's loss of its prediction: by default the mean squared error on the masked patches of normalised
    pixels.
    """

    def __init__(self, loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        """
        Args:
            loss: images `(B, C, H, W)`, prediction `(B, N, T)` and mask `(B, N)` to a scalar: the student's
                `forward_loss`.
        """
        super().__init__((Tap("pixels"),))
        self.loss = loss

    def forward(self, student: Taps, teacher: Taps, view: View) -> Tensor:
        """`(B, N, T)` and the view's images to a scalar."""
        assert view.masking is not None  # a whole image leaves nothing to predict
        return self.loss(view.images, student[Tap("pixels")], view.masking.mask)
