"""The MAE encoder as an ONNX graph whose visible tokens are an input, never a random draw.

Shapes: B images, C channels, P patch side, N patches, K kept patches, T = 1 + K tokens, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

from mae_deploy.checkpoint import Metadata
from mae_deploy.config import from_dict
from mae_deploy.errors import ConfigError
from mae_deploy.export.onnx_builder import Dim, GraphBuilder
from mae_deploy.models.config import EncoderConfig

TokenMode = Literal["full", "visible"]

Array = npt.NDArray[Any]

_EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphSpec:
    """Which graph to write."""

    token_mode: TokenMode
    """full: all patches; visible: those named by the input `ids_keep`."""
    keep: int | None = None
    """Fixed number of kept patches; None leaves it dynamic (visible)."""
    batch: int | None = None
    """Fixed batch; None leaves it dynamic."""
    outputs: tuple[str, ...] | None = None
    """Output names; None takes all that the model has."""


def available_outputs(metadata: Metadata) -> tuple[str, ...]:
    """What a model can give.

    A mean-pooled classifier has no norm after its last block, so its tokens are not offered; `pooled` is then what its head reads.
    """
    if metadata.kind != "classifier":
        return ("cls", "tokens", "pooled")
    return ("logits", "pooled") if metadata.pool == "avg" else ("logits", "cls", "tokens", "pooled")


def build_graph(metadata: Metadata, tensors: dict[str, Tensor], spec: GraphSpec) -> GraphBuilder:
    """Write the graph of an encoder or classifier.

    Args:
        tensors: the checkpoint's state dict.

    Raises:
        ConfigError: an output that the model does not have, or a K outside 1 to N.
    """
    config = from_dict(EncoderConfig, metadata.encoder)
    names = spec.outputs or available_outputs(metadata)
    for name in names:
        if name not in available_outputs(metadata):
            raise ConfigError(f"this model has no output '{name}'", hint=f"it has {', '.join(available_outputs(metadata))}")
    if spec.keep is not None and not 1 <= spec.keep <= config.num_patches:
        raise ConfigError(f"--tokens visible:{spec.keep}: K must be within 1 and {config.num_patches}")
    weights = {name: tensor.detach().float().numpy() for name, tensor in tensors.items()}
    return _EncoderGraph(config, weights, spec).write(metadata, names)


class _EncoderGraph:
    """Writes one encoder."""

    def __init__(self, config: EncoderConfig, weights: dict[str, Array], spec: GraphSpec) -> None:
        self.config = config
        self.weights = weights
        self.builder = GraphBuilder(config.name)
        self.batch: Dim = spec.batch or "B"
        self.visible = spec.token_mode == "visible"
        self.keep: Dim = (spec.keep or "K") if self.visible else config.num_patches

    def write(self, metadata: Metadata, names: tuple[str, ...]) -> GraphBuilder:
        """Embedding, blocks, norm and the outputs asked for."""
        tokens = self._embed()
        for index in range(self.config.blocks):
            tokens = self._block(tokens, f"blocks.{index}")
        if "norm.weight" in self.weights:
            tokens = self._layer_norm(tokens, "norm")
        self._outputs(tokens, metadata, names)
        return self.builder

    def _embed(self) -> str:
        """Patches, CLS as patch 0, the kept ones gathered, one linear map, one table of positions: `(B, T, D)`."""
        b, c = self.builder, self.config
        P, C, (rows, columns), N = c.patch, c.in_chans, c.grid_size, c.num_patches
        images = b.input("images", np.float32, [self.batch, C, *c.image_size])
        grid = b.node("Reshape", [images, b.integers(0, C, rows, P, columns, P)], "patchify/grid")
        grid = b.node("Transpose", [grid], "patchify/transpose", perm=[0, 2, 4, 3, 5, 1])
        patches = b.node("Reshape", [grid, b.integers(0, N, P * P * C)], "patchify/patches")
        # An all-zero patch in front stands for CLS: the linear map has no bias, so it stays zero, and row 0 of the table
        # makes it the CLS token. That needs no Expand to the batch, hence no shape arithmetic in a dynamic graph.
        tokens = b.node("Pad", [patches, b.integers(0, 1, 0, 0, 0, 0)], "cls/patch")
        table = self.weights["pos_embed"][0].copy()
        table[0] += self.weights["cls_token"][0, 0]
        table[1:] += self.weights["patch_embed.proj.bias"]
        b.weight("position_table", table)
        if self.visible:
            ids_keep = b.input("ids_keep", np.int64, [self.batch, self.keep])
            ids = b.node("Add", [ids_keep, b.integers(1)], "ids/shift")
            ids = b.node("Pad", [ids, b.integers(0, 1, 0, 0)], "ids/cls")
            index = b.node("Unsqueeze", [ids, b.integers(2)], "ids/index")
            tokens = b.node("GatherND", [tokens, index], "keep/patches", batch_dims=1)
            positions = b.node("Gather", ["position_table", ids], "keep/positions", axis=0)
        else:
            positions = "position_table"
        kernel = self.weights["patch_embed.proj.weight"].transpose(2, 3, 1, 0).reshape(P * P * C, c.width)
        tokens = b.node("MatMul", [tokens, b.weight("patch_embed.proj.weight", kernel)], "patch_embed/MatMul")
        return b.node("Add", [tokens, positions], "patch_embed/Add")

    def _block(self, tokens: str, name: str) -> str:
        """Pre-norm attention and MLP with their residuals: `(B, T, D) -> (B, T, D)`."""
        b = self.builder
        attention = self._attention(self._layer_norm(tokens, f"{name}.norm1"), f"{name}.attn")
        tokens = b.node("Add", [tokens, attention], f"{name}/attn_residual")
        hidden = self._gelu(self._linear(self._layer_norm(tokens, f"{name}.norm2"), f"{name}.mlp.fc1"), f"{name}.mlp.gelu")
        return b.node("Add", [tokens, self._linear(hidden, f"{name}.mlp.fc2")], f"{name}/mlp_residual")

    def _attention(self, tokens: str, name: str) -> str:
        """`softmax(q k^T) v` written out, the scale folded into q's weights: `(B, T, D) -> (B, T, D)`."""
        b, c = self.builder, self.config
        H, d = c.heads, c.width // c.heads
        weight, bias = self.weights[f"{name}.qkv.weight"], self.weights[f"{name}.qkv.bias"]
        scale = np.ones(3 * c.width, np.float32)
        scale[: c.width] = 1 / math.sqrt(d)
        qkv = self._linear(tokens, f"{name}.qkv", weight * scale[:, None], bias * scale)
        qkv = b.node("Reshape", [qkv, b.integers(0, 0, 3, H, d)], f"{name}/heads")
        qkv = b.node("Transpose", [qkv], f"{name}/qkv_first", perm=[2, 0, 3, 1, 4])
        q, k, v = (b.node("Gather", [qkv, b.weight(f"const/index_{i}", np.array(i, np.int64))], f"{name}/{part}", axis=0) for i, part in enumerate("qkv"))
        k = b.node("Transpose", [k], f"{name}/k_transposed", perm=[0, 1, 3, 2])
        scores = b.node("Softmax", [b.node("MatMul", [q, k], f"{name}/qk")], f"{name}/softmax", axis=-1)
        mixed = b.node("Transpose", [b.node("MatMul", [scores, v], f"{name}/av")], f"{name}/heads_last", perm=[0, 2, 1, 3])
        return self._linear(b.node("Reshape", [mixed, b.integers(0, 0, c.width)], f"{name}/merged"), f"{name}.proj")

    def _linear(self, value: str, name: str, weight: Array | None = None, bias: Array | None = None) -> str:
        b = self.builder
        weight = self.weights[f"{name}.weight"] if weight is None else weight
        bias = self.weights[f"{name}.bias"] if bias is None else bias
        product = b.node("MatMul", [value, b.weight(f"{name}.weight", weight.T)], f"{name}/MatMul")
        return b.node("Add", [product, b.weight(f"{name}.bias", bias)], f"{name}/Add")

    def _layer_norm(self, value: str, name: str) -> str:
        b = self.builder
        scale, bias = (b.weight(f"{name}.{part}", self.weights[f"{name}.{part}"]) for part in ("weight", "bias"))
        return b.node("LayerNormalization", [value, scale, bias], f"{name}/LayerNormalization", axis=-1, epsilon=_EPSILON)

    def _gelu(self, value: str, name: str) -> str:
        """The exact form, which engines know and fuse: `0.5 x (1 + erf(x / sqrt 2))`."""
        b = self.builder
        root, one, half = (b.weight(f"const/{label}", np.array(number, np.float32)) for label, number in (("sqrt2", math.sqrt(2)), ("one", 1.0), ("half", 0.5)))
        erf = b.node("Erf", [b.node("Div", [value, root], f"{name}/scaled")], f"{name}/erf")
        product = b.node("Mul", [value, b.node("Add", [erf, one], f"{name}/shifted")], f"{name}/product")
        return b.node("Mul", [product, half], f"{name}/half")

    def _outputs(self, tokens: str, metadata: Metadata, names: tuple[str, ...]) -> None:
        """Only what was asked for, and what that needs."""
        b, B, D = self.builder, self.batch, self.config.width
        averaged = metadata.kind == "classifier" and metadata.pool == "avg"
        values: dict[str, tuple[str, list[Dim]]] = {}
        if "cls" in names or ("logits" in names and not averaged):
            values["cls"] = b.node("Gather", [tokens, b.weight("const/index_0", np.array(0, np.int64))], "outputs/cls", axis=1), [B, D]
        if "tokens" in names or "pooled" in names or ("logits" in names and averaged):
            patches = b.node("Slice", [tokens, b.integers(1), b.integers(np.iinfo(np.int64).max), b.integers(1)], "outputs/tokens")
            pooled = b.node("ReduceMean", [patches], "outputs/mean", axes=[1], keepdims=0) if "pooled" in names or averaged else ""
            values["tokens"] = patches, [B, self.keep, D]
            values["pooled"] = self._layer_norm(pooled, "fc_norm") if averaged else pooled, [B, D]
        if "logits" in names:
            values["logits"] = self._linear(values["pooled" if averaged else "cls"][0], "head"), [B, metadata.num_classes or 0]
        for name in names:
            b.output(name, *values[name])
