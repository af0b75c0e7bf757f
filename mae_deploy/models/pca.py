"""Principal components of patches as a target (paper, table 1d): a linear map that lives in the checkpoint, and its way
back to pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PatchPca(nn.Module):
    """The largest coefficients of a flat patch, in units of the patches' mean deviation."""

    mean: Tensor
    components: Tensor

    def __init__(self, patch_dim: int, num_components: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(patch_dim))
        self.register_buffer("components", torch.zeros(num_components, patch_dim))

    def forward(self, patches: Tensor) -> Tensor:
        """`(B, N, P * P * C) -> (B, N, T)`."""
        with torch.autocast(patches.device.type, enabled=False):
            return (patches.float() - self.mean) @ self.components.T

    def inverse(self, coefficients: Tensor) -> Tensor:
        """The patches of these coefficients, without what the components do not hold:
        `(B, N, T) -> (B, N, P * P * C)`.
        """
        lengths = self.components.square().sum(dim=1)  # the rows are orthogonal
        return (coefficients / lengths) @ self.components + self.mean

    @torch.no_grad()
    def fit(self, count: int, total: Tensor, moments: Tensor) -> None:
        """Take the components from sums over patches.

        Every component points to where its largest weight is positive, so that the same patches give the same
        components.

        Args:
            count: patches that were summed.
            total: float64 `(D,)`, their sum.
            moments: float64 `(D, D)`, the sum of their outer products.
        """
        mean = total / count
        covariance = moments / count - torch.outer(mean, mean)
        values, vectors = torch.linalg.eigh(covariance)
        components = vectors.flip(1).T[: len(self.components)]
        largest = components.gather(1, components.abs().argmax(dim=1, keepdim=True))
        # One scale for all coefficients: their target then has the size of normalised pixels, and their proportions
        # stay.
        deviation = values[-len(self.components) :].clamp(min=0).mean().sqrt().clamp(min=1e-6)
        self.mean.copy_(mean)
        self.components.copy_(components * largest.sign() / deviation)
