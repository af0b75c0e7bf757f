"""Rotary positions: each head's queries and keys are turned, pair by pair of channels, by the place of their patch.

A pair is channel j and channel d / 2 + j, as DINOv3 has it; weights of families with other pairs, or with columns
before rows, are brought into this order when they are read. Tokens before the patches are not turned.
RoFormer, Su et al.: https://arxiv.org/abs/2104.09864. DINOv3: https://arxiv.org/abs/2508.10104, section 3.2.
Mixed: RoPE-ViT, Heo et al.: https://arxiv.org/abs/2403.13298, equation 12.
Shapes: B images, N patches, K kept ones, T tokens, L blocks, H heads, d = D / H.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from mae_deploy.images.read import Array
from mae_deploy.models.config import EncoderConfig

Turn = tuple[Tensor, Tensor]
"""Cosines and sines of the angles of all tokens, each broadcast to `(B, H, T, d / 2)`."""


def rotate(values: Tensor, turn: Turn) -> Tensor:
    """Turn the pairs of queries or keys, `(..., T, d)`."""
    (first, second), (cos, sin) = values.chunk(2, dim=-1), turn
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(values.dtype)


def coordinates(config: EncoderConfig) -> Array:
    """Row and column of every patch, as the family counts them: float64 `(N, 2)`."""
    axes = []
    for axis, side in enumerate(config.grid_size):
        places = np.arange(side) + config.rotary_offset
        if config.rotary == "dinov3":
            places = 2 * (places + 0.5) / side - 1
        elif config.rotary_reference is not None:
            places = places / side * config.rotary_reference[axis]
        axes.append(places)
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)


def frequencies(config: EncoderConfig) -> Array:
    """Radians for a step of a coordinate of each pair of an axis: float64 `(d / 4,)`."""
    count = config.width // config.heads // 4
    falling: Array = config.rotary_base ** -(np.arange(count) / count)
    return 2 * math.pi * falling if config.rotary == "dinov3" else falling


def angles(config: EncoderConfig, mixed: Array | None = None) -> Array:
    """By how much the pairs of every patch are turned: float64 `(N, d / 2)`, rows before columns, or of every head of
    every block, `(L, H, N, d / 2)`.

    Args:
        mixed: the learned frequencies along rows and columns, `(2, L, H, d / 2)`.
    """
    places = coordinates(config)
    if mixed is not None:
        of_heads: Array = np.einsum("na,alhj->lhnj", places, mixed.astype(np.float64))
        return of_heads
    return (places[:, :, None] * frequencies(config)).reshape(len(places), -1)


def turn_tables(config: EncoderConfig, mixed: Array | None, front: int) -> Array:
    """What a graph multiplies with: cosines of a head's channels, then sines, negative for the first of a pair; with
    `front` rows before the patches that turn nothing: float32 `(front + N, 2 d)` or `(L, H, front + N, 2 d)`.
    """
    found = angles(config, mixed)
    found = np.concatenate([np.zeros((*found.shape[:-2], front, found.shape[-1])), found], axis=-2)
    cos, sin = np.cos(found), np.sin(found)
    return np.concatenate([cos, cos, -sin, sin], axis=-1).astype(np.float32)


class Rotary(nn.Module):
    """The turns of an encoder's tokens, block by block."""

    angles: Tensor
    places: Tensor

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        if config.rotary == "mixed":
            self.freqs = nn.Parameter(_random_frequencies(config))
            self._keep("places", coordinates(config))
        else:
            self._keep("angles", angles(config))

    def forward(self, ids_keep: Tensor | None) -> list[Turn]:
        """For each block the turn of all tokens, or of those before the patches and of `ids_keep`, int64 `(B, K)`."""
        if self.config.rotary == "mixed":
            found = self.places[:, :1] * self.freqs[0, :, :, None] + self.places[:, 1:] * self.freqs[1, :, :, None]
        else:
            found = self.angles  # (N, d / 2) or (L, H, N, d / 2)
        found = nn.functional.pad(found, (0, 0, self.config.num_prefix, 0))
        if ids_keep is not None:
            rows = places_of(ids_keep, self.config.num_prefix)
            found = found[..., rows, :]
            found = found[:, None] if found.ndim == 3 else found.transpose(1, 2)
        cos, sin = found.cos(), found.sin()
        if self.config.rotary == "mixed":
            return list(zip(cos, sin, strict=True))
        return [(cos, sin)] * self.config.blocks

    def _keep(self, name: str, values: Array) -> None:
        """As a buffer that no file holds: it follows from the config."""
        self.register_buffer(name, torch.from_numpy(values.astype(np.float32)), persistent=False)


def places_of(ids_keep: Tensor, num_prefix: int) -> Tensor:
    """Rows of the kept patches and of all tokens before them: `(B, K) -> (B, P + K)`."""
    prefix = torch.arange(num_prefix, device=ids_keep.device).expand(len(ids_keep), -1)
    return torch.cat([prefix, ids_keep + num_prefix], dim=1)


def _random_frequencies(config: EncoderConfig) -> Tensor:
    """Two directions a head and block, at right angles to one another and turned at random, as the authors' code has
    it: `(2, L, H, d / 2)`.
    """
    count = config.width // config.heads // 4
    sizes = 1.0 / config.rotary_base ** (torch.arange(count) / count)
    way = 2 * math.pi * torch.rand(config.blocks, config.heads, 1)
    ways = torch.stack([way, way + math.pi / 2], dim=2)  # (L, H, 2, 1)
    return torch.stack([(sizes * ways.sin()).flatten(2), (sizes * ways.cos()).flatten(2)])
