"""A teacher's answers as the student's rows: in its grid, of its patches, normalised, in float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from mae_deploy.models.taps import Tap, Taps
from mae_deploy.models.vit import gather_tokens
from mae_deploy.weights.frozen import normalised

_ROWS = ("tokens", "qkv", "latent")
"""Kinds with a row for CLS and for each patch that the encoder saw."""

_NORMALISED = ("tokens", "decoder")


def answers_for(taps: Taps, ids_keep: Tensor | None, *, found: tuple[int, int], asked: tuple[int, int]) -> Taps:
    """What the student is compared with.

    Args:
        taps: the network's own, of the patches that it saw.
        ids_keep: `(B, K)`: rows to pick of those of all patches; None: all rows are wanted, and in order.
        found: the grid of the patches that the network saw.
        asked: the student's.
    """
    return {tap: _answer(tap, value.float(), ids_keep, found, asked) for tap, value in taps.items()}


def _answer(tap: Tap, value: Tensor, ids_keep: Tensor | None, found: tuple[int, int], asked: tuple[int, int]) -> Tensor:
    if tap.kind in (*_ROWS, "decoder") and found != asked:
        value = _by_rows(value, lambda rows: _interpolated(rows, found, asked, prefix=tap.kind != "decoder"))
    if tap.kind in _ROWS and ids_keep is not None:
        value = _picked(value, ids_keep)
    return normalised(value) if tap.kind in _NORMALISED else value


def pick_rows(taps: Taps, ids_keep: Tensor) -> Taps:
    """Of answers to whole images, what a student compares that sees the patches `ids_keep (B, K)`."""
    return {tap: _picked(value, ids_keep) if tap.kind in _ROWS else value for tap, value in taps.items()}


def _picked(value: Tensor, ids_keep: Tensor) -> Tensor:
    return _by_rows(value, lambda rows: torch.cat([rows[:, :1], gather_tokens(rows[:, 1:], ids_keep)], dim=1))


def _by_rows(value: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a change of `(B, T, D)` to tokens, or to qkv `(B, 3, heads, T, D / heads)`."""
    if value.ndim == 3:
        return change(value)
    _, three, heads, _, width = value.shape
    rows = change(value.permute(0, 3, 1, 2, 4).flatten(2))
    return rows.reshape(*rows.shape[:2], three, heads, width).permute(0, 2, 3, 1, 4)


def _interpolated(rows: Tensor, found: tuple[int, int], asked: tuple[int, int], *, prefix: bool) -> Tensor:
    """The map of the patches in another grid, bilinear; CLS, where there is one, as it is."""
    cls, patches = rows[:, : int(prefix)], rows[:, int(prefix) :]
    maps = patches.transpose(1, 2).unflatten(2, found)
    resized = F.interpolate(maps, size=asked, mode="bilinear", antialias=True, align_corners=False)
    return torch.cat([cls, resized.flatten(2).transpose(1, 2)], dim=1)
