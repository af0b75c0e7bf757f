"""Fixed 2-D sine-cosine position embeddings, and their interpolation to another grid.

He et al., Masked Autoencoders Are Scalable Vision Learners, appendix A: https://arxiv.org/abs/2111.06377
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def sincos_position_embedding(embed_dim: int, grid_size: tuple[int, int]) -> Tensor:
    """The table for a CLS token (zeros) and a grid of patches, row by row: `(1, 1 + H * W, D)`.

    The first half of the channels encodes the column, the second the row, as in the original implementation.
    """
    H, W = grid_size
    rows, columns = np.meshgrid(np.arange(H, dtype=np.float64), np.arange(W, dtype=np.float64), indexing="ij")
    patches = np.concatenate([_sincos(embed_dim // 2, columns.ravel()), _sincos(embed_dim // 2, rows.ravel())], axis=1)
    return torch.from_numpy(np.concatenate([np.zeros((1, embed_dim)), patches])).float()[None]


def sincos_group_embedding(embed_dim: int, num_groups: int) -> Tensor:
    """The codes of groups of bands, in order: `(1, G, E)` (SatMAE, Cong et al.: https://arxiv.org/abs/2207.08051,
    section 3.3).
    """
    return torch.from_numpy(_sincos(embed_dim, np.arange(num_groups, dtype=np.float64))).float()[None]


_RULES: dict[str, dict[str, Any]] = {
    "bicubic": {"mode": "bicubic", "align_corners": False},
    "timm": {"mode": "bicubic", "antialias": True},
    "timm-flexivit": {"mode": "bilinear", "antialias": False},
    "torchvision": {"mode": "bicubic", "align_corners": True},
}
"""Whose interpolation it is, and PyTorch's settings for it; bicubic is the original's and transformers'."""


def interpolate_position_embedding(
    pos_embed: Tensor, source: tuple[int, int], target: tuple[int, int], rule: str = "bicubic"
) -> Tensor:
    """The patch part from grid `source` to grid `target`: `(1, 1 + N, D) -> (1, 1 + N', D)`.

    Args:
        rule: a checkpoint's `Positions`.
    """
    if source == target:
        return pos_embed
    _, _, D = pos_embed.shape
    patches = pos_embed[:, 1:].reshape(1, *source, D).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=target, **_RULES[rule])
    return torch.cat([pos_embed[:, :1], patches.permute(0, 2, 3, 1).reshape(1, -1, D)], dim=1)


def _sincos(
    dim: int, positions: np.ndarray[tuple[int], np.dtype[np.float64]]
) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    omega = 1.0 / 10000 ** (np.arange(dim // 2, dtype=np.float64) / (dim / 2.0))
    angles = np.outer(positions, omega)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
