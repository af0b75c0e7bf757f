"""The constants of the patch embedding: linear maps of flat patches, and the table of positions.

Shapes: C channels, P patch side, N patches, D width.
"""

from __future__ import annotations

import numpy as np
import torch

from mae_deploy.checkpoint import Metadata
from mae_deploy.config import from_dict
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.images.read import Array
from mae_deploy.models.bands import group_positions
from mae_deploy.models.config import EncoderConfig


class PatchEmbedding:
    """What a graph needs to embed patches.

    Args:
        uint8: whether the patches are pixels from 0 to 255, whose normalisation is folded in.
    """

    def __init__(self, metadata: Metadata, config: EncoderConfig, weights: dict[str, Array], *, uint8: bool) -> None:
        self._metadata, self._config, self._weights, self._uint8 = metadata, config, weights, uint8

    def kernels(self) -> list[tuple[Array, Array]]:
        """Weight `(P * P * C, D)` and bias `(D,)` of the patch embedding, or of each group's."""
        groups = self._config.band_groups
        if groups is None:
            return [self._kernel("patch_embed.proj", tuple(range(self._config.in_chans)))]
        return [self._kernel(f"patch_embed.{index}.proj", bands) for index, bands in enumerate(groups)]

    def columns(self, bands: tuple[int, ...]) -> Array:
        """Where in a patch the pixels of some bands are, channels last: int64 `(P * P * bands,)`."""
        pixels = np.arange(self._config.patch**2, dtype=np.int64) * self._config.in_chans
        return (pixels[:, None] + np.array(bands, np.int64)).ravel()

    def table(self) -> Array:
        """What is added to every token, the biases with it: `(F + N, D)`. The first F rows are CLS and registers; of a
        model without them there is one row of zeros, which stands for padding.
        """
        c, table = self._config, self._positions()
        if c.class_token:
            table[0] += self._weights["cls_token"][0, 0]
        table[1:] += np.repeat([bias for _, bias in self.kernels()], c.num_patches, axis=0)
        registers = self._weights["reg_token"][0] if c.num_registers else table[:0]
        first = table[:1] if c.class_token or not c.num_registers else table[:0]
        return np.concatenate([first, registers, table[1:]])

    def statistics(self) -> tuple[Array, Array]:
        """Mean and standard deviation for each value of a patch, `(P * P * C,)`, float64."""
        preprocess = from_dict(Preprocess, self._metadata.preprocess)
        mean, std = (
            np.tile(np.asarray(values, np.float64), self._config.patch**2)
            for values in (preprocess.mean, preprocess.std)
        )
        return mean, std

    def _positions(self) -> Array:
        c = self._config
        if not c.position_table:
            return np.zeros((1 + c.num_patches, c.width), np.float32)
        positions = self._weights["pos_embed"]
        if c.band_groups is None:
            return positions[0].copy()  # type: ignore[no-any-return]
        codes = torch.from_numpy(self._weights["channel_embed"])
        return group_positions(torch.from_numpy(positions), codes, c.num_groups)[0].numpy()

    def _kernel(self, name: str, bands: tuple[int, ...]) -> tuple[Array, Array]:
        """Weight and bias of one linear map; with uint8 images, the normalisation folded in.

        `W ((x / 255 - mean) / std) + b = (W / (255 std)) x + (b - W (mean / std))`: exact but for rounding.
        """
        kernel = self._weights[f"{name}.weight"].transpose(2, 3, 1, 0).reshape(-1, self._config.width)
        bias = self._weights[f"{name}.bias"]
        if not self._uint8:
            return kernel, bias
        mean, std = (values[self.columns(bands)] for values in self.statistics())
        folded = kernel.astype(np.float64)
        bias = bias - (mean / std) @ folded
        return (folded / (255 * std[:, None])).astype(np.float32), bias.astype(np.float32)
