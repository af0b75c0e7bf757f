"""Rotary positions of the tokens as ONNX nodes: tables that are constants, and their rows of the tokens that are seen.

Shapes: B images, T tokens, F rows before those of the patches, N patches, L blocks, H heads, d = D / H.
"""

from __future__ import annotations

from collections.abc import Mapping

from mae_deploy.export.graph.builder import GraphBuilder
from mae_deploy.export.graph.precision import DType
from mae_deploy.images.read import Array
from mae_deploy.models.config import EncoderConfig
from mae_deploy.models.rotary import turn_tables


def write_turns(
    builder: GraphBuilder,
    config: EncoderConfig,
    weights: Mapping[str, Array],
    places: str | None,
    front: int,
    dtype: DType,
) -> list[str]:
    """For each block what `BlockWriter.block` turns queries and keys by, in `dtype`; empty without rotary positions.

    Args:
        places: the tokens' rows of the table, int64 `(B, T)`; None: all of them.
        front: F.

    Returns:
        `(T, 2 d)` or `(B, 1, T, 2 d)`; with frequencies of each head `(H, T, 2 d)` or `(B, H, T, 2 d)`.
    """
    b = builder
    if config.rotary == "none":
        return []
    tables = turn_tables(config, weights.get("rope.freqs"), front).astype(dtype)  # (F + N, 2 d), (L, H, F + N, 2 d)
    if tables.ndim == 2:
        table = b.weight("rotary_table", tables)
        if places is not None:
            table = b.node("Gather", [table, places], "rotary/rows", axis=0)
            table = b.node("Unsqueeze", [table, b.integers(1)], "rotary/turn")
        return [table] * config.blocks
    found = []
    for index, own in enumerate(tables):
        table = b.weight(f"rotary_table.{index}", own)
        if places is not None:
            table = b.node("Gather", [table, places], f"rotary.{index}/rows", axis=1)
            table = b.node("Transpose", [table], f"rotary.{index}/turn", perm=[1, 0, 2, 3])
        found.append(table)
    return found
