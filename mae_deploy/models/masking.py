"""Per-sample random masking by an index shuffle (paper, section 3, "Simple implementation")."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Masking(NamedTuple):
    """Which patches the encoder sees."""

    ids_keep: Tensor
    """`(B, K)` row-major indices of the visible patches, in shuffled order."""
    ids_restore: Tensor
    """`(B, N)`: where each patch stands in the shuffled order."""
    mask: Tensor
    """`(B, N)` float: 0 visible, 1 masked."""


def num_keep(num_patches: int, mask_ratio: float) -> int:
    """Number of visible patches; truncates in floating point exactly as the original implementation does."""
    return int(num_patches * (1 - mask_ratio))


def random_masking(noise: Tensor, mask_ratio: float) -> Masking:
    """Keep the patches with the smallest noise.

    Args:
        noise: `(B, N)` uniform in [0, 1).
    """
    B, N = noise.shape
    K = num_keep(N, mask_ratio)
    ids_shuffle = noise.argsort(dim=1)
    ids_restore = ids_shuffle.argsort(dim=1)
    mask = torch.ones(B, N, device=noise.device)
    mask[:, :K] = 0
    return Masking(ids_shuffle[:, :K], ids_restore, mask.gather(1, ids_restore))
