"""Attention pooling as ONNX nodes: one learned query attends to all tokens or to the patches, and an MLP follows.

FP32 whatever the precision of the blocks, as the head. Shapes: B images, T tokens, D width, H heads, d = D / H.
"""

from __future__ import annotations

import math

import numpy as np

from mae_deploy.export.graph.blocks import BlockWriter
from mae_deploy.models.config import EncoderConfig

_NAME = "attn_pool"


def write_attention_pool(writer: BlockWriter, config: EncoderConfig, tokens: str, mask: str | None) -> str:
    """What is pooled of the tokens behind the last norm: FP32 `(B, T, D) -> (B, D)`.

    Keys and values are never made: with one query, `q (W_k t)^T` is `(q W_k) t^T`, a bias of the keys is the same for
    all tokens, and the mean of `W_v t` is `W_v` of the mean. Of a stream, that is a hundredth of what an update costs,
    where keys and values of all tokens would be a sixth.

    Args:
        mask: what is added to the scores, FP32 `(B, 1, 1, T)`; None: nothing.
    """
    b, weights, D, H = writer.builder, writer.weights, config.width, config.pool_heads
    d = D // H
    if first := 0 if config.pool_prefix else config.num_prefix:
        tokens = b.without_first(tokens, first, f"{_NAME}/patches")
        mask = mask and b.without_first(mask, first, f"{_NAME}/patch_mask", axis=3)
    latent = weights[f"{_NAME}.latent"][0].astype(np.float64)
    query = latent @ weights[f"{_NAME}.q.weight"].T + weights[f"{_NAME}.q.bias"]
    of_keys, of_values = weights[f"{_NAME}.kv.weight"].reshape(2, H, d, D)
    query = np.einsum("hd,hdi->ih", query.reshape(H, d) / math.sqrt(d), of_keys).astype(np.float32)
    scores = b.node("MatMul", [tokens, b.weight(f"{_NAME}/query", query)], f"{_NAME}/qk")  # (B, T, H)
    scores = b.node("Transpose", [scores], f"{_NAME}/scores", perm=[0, 2, 1])
    if mask is not None:
        added = b.node("Squeeze", [mask, b.integers(1)], f"{_NAME}/mask")
        scores = b.node("Add", [scores, added], f"{_NAME}/masked")
    shares = b.node("Softmax", [scores], f"{_NAME}/softmax", axis=-1)
    means = b.node("MatMul", [shares, tokens], f"{_NAME}/av")  # (B, H, D)
    means = b.node("Unsqueeze", [means, b.integers(2)], f"{_NAME}/means")
    values = b.weight(f"{_NAME}.kv.weight", np.ascontiguousarray(of_values.transpose(0, 2, 1)))
    mixed = b.node("MatMul", [means, values], f"{_NAME}/values")  # (B, H, 1, d)
    mixed = b.node("Reshape", [mixed, b.integers(0, D)], f"{_NAME}/merged")
    mixed = b.node("Add", [mixed, b.weight(f"{_NAME}.kv.bias", weights[f"{_NAME}.kv.bias"][D:])], f"{_NAME}/mixed")
    pooled = writer.fp32_linear(mixed, f"{_NAME}.proj")
    return writer.fp32_mlp(pooled, f"{_NAME}.norm", f"{_NAME}.mlp", "gelu" if config.activation == "swiglu" else None)
