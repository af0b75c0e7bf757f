"""Attention pooling as ONNX nodes: one learned query attends to all tokens or to the patches, and an MLP follows.

FP32 whatever the precision of the blocks, as the head. Shapes: B images, T tokens, D width, H heads, d = D / H.
"""

from __future__ import annotations

import math

import numpy as np

from mae_deploy.export.graph.blocks import BlockWriter
from mae_deploy.models.config import EncoderConfig

_NAME = "attn_pool"


def write_attention_pool(writer: BlockWriter, config: EncoderConfig, tokens: str) -> str:
    """What is pooled of the tokens behind the last norm: FP32 `(B, T, D) -> (B, D)`."""
    b, weights, D, H = writer.builder, writer.weights, config.width, config.pool_heads
    d = D // H
    padding, first = writer.padding, 0 if config.pool_prefix else config.num_prefix
    if first:
        tokens = b.without_first(tokens, first, f"{_NAME}/patches")
        padding = padding and b.without_first(padding, first, f"{_NAME}/patch_padding", axis=3)
    latent = weights[f"{_NAME}.latent"][0].astype(np.float64)
    query = latent @ weights[f"{_NAME}.q.weight"].T + weights[f"{_NAME}.q.bias"]
    query = (query / math.sqrt(d)).reshape(H, 1, d).astype(np.float32)
    keys_values = writer.fp32_linear(tokens, f"{_NAME}.kv")
    keys_values = b.node("Reshape", [keys_values, b.integers(0, 0, 2, H, d)], f"{_NAME}/heads")
    keys, values = (
        b.node("Gather", [keys_values, b.scalar(index, np.int64)], f"{_NAME}/{part}", axis=2)
        for index, part in enumerate(("k", "v"))
    )
    keys = b.node("Transpose", [keys], f"{_NAME}/k_transposed", perm=[0, 2, 3, 1])
    values = b.node("Transpose", [values], f"{_NAME}/v_transposed", perm=[0, 2, 1, 3])
    scores = b.node("MatMul", [b.weight(f"{_NAME}/query", query), keys], f"{_NAME}/qk")
    if padding is not None:
        scores = b.node("Add", [scores, padding], f"{_NAME}/padding")
    shares = b.node("Softmax", [scores], f"{_NAME}/softmax", axis=-1)
    mixed = b.node("MatMul", [shares, values], f"{_NAME}/av")  # (B, H, 1, d)
    pooled = writer.fp32_linear(b.node("Reshape", [mixed, b.integers(0, D)], f"{_NAME}/merged"), f"{_NAME}.proj")
    return writer.fp32_mlp(pooled, f"{_NAME}.norm", f"{_NAME}.mlp", "gelu" if config.activation == "swiglu" else None)
