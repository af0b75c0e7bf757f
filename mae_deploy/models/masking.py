"""Which patches the encoder sees: at random (paper, section 3, "Simple implementation"), in blocks, or on a grid
(paper, figure 6).

Every kind is an order of the patches that follows from uniform noise, of which the first K stay visible: the same noise
gives the same masks on any number of processes, every sample keeps equally many patches, and nothing waits for the
device.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mae_deploy.models.mask_config import GroupMasking, MaskSampling, keep_count

_BLOCK_MIN_SHARE = 16 / 196
"""Smallest block as a share of the grid: BEiT's 16 of 196 patches."""

_BLOCK_ASPECT = (0.3, 1 / 0.3)
"""Range of a block's height to width (BEiT, algorithm 1)."""

_MAX_BLOCKS = 12
"""Blocks drawn for a sample; what they leave short is taken around them."""


class Masking(NamedTuple):
    """Which patches the encoder sees."""

    ids_keep: Tensor
    """`(B, K)` row-major indices of the visible patches, in shuffled order."""
    ids_restore: Tensor
    """`(B, N)`: where each patch stands in the shuffled order."""
    mask: Tensor
    """`(B, N)` float: 0 visible, 1 masked."""


def masking_of(
    kind: MaskSampling,
    noise: Tensor,
    mask_ratio: float,
    grid_size: tuple[int, int],
    *,
    unit: int = 1,
    group_masking: GroupMasking = "independent",
) -> Masking:
    """The masking of one kind.

    Args:
        noise: `(B, G * N)` uniform in [0, 1), for G groups of the grid's N patches. Blocks and grids are drawn for each
            group.
        unit: side, in patches, of the squares that random masking hides or shows as a whole (SimMIM).
        group_masking: consistent: the same places in every group, which follow from the first group's noise.
    """
    N = grid_size[0] * grid_size[1]
    if group_masking == "consistent" and noise.shape[1] > N:
        return repeat_masking(masking_of(kind, noise[:, :N], mask_ratio, grid_size, unit=unit), noise.shape[1] // N)
    if kind == "random":
        return random_masking(noise, mask_ratio) if unit == 1 else unit_masking(noise, mask_ratio, grid_size, unit)
    return block_masking(noise, mask_ratio, grid_size) if kind == "block" else grid_masking(noise, grid_size)


def repeat_masking(places: Masking, num_groups: int) -> Masking:
    """The same places in every group of bands: `(B, N)` to `(B, G * N)` (SatMAE's consistent masking)."""
    (_, N), K = places.mask.shape, places.ids_keep.shape[1]
    hidden = places.ids_restore >= K
    restored = [
        torch.where(hidden, (num_groups - 1) * K + group * (N - K), group * K) + places.ids_restore
        for group in range(num_groups)
    ]
    return Masking(
        ids_keep=torch.cat([places.ids_keep + group * N for group in range(num_groups)], dim=1),
        ids_restore=torch.cat(restored, dim=1),
        mask=places.mask.repeat(1, num_groups),
    )


def random_masking(noise: Tensor, mask_ratio: float) -> Masking:
    """Keep the patches with the smallest noise.

    Args:
        noise: `(B, N)` uniform in [0, 1).
    """
    return keep_random(noise, keep_count(noise.shape[1], 1 - mask_ratio, least=0))


def keep_random(noise: Tensor, kept: int) -> Masking:
    """Keep as many patches, those with the smallest noise; of the same noise, fewer are always among more.

    Args:
        noise: `(B, N)` uniform in [0, 1).
    """
    return _first_kept(noise.argsort(dim=1), kept)


def unit_masking(noise: Tensor, mask_ratio: float, grid_size: tuple[int, int], unit: int) -> Masking:
    """Keep the squares of `unit x unit` patches with the smallest noise in their first patch (SimMIM: 32 pixels on
    patches of 16).

    Args:
        noise: `(B, G * N)` uniform in [0, 1).
    """
    B = len(noise)
    rows, columns = grid_size
    squares = noise.reshape(B, -1, rows // unit, unit, columns // unit, unit)[:, :, :, :1, :, :1]
    ranks = _ranks(squares.flatten(1)).reshape(squares.shape)
    order = ranks.expand(-1, -1, -1, unit, -1, unit).reshape(B, -1)
    kept = keep_count(squares[0].numel(), 1 - mask_ratio, least=0) * unit**2
    return _first_kept(order.argsort(dim=1, stable=True), kept)


def grid_masking(noise: Tensor, grid_size: tuple[int, int]) -> Masking:
    """Keep the same one patch of every square of four, drawn for each sample (paper, figure 6, right).

    Args:
        noise: `(B, G * N)` uniform in [0, 1).
    """
    B = len(noise)
    rows, columns = (torch.arange(side, device=noise.device) % 2 for side in grid_size)
    places = (2 * rows[:, None] + columns).flatten()
    groups = noise.reshape(B, -1, places.numel())
    hidden = places != (groups[:, :, :1] * 4).long()
    return _first_kept(hidden.flatten(1).to(torch.uint8).argsort(dim=1, stable=True), noise.shape[1] // 4)


def block_masking(noise: Tensor, mask_ratio: float, grid_size: tuple[int, int]) -> Masking:
    """Hide large rectangles until the ratio is reached, as BEiT does, with exactly K patches left (BEiT, algorithm 1:
    https://arxiv.org/abs/2106.08254).

    Rectangles of random area, shape and place are laid one after the other, each no larger than what is still to be
    hidden. Patches are hidden in the order of the rectangles, within one from its centre outwards; should all
    rectangles together fall short, those nearest to one follow.

    Args:
        noise: `(B, G * N)` uniform in [0, 1).
    """
    B = len(noise)
    rows, columns = grid_size
    N = rows * columns
    groups = noise.reshape(-1, N)
    hidden = N - keep_count(N, 1 - mask_ratio, least=0)
    smallest = _BLOCK_MIN_SHARE * N
    y, x = (
        axis.flatten()
        for axis in torch.meshgrid(
            *(torch.arange(side, device=noise.device) + 0.5 for side in grid_size), indexing="ij"
        )
    )
    blocks = min(_MAX_BLOCKS, N // 4)
    inside = torch.full_like(groups, math.inf)
    outside = torch.full_like(groups, math.inf)
    for index in range(blocks):
        area, aspect, down, across = groups[:, 4 * index : 4 * index + 4].unsqueeze(-1).unbind(1)
        left = (hidden - inside.isfinite().sum(dim=1, keepdim=True)).clamp(min=smallest)
        patches = smallest + area * (left - smallest)
        shape = math.log(_BLOCK_ASPECT[0]) + aspect * math.log(_BLOCK_ASPECT[1] / _BLOCK_ASPECT[0])
        height = (patches * shape.exp()).sqrt().round().clamp(1, rows)
        width = (patches / shape.exp()).sqrt().round().clamp(1, columns)
        top, first = (down * (rows - height + 1)).floor(), (across * (columns - width + 1)).floor()
        away = torch.maximum((y - top - height / 2).abs() * 2 / height, (x - first - width / 2).abs() * 2 / width)
        inside = torch.where(away < 1, torch.minimum(inside, index + away), inside)
        outside = torch.minimum(outside, away)
    order = torch.where(inside.isfinite(), inside, blocks + outside)
    ranks = _ranks(-order).reshape(B, -1)
    return _first_kept(ranks.argsort(dim=1, stable=True), noise.shape[1] // N * keep_count(N, 1 - mask_ratio, least=0))


def _first_kept(ids_shuffle: Tensor, kept: int) -> Masking:
    ids_restore = ids_shuffle.argsort(dim=1)
    return Masking(ids_shuffle[:, :kept], ids_restore, (ids_restore >= kept).float())


def _ranks(values: Tensor) -> Tensor:
    """The place of each value in its row's ascending order, `(B, N)`; of equal values, the first comes first."""
    return values.argsort(dim=1, stable=True).argsort(dim=1)
