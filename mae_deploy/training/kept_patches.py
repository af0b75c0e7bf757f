"""Training on as many patches as each step draws, so that one network serves every number of them ("token-elastic");
one number is a special case.

The idea is that of networks that run at any width (Yu and Huang, Universally Slimmable Networks:
https://arxiv.org/abs/1903.05134), and of ViTs that are trained on random shares of their patches (Liu et al.,
PatchDropout: https://arxiv.org/abs/2208.07220).
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from mae_deploy.models.mask_config import keep_count
from mae_deploy.models.masking import Masking, keep_random
from mae_deploy.seeding import derive_seed
from mae_deploy.training.step import StepBatch

_MOST_SIZES = 16
"""Numbers of patches that are drawn from: `torch.compile` deals with each size that it meets."""


class KeptPatches:
    """Which patches the images of a step are seen by: K at random for each image, the same K for all of them.

    K depends on the seed and the step alone, so every process and every accumulated batch of a step has the same.
    """

    def __init__(self, num_patches: int, keep_ratio: tuple[float, float]) -> None:
        self.num_patches = num_patches
        least, most = (keep_count(num_patches, ratio) for ratio in keep_ratio)
        self.counts: tuple[int, ...] = tuple(
            dict.fromkeys(np.linspace(least, most, min(_MOST_SIZES, most - least + 1)).round().astype(int).tolist())
        )
        """What K is drawn from, ascending: evenly spaced, each as likely as the others."""

    @property
    def least(self) -> int:
        """The smallest K."""
        return self.counts[0]

    @property
    def most(self) -> int:
        """The largest K."""
        return self.counts[-1]

    def count(self, seed: int, step: int) -> int:
        """The K of a step."""
        return self.counts[derive_seed(seed, "keep", step) % len(self.counts)]

    def __call__(self, batch: StepBatch, noise: Tensor | None = None) -> Masking | None:
        """The masking of a batch; None where the step keeps all patches.

        Args:
            noise: `(B, N)` uniform in [0, 1); default: drawn anew for each step.
        """
        K = self.count(batch.seed, batch.step)
        if K == self.num_patches:
            return None
        return keep_random(batch.rand(self.num_patches) if noise is None else noise, K)
