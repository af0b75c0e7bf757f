"""Groups of bands: each has patches, and so tokens, of its own, which are told apart by a code beside their position.

SatMAE, Cong et al., Pre-training Transformers for Temporal and Multi-Spectral Satellite Imagery:
https://arxiv.org/abs/2207.08051 (section 3.3) State-dict names are those of its implementation: `patch_embed.G.proj`,
`channel_embed`, `decoder_channel_embed`, `decoder_pred.G`. Shapes: B images, C bands in G groups, P patch side, N
places of patches, D width. Tokens stand group by group, `(B, G * N, D)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mae_deploy.models.config import EncoderConfig

Groups = tuple[tuple[int, ...], ...]


class GroupedPatchEmbed(nn.ModuleList):
    """A linear map for each group's patches; its weight is kept in convolution form."""

    def __init__(self, config: EncoderConfig) -> None:
        self.groups = config.band_groups or ()
        super().__init__(_Projection(len(group), config) for group in self.groups)

    def forward(self, patches: Tensor) -> Tensor:
        """`(B, N, P * P * C) -> (B, G * N, D)`."""
        return torch.cat(
            [embed(part) for embed, part in zip(self, split_bands(patches, self.groups), strict=True)], dim=1
        )


class GroupedPrediction(nn.ModuleList):
    """A linear map for each group's tokens to the pixels of its bands."""

    def __init__(self, dim: int, config: EncoderConfig) -> None:
        self.groups = config.band_groups or ()
        super().__init__(nn.Linear(dim, config.patch**2 * len(group)) for group in self.groups)

    def forward(self, tokens: Tensor) -> Tensor:
        """`(B, G * N, D) -> (B, N, P * P * C)`, the bands in the images' order."""
        parts = tokens.chunk(len(self.groups), dim=1)
        return join_bands([predict(part) for predict, part in zip(self, parts, strict=True)], self.groups)


class _Projection(nn.Module):
    def __init__(self, bands: int, config: EncoderConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(bands, config.width, kernel_size=config.patch, stride=config.patch)

    def forward(self, patches: Tensor) -> Tensor:
        return F.linear(patches, self.proj.weight.permute(0, 2, 3, 1).flatten(1), self.proj.bias)


def split_bands(patches: Tensor, groups: Groups) -> list[Tensor]:
    """Each group's part of flat patches, channels last: `(B, N, P * P * C)` to G times `(B, N, P * P * bands)`."""
    pixels = patches.unflatten(-1, (-1, sum(map(len, groups))))
    return [torch.stack([pixels[..., band] for band in group], dim=-1).flatten(-2) for group in groups]


def join_bands(parts: Sequence[Tensor], groups: Groups) -> Tensor:
    """The inverse of `split_bands`."""
    bands = {
        band: part.unflatten(-1, (-1, len(group)))[..., place]
        for part, group in zip(parts, groups, strict=True)
        for place, band in enumerate(group)
    }
    return torch.stack([bands[band] for band in range(len(bands))], dim=-1).flatten(-2)


def group_moments(patches: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
    """Unbiased variance and mean of each group's patches, for every value: twice `(B, N, P * P * C)`."""
    parts = split_bands(patches, groups)
    moments = [torch.var_mean(part, dim=-1, keepdim=True) for part in parts]
    variance, mean = (
        join_bands([pair[which].expand_as(part) for pair, part in zip(moments, parts, strict=True)], groups)
        for which in range(2)
    )
    return variance, mean


def group_means(values: Tensor, groups: Groups) -> Tensor:
    """The mean over each group's patch: `(B, N, P * P * C) -> (B, G * N)`."""
    return torch.cat([part.mean(dim=-1) for part in split_bands(values, groups)], dim=1)


def spread_over_bands(mask: Tensor, groups: Groups, patch_size: int) -> Tensor:
    """A mask of tokens as one of values: `(B, G * N) -> (B, N, P * P * C)`."""
    parts = [
        part.unsqueeze(-1).expand(-1, -1, patch_size**2 * len(group))
        for part, group in zip(mask.chunk(len(groups), dim=1), groups, strict=True)
    ]
    return join_bands(parts, groups)


def group_positions(positions: Tensor, codes: Tensor, num_groups: int) -> Tensor:
    """The position of every token, that of the place and the code of the group side by side:
    `(1, 1 + N, S), (1, G, E) -> (1, 1 + G * N, S + E)`.

    CLS has no code; where there are G + 1 codes, the last is its own.
    """
    N = positions.shape[1] - 1
    cls_code = codes[:, num_groups:] if codes.shape[1] > num_groups else torch.zeros_like(codes[:, :1])
    places = torch.cat([positions[:, :1], positions[:, 1:].repeat(1, num_groups, 1)], dim=1)
    return torch.cat([places, torch.cat([cls_code, codes[:, :num_groups].repeat_interleave(N, dim=1)], dim=1)], dim=-1)


def feature_map(patches: Tensor, ids_keep: Tensor | None, config: EncoderConfig) -> Tensor:
    """Tokens at their places, zeros elsewhere, and the mean over the groups that are visible at a place:
    `(B, K, D) -> (B, D, H', W')`.
    """
    B, K, D = patches.shape
    seen = patches.new_ones(B, K, 1)
    if ids_keep is not None:
        places = ids_keep.unsqueeze(-1)
        seen = patches.new_zeros(B, config.num_tokens, 1).scatter(1, places, seen)
        patches = patches.new_zeros(B, config.num_tokens, D).scatter(1, places.expand(-1, -1, D), patches)
    if config.band_groups is not None:
        patches, seen = (
            cast(Tensor, values.unflatten(1, (config.num_groups, -1)).sum(dim=1)) for values in (patches, seen)
        )
        patches = patches / seen.clamp(min=1)
    return patches.transpose(1, 2).reshape(B, D, *config.grid_size)
