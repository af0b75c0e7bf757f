"""The channels of queries and keys in the order of our rotary positions: pairs half a head apart, rows before columns.

Queries and keys in another order have the same products, so a permutation of their rows changes nothing else.
"""

from __future__ import annotations

import torch
from torch import Tensor


def channel_order(head_dim: int, *, halves: bool, columns_first: bool) -> Tensor:
    """Which channel of a head of the file's comes to each place of ours: int64 `(d,)`.

    Args:
        halves: the file's pairs are half a head apart, as DINOv3's; else neighbours, as EVA's.
        columns_first: its first half of pairs is turned by the column.
    """
    pairs = torch.arange(head_dim // 2)
    if columns_first:
        pairs = pairs.roll(head_dim // 4)
    return torch.cat([pairs, pairs + head_dim // 2] if halves else [2 * pairs, 2 * pairs + 1])


def reorder(tensors: dict[str, Tensor], depth: int, num_heads: int, order: Tensor) -> None:
    """Bring the rows of `attn.qkv`, and the norms of queries and keys, into this order, in place."""
    d = len(order)
    rows = (torch.arange(num_heads)[:, None] * d + order).flatten()
    rows = torch.cat([rows, rows + num_heads * d, torch.arange(2 * num_heads * d, 3 * num_heads * d)])
    for block in range(depth):
        for part in ("weight", "bias"):
            tensors[f"blocks.{block}.attn.qkv.{part}"] = tensors[f"blocks.{block}.attn.qkv.{part}"][rows]
            for norm in ("q_norm", "k_norm"):
                if (name := f"blocks.{block}.attn.{norm}.{part}") in tensors:
                    tensors[name] = tensors[name][order]
