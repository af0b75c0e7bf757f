"""A block alone computes what timm's does, on tokens and on rows, with and without padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import Block

from mae_deploy.export.graph.blocks import BlockWriter
from mae_deploy.export.graph.builder import Dim, GraphBuilder
from mae_deploy.export.graph.precision import FLOAT16, FLOAT32, arithmetic
from mae_deploy.images.read import Array
from mae_deploy.models.vit import LayerNorm, transformer_blocks
from tests.export.tiny_exports import SavedGraph, assert_close
from tests.models.tiny_models import fill, random_tensor

B, T, D, HEADS = 2, 5, 12, 3


def block_and_weights(mlp_ratio: float = 2.5) -> tuple[Block, dict[str, Array]]:
    block = fill(Block(D, HEADS, mlp_ratio, qkv_bias=True, norm_layer=LayerNorm))
    return block, {f"blocks.0.{name}": tensor.numpy() for name, tensor in block.state_dict().items()}


def graph_of(
    folder: Path, weights: dict[str, Array], sizes: tuple[int, int] | None, padding: bool = False, **options: Any
) -> SavedGraph:
    b = GraphBuilder("block")
    shape: list[Dim] = (
        ["B", "T"] if sizes is None else [name if size == -1 else size for size, name in zip(sizes, "BT", strict=True)]
    )
    tokens = b.input("tokens", np.float32, [*shape, D])
    mask = b.input("mask", np.float32, [shape[0], 1, 1, shape[1]]) if padding else None
    types = options.pop("arithmetic", arithmetic("fp32", "weak"))
    writer = BlockWriter(b, weights, types, padding=mask, sizes=sizes, **options)
    rows = writer.block(b.cast(writer.rows(tokens, D, "rows"), types.of("residual")), "blocks.0", HEADS)
    b.output("block", writer.tokens(rows, D, "tokens_again"), [*shape, D])
    return SavedGraph(b, folder)


@pytest.mark.parametrize("sizes", [None, (B, T), (B, -1), (-1, T)], ids=str)
def test_the_block_is_timms(tmp_path: Path, sizes: tuple[int, int] | None) -> None:
    block, weights = block_and_weights()
    tokens = random_tensor(B, T, D)
    with torch.no_grad():
        expected = block(tokens).numpy()
    assert_close(graph_of(tmp_path, weights, sizes)(tokens=tokens.numpy()), {"block": expected})


@pytest.mark.parametrize("sizes", [None, (B, T)], ids=str)
def test_padding_is_out_of_everybodys_attention(tmp_path: Path, sizes: tuple[int, int] | None) -> None:
    block, weights = block_and_weights()
    tokens, mask = random_tensor(B, T, D), np.zeros((B, 1, 1, T), np.float32)
    mask[0, ..., 2:], mask[1, ..., 4:] = -1e30, -1e30
    found = graph_of(tmp_path, weights, sizes, padding=True)(tokens=tokens.numpy(), mask=mask)["block"]
    with torch.no_grad():
        for image, length in enumerate((2, 4)):
            expected = block(tokens[image : image + 1, :length]).numpy()
            assert_close({"block": found[image : image + 1, :length]}, {"block": expected})


def test_the_scale_of_attention_is_in_the_weights_of_q(tmp_path: Path) -> None:
    """No engine has to multiply by it."""
    _, weights = block_and_weights()
    saved = graph_of(tmp_path, weights, None)
    stored = onnx_array(saved, "blocks.0.attn.qkv.weight").reshape(D, 3 * D)
    own = weights["blocks.0.attn.qkv.weight"].T
    np.testing.assert_array_equal(stored[:, :D], own[:, :D] * np.float32(0.5))  # heads of 4
    np.testing.assert_array_equal(stored[:, D:], own[:, D:])
    names = [node.name for node in saved.model.graph.node if node.op_type in ("Mul", "Div")]
    assert all("gelu" in name for name in names)


def onnx_array(saved: SavedGraph, name: str) -> Array:
    tensor = saved.weights[name]
    return np.frombuffer(tensor.raw_data, np.float32)


def test_a_norm_in_a_type_of_its_own() -> None:
    """The final norm is FP32 where the blocks are FP16, and a norm in a block comes back to the stream's type."""
    _, weights = block_and_weights()
    b = GraphBuilder("norms")
    writer = BlockWriter(b, weights, arithmetic("fp16", "strong", ("norm",)))
    value = b.input("tokens", np.float16, [B, T, D])
    assert b.types[writer.layer_norm(value, "blocks.0.norm1")] == FLOAT16
    assert b.types[writer.layer_norm(value, "blocks.0.norm2", dtype=FLOAT32)] == FLOAT32


def test_the_stacks_blocks_are_told_apart(tmp_path: Path) -> None:
    """Two blocks in one graph share constants and no weights."""
    blocks = fill(transformer_blocks(D, 2, HEADS))
    weights = {f"blocks.{name}": tensor.numpy() for name, tensor in blocks.state_dict().items()}
    b = GraphBuilder("blocks")
    value = b.input("tokens", np.float32, ["B", "T", D])
    writer = BlockWriter(b, weights, arithmetic("fp32", "weak"))
    for index in range(2):
        value = writer.block(value, f"blocks.{index}", HEADS)
    b.output("block", value, ["B", "T", D])
    saved, tokens = SavedGraph(b, tmp_path), random_tensor(B, T, D)
    with torch.no_grad():
        assert_close(saved(tokens=tokens.numpy()), {"block": blocks[1](blocks[0](tokens)).numpy()})
    assert {name for name in saved.weights if not name.startswith("const/")} == set(weights)
