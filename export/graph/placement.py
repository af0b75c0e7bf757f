"""Tokens at their rows of the position table, as ONNX nodes.

Shapes: B images, T tokens, F rows before those of the patches, N patches, D width.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from mae_deploy.export.graph.builder import GraphBuilder
from mae_deploy.export.graph.precision import FLOAT32
from mae_deploy.models.config import EncoderConfig


def first_row(config: EncoderConfig) -> int:
    """F: a row for CLS and each register, of models without them one for padding."""
    return max(config.num_prefix, 1)


class Placement:
    """Puts visible tokens into their places; of all the graph's uses there is one set of nodes.

    Args:
        places: each token's row, int64 `(B, T)`.
    """

    def __init__(self, builder: GraphBuilder, config: EncoderConfig, places: str) -> None:
        self.builder, self.config, self.places = builder, config, places

    def placed(self, tokens: str) -> str:
        """Tokens at their rows of the position table, zeros elsewhere: `(B, T, D) -> (B, F + N, D)`.

        A product with one-hot rows: it needs no shape arithmetic, is exact, and costs less than one linear map of one
        block.
        """
        return self.builder.node("MatMul", [self.one_hot, tokens], f"{tokens}/placed")

    def for_decoder(self, tokens: str) -> str:
        """The same without registers, `(B, T, D) -> (B, 1 + N, D)`; where there is no CLS, the mean of the patches
        stands for it.
        """
        b, c, placed = self.builder, self.config, self.placed(tokens)
        if c.class_token and not c.num_registers:
            return placed
        patches = b.without_first(placed, first_row(c), f"{tokens}/placed_patches")
        if c.class_token:
            cls = b.node("Slice", [placed, b.integers(0), b.integers(1), b.integers(1)], f"{tokens}/placed_cls")
        else:
            cls = b.mean(b.without_first(tokens, c.num_prefix, f"{tokens}/seen"), 1, f"{tokens}/mean", keepdims=True)
        return b.node("Concat", [cls, patches], f"{tokens}/for_decoder", axis=1)

    @cached_property
    def one_hot(self) -> str:
        """Which token is at which row of the position table: FP32 `(B, F + N, T)`."""
        b = self.builder
        rows = np.arange(first_row(self.config) + self.config.num_tokens, dtype=np.int64)
        columns = b.node("Unsqueeze", [self.places, b.integers(1)], "places/columns")
        equal = b.node("Equal", [b.weight("places/rows", rows[None, :, None]), columns], "places/equal")
        return b.cast(equal, FLOAT32)
