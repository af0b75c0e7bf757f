"""The MAE encoder as an ONNX graph whose visible tokens are an input, never a random draw.

Shapes: B images, C channels, P patch side, N patches in a grid (H', W'), K kept patches, T tokens, D width. T is K
and the tokens before the patches: CLS, of today's families registers behind it, or none.
With G groups of bands, what is kept is of the G * N patches of all groups, group by group.
"""

from __future__ import annotations

import re
from functools import cached_property

import numpy as np
from torch import Tensor

from mae_deploy.checkpoint import Metadata
from mae_deploy.config import from_dict
from mae_deploy.errors import ConfigError
from mae_deploy.export.graph.blocks import BlockWriter
from mae_deploy.export.graph.builder import OPSET, OPSET_TYPED_SCALES, Dim, GraphBuilder
from mae_deploy.export.graph.cached import CacheWriter
from mae_deploy.export.graph.decoder import PixelWriter, write_decoder
from mae_deploy.export.graph.patch_embed import PatchEmbedding
from mae_deploy.export.graph.placement import Placement, first_row
from mae_deploy.export.graph.pool import write_attention_pool
from mae_deploy.export.graph.precision import FLOAT32, arithmetic
from mae_deploy.export.graph.pyramid import write_pyramid
from mae_deploy.export.graph.rotary import write_turns
from mae_deploy.export.graph.spec import GraphSpec, available_outputs, block_tensor, check_mode, default_outputs
from mae_deploy.images.read import Array
from mae_deploy.models.config import DecoderConfig, EncoderConfig
from mae_deploy.models.pyramid import LEVELS
from mae_deploy.models.quantization.rounding import ROUNDINGS, rounding_of
from mae_deploy.runtime.manifest import PATCHES

_MASKED = -6e4
"""Added to the scores of padded tokens; the softmax makes it exactly 0. FP16 holds it: TensorRT computes a weakly typed
FP32 graph in FP16, where -1e30 would be -inf, and its product with the 0 of a real token NaN."""


def build_graph(metadata: Metadata, tensors: dict[str, Tensor], spec: GraphSpec) -> GraphBuilder:
    """Write the graph of an encoder, classifier or autoencoder.

    Args:
        tensors: the checkpoint's state dict.

    Raises:
        ConfigError: an output that the model does not have, a K outside 1 to N, a mode that needs a decoder without
            one, or that groups of bands do not have.
    """
    config = from_dict(EncoderConfig, metadata.encoder)
    check_mode(metadata, spec.token_mode)
    known = available_outputs(metadata, spec.token_mode, pyramid=spec.pyramid is not None)
    names = spec.outputs or default_outputs(metadata, spec.token_mode)
    for name in names:
        if name not in known:
            hint = "pass --pyramid with it" if name in LEVELS else f"it has {', '.join(known)}"
            raise ConfigError(f"this model has no output '{name}'", hint=hint)
    if spec.keep is not None and not 1 <= spec.keep <= config.num_tokens:
        raise ConfigError(f"--tokens {spec.token_mode}:{spec.keep}: K must be within 1 and {config.num_tokens}")
    weights = {name: tensor.detach().float().numpy() for name, tensor in tensors.items()}
    return _Graph(metadata, config, weights, spec).write(names)


class _Graph:
    """Writes one graph: patches, positions, blocks, norm, outputs."""

    def __init__(self, metadata: Metadata, config: EncoderConfig, weights: dict[str, Array], spec: GraphSpec) -> None:
        self.metadata, self.config, self.weights, self.spec = metadata, config, weights, spec
        typed_scales = spec.precision in ROUNDINGS and spec.typing == "strong"
        self.builder = GraphBuilder(
            config.name, opset=OPSET_TYPED_SCALES if typed_scales else OPSET, emulates_bf16=spec.emulates_bf16
        )
        self.arithmetic = arithmetic(spec.precision, spec.typing, spec.fp32_ops)
        self.batch: Dim = spec.batch or "B"
        self.visible = spec.token_mode != "full"
        self.keep: Dim = (spec.keep or "K") if self.visible else config.num_tokens
        self.averaged = metadata.kind == "classifier" and metadata.pool == "avg"
        self.read_by_head = "cls" if metadata.pool == "cls" else "pooled"
        self.first = first_row(config)
        """Row of the first patch in the position table."""
        self.ragged = spec.token_mode == "ragged"
        self.cached = spec.token_mode == "cached"
        self.cache: CacheWriter | None = None
        self.embedding = PatchEmbedding(metadata, config, weights, uint8=spec.images == "uint8")
        self.padding: str | None = None
        """See `BlockWriter`."""
        self.places = ""
        """Row of the position table for every token, int64 `(B, T)`: of patches `first` and more, 0 for padding."""

    def write(self, names: tuple[str, ...]) -> GraphBuilder:
        """Embedding, blocks, norm and the outputs asked for."""
        patches = self._patches()
        tokens = self.builder.cast(self._embed(patches), self.arithmetic.of("residual"))
        D = self.config.width
        self.cache = self._cache() if self.cached else None
        turns = write_turns(
            self.builder,
            self.config,
            self.weights,
            self.places if self.visible else None,
            self.first if self.visible else self.config.num_prefix,
            self.arithmetic.stream,
        )
        writer = self._block_writer(self.keep, self.config.num_prefix, self.padding, self.cache)
        writer.epsilon, writer.activation = self.config.norm_eps, self.config.activation
        writer.fuses_tanh = self.spec.fuses_tanh
        rows = writer.rows(tokens, D, "blocks/rows")
        if self.config.pre_norm:
            rows = self.builder.cast(writer.layer_norm(rows, "norm_pre"), self.arithmetic.of("residual"))
        inner = []
        for index in range(self.config.blocks):
            rows = writer.block(rows, f"blocks.{index}", self.config.heads, turns[index] if turns else None)
            inner.append(rows)
        assert inner[-1] == block_tensor(len(inner) - 1)
        values = self._inner(writer, inner, names)
        if len(values) < len(names):
            tokens = self._after(writer, inner, -1)
            if "norm.weight" in self.weights and not self.averaged:
                tokens = writer.layer_norm(tokens, "norm", dtype=FLOAT32)
            values |= self._features(writer, tokens, names)
            if "pixels" in names:
                sizes: list[Dim] = [self.batch, self.config.num_patches, self.config.patch_dim]
                values["pixels"] = self._reconstruct(tokens, patches), sizes
        for name in names:
            self.builder.output(name, *values[name], dtype=self.spec.features)
        if self.cache is not None:
            T = "T" if isinstance(self.keep, str) else self.config.num_prefix + self.keep
            self.cache.output(T, self.config.heads, self.config.width // self.config.heads)
        return self.builder

    def _cache(self) -> CacheWriter:
        """Of all tokens; where K is dynamic, so is R: a frame of which every patch is recomputed needs no old rows."""
        opened = self.spec.keep is None and not self.spec.fixed_rows
        return CacheWriter(
            self.builder,
            batch=self.batch,
            rows="R" if opened else self.config.num_prefix + self.config.num_patches,
            places=self.places,
            prefix=self.config.num_prefix,
            dtype=np.dtype(self.spec.cache),
            masked=_MASKED,
        )

    def _block_writer(
        self, num_patches: Dim, prefix: int, padding: str | None = None, cache: CacheWriter | None = None
    ) -> BlockWriter:
        """A writer of blocks on this many patches and the tokens before them."""
        B, T = (size if isinstance(size, int) else -1 for size in (self.batch, num_patches))
        return BlockWriter(
            self.builder,
            self.weights,
            self.arithmetic,
            quantized=self.spec.quantized,
            attention_scales=self.spec.attention_scales,
            padding=padding,
            cache=cache,
            sizes=None if B == T == -1 else (B, T if T == -1 else prefix + T),
            rounding=rounding_of(self.spec.precision, self.spec.weight_bits),
            stores_rounded=self.spec.stores_rounded,
        )

    # --- images to tokens
    # ------------------------------------------------------------------------------------------------

    def _patches(self) -> str:
        """All patches, row by row, channels last within a patch: FP32 `(B, N, P * P * C)`; of a stream, those that are
        recomputed.
        """
        b, c = self.builder, self.config
        if self.cached:
            dtype = np.uint8 if self.spec.images == "uint8" else self.spec.images
            return b.cast(b.input(PATCHES, dtype, [self.batch, self.keep, c.patch_dim]), FLOAT32)
        P, C, (rows, columns) = c.patch, c.in_chans, c.grid_size
        H, W = c.image_size
        if self.spec.images == "uint8":
            images = b.cast(b.input("images", np.uint8, [self.batch, H, W, C]), FLOAT32)
            shape, perm = (0, rows, P, columns, P, C), [0, 1, 3, 2, 4, 5]
        else:
            images = b.cast(b.input("images", self.spec.images, [self.batch, C, H, W]), FLOAT32)
            shape, perm = (0, C, rows, P, columns, P), [0, 2, 4, 3, 5, 1]
        grid = b.node("Reshape", [images, b.integers(*shape)], "patchify/grid")
        grid = b.node("Transpose", [grid], "patchify/transpose", perm=perm)
        return b.node("Reshape", [grid, b.integers(0, c.num_patches, c.patch_dim)], "patchify/patches")

    def _embed(self, patches: str) -> str:
        """CLS as patch 0, the kept ones gathered, one linear map, one table of positions: FP32 `(B, T, D)`."""
        b, prefix = self.builder, self.config.num_prefix
        # An all-zero patch in front stands for CLS: the linear map has no bias, so it stays zero, and row 0 of the
        # table makes it the CLS token. That needs no Expand to the batch, hence no shape arithmetic in a dynamic graph.
        # So do more of them for registers.
        groups = self.config.band_groups
        kernels = [kernel for kernel, _ in self.embedding.kernels()]
        embeds = "" if groups is None else self._embed_groups(patches, kernels)
        tokens = embeds or patches
        if front := prefix if self.cached or not self.visible else self.first:
            tokens = b.node("Pad", [tokens, b.integers(0, front, 0, 0, 0, 0)], "cls/patch")
        table = self.embedding.table()
        positions = b.weight("position_table", table if self.visible else table[self.first - prefix :])
        if self.visible:
            ids = self._token_ids()
            if not self.cached:  # else these patches are all that there are
                index = b.node("Unsqueeze", [ids, b.integers(2)], "ids/index")
                tokens = b.node("GatherND", [tokens, index], "keep/patches", batch_dims=1)
            positions = b.node("Gather", [positions, ids], "keep/positions", axis=0)
        if groups is None:
            tokens = b.node("MatMul", [tokens, b.weight("patch_embed.proj.weight", kernels[0])], "patch_embed/MatMul")
        return b.node("Add", [tokens, positions], "patch_embed/Add")

    def _embed_groups(self, patches: str, kernels: list[Array]) -> str:
        """Each group's bands of all patches through its own linear map, group by group:
        `(B, N, P * P * C) -> (B, G * N, D)`.
        """
        b, c = self.builder, self.config
        embeds = []
        for group, (bands, kernel) in enumerate(zip(c.band_groups or (), kernels, strict=True)):
            own = b.node(
                "Gather",
                [patches, b.weight(f"patch_embed.{group}/columns", self.embedding.columns(bands))],
                f"patch_embed.{group}/patches",
                axis=2,
            )
            embeds.append(
                b.node(
                    "MatMul", [own, b.weight(f"patch_embed.{group}.proj.weight", kernel)], f"patch_embed.{group}/MatMul"
                )
            )
        return b.node("Concat", embeds, "patch_embed/groups", axis=1)

    def _token_ids(self) -> str:
        """The inputs that name the patches, as `places`."""
        b = self.builder
        kept = b.input("ids_keep", np.int64, [self.batch, self.keep])
        if self.ragged:
            real = self._real(kept)
            # Padding may hold anything: it becomes copies of CLS, which read no pixel and can widen no range of values.
            kept = b.node("Where", [real, kept, b.scalar(-self.first, np.int64)], "ids/safe")
            self.padding = self._mask(real)
        self.places = b.node("Add", [kept, b.integers(self.first)], "ids/shift")
        for row in reversed(range(self.config.num_prefix)):  # CLS last: row 0
            value = [b.scalar(row, np.int64)] if row else []
            self.places = b.node("Pad", [self.places, b.integers(0, 1, 0, 0), *value], f"ids/{row or 'cls'}")
        return self.places

    def _real(self, kept: str) -> str:
        """Which entries of `ids_keep` are real: bool `(B, K)`, position < num_keep."""
        b = self.builder
        num_keep = b.node("Unsqueeze", [b.input("num_keep", np.int64, [self.batch]), b.integers(1)], "padding/num_keep")
        # Whole numbers: FP16, in which TensorRT may compute a weakly typed graph, counts to 2048.
        most = self.keep if isinstance(self.keep, int) else self.config.num_tokens
        ordinals = b.weight("padding/ordinals", np.arange(1, most + 1, dtype=np.int64)[None])
        if not isinstance(self.keep, int):  # the first K; CumSum is a loop to TensorRT 8.6: no CUDA graph takes it
            length = b.node("Shape", [kept], "padding/K", start=1, end=2)
            ordinals = b.node("Slice", [ordinals, b.integers(0), length, b.integers(1)], "padding/first")
        return b.node("LessOrEqual", [ordinals, num_keep], "padding/real")

    def _mask(self, real: str) -> str:
        """What keeps padding out of attention: FP32 `(B, 1, 1, T)`, 0 where a token is real, very negative where it is
        padding.
        """
        b = self.builder
        tokens = b.cast(real, FLOAT32)
        if prefix := self.config.num_prefix:
            tokens = b.node("Pad", [tokens, b.integers(0, prefix, 0, 0), b.scalar(1.0)], "padding/tokens")
        self.real_tokens = tokens
        absent = b.node("Sub", [b.scalar(1.0), tokens], "padding/absent")
        bias = b.node("Mul", [absent, b.scalar(_MASKED)], "padding/bias")
        return b.node("Unsqueeze", [bias, b.integers(1, 2)], "padding/scores")

    @cached_property
    def _real_rows(self) -> str:
        """FP32 `(B, T, 1)`: 1 where a token is real, 0 where it is padding."""
        return self.builder.node("Unsqueeze", [self.real_tokens, self.builder.integers(2)], "padding/rows")

    # --- tokens to outputs
    # -----------------------------------------------------------------------------------------------

    def _after(self, writer: BlockWriter, blocks: list[str], index: int) -> str:
        """FP32 tokens after a block, `(B, T, D)`."""
        index %= len(blocks)
        return self.builder.cast(writer.tokens(blocks[index], self.config.width, f"blocks.{index}/tokens"), FLOAT32)

    def _inner(
        self, writer: BlockWriter, blocks: list[str], names: tuple[str, ...]
    ) -> dict[str, tuple[str, list[Dim]]]:
        """What is asked for of the tokens before the final norm: `block_I` and the pyramid."""
        b = self.builder
        values: dict[str, tuple[str, list[Dim]]] = {}
        for name in names:
            if match := re.fullmatch(r"block_(\d+)", name):
                values[name] = (
                    self._patch_tokens(self._after(writer, blocks, int(match[1])), name),
                    [self.batch, self.keep, self.config.width],
                )
        if levels := [name for name in names if name in LEVELS]:
            assert self.spec.pyramid is not None
            last = self._feature_map(
                self._after(writer, blocks, -1), "last_block"
            )  # ViTDet's encoder has no final norm
            values |= write_pyramid(b, last, self.spec.pyramid, self.config.grid_size, self.batch, levels)
        return values

    def _features(self, writer: BlockWriter, tokens: str, names: tuple[str, ...]) -> dict[str, tuple[str, list[Dim]]]:
        """Only what was asked for, and what that needs."""
        b, B, D = self.builder, self.batch, self.config.width
        values: dict[str, tuple[str, list[Dim]]] = {}
        wanted = {*names, *({self.read_by_head} if {"logits", "probs"} & {*names} else ())}
        if "cls" in wanted:
            values["cls"] = b.node("Gather", [tokens, b.scalar(0, np.int64)], "outputs/cls", axis=1), [B, D]
        attended = bool(self.config.pool_heads) and self.metadata.pool in (None, "map")
        if wanted & {"tokens", *(() if attended else ("pooled",))}:
            values["tokens"] = self._patch_tokens(tokens, "tokens"), [B, self.keep, D]
        if "pooled" in wanted:
            pooled = self._attended(writer, tokens) if attended else self._mean(values["tokens"][0])
            normed = "fc_norm.weight" in self.weights
            values["pooled"] = writer.layer_norm(pooled, "fc_norm", dtype=FLOAT32) if normed else pooled, [B, D]
        if {"logits", "probs"} & wanted:
            logits = writer.fp32_linear(values[self.read_by_head][0], "head")
            values["logits"] = logits, [B, self.metadata.num_classes or 0]
            if "probs" in names:
                values["probs"] = b.node("Softmax", [logits], "outputs/probs", axis=-1), values["logits"][1]
        if "feature_map" in names:
            values["feature_map"] = self._feature_map(tokens, "tokens"), [B, D, *self.config.grid_size]
        return values

    def _patch_tokens(self, tokens: str, name: str) -> str:
        """Without CLS, `(B, K, D)`; padded rows are zero."""
        b = self.builder
        if self.ragged:
            tokens = b.node("Mul", [tokens, self._real_rows], f"outputs/{name}/real")
        return b.without_first(tokens, self.config.num_prefix, f"outputs/{name}")

    def _attended(self, writer: BlockWriter, tokens: str) -> str:
        """What attention pools of the real tokens: `(B, T, D) -> (B, D)`; of a stream, of the whole frame."""
        pooled = self.cache.behind_tokens(tokens, self.config.width) if self.cache else (tokens, self.padding)
        return write_attention_pool(writer, self.config, *pooled)

    def _mean(self, patch_tokens: str) -> str:
        """Mean over the real patches: `(B, K, D) -> (B, D)`; of a stream, over the whole frame."""
        b = self.builder
        if self.cache is not None:
            return self.cache.mean(patch_tokens, self.config.width)
        if not self.ragged:
            return b.mean(patch_tokens, 1, "outputs/mean")
        total = b.node("ReduceSum", [patch_tokens, b.integers(1)], "outputs/sum", keepdims=0)
        return b.node("Div", [total, b.cast("padding/num_keep", FLOAT32)], "outputs/mean")

    def _feature_map(self, tokens: str, name: str) -> str:
        """Tokens at their places in the grid, zeros where a patch is not visible: `(B, T, D) -> (B, D, H', W')`.

        Of groups of bands, the mean over those that are visible at a place.
        """
        b, c = self.builder, self.config
        if self.visible:
            patches = b.without_first(self._placement.placed(tokens), self.first, f"maps/{name}/patches")
        else:
            patches = b.without_first(tokens, c.num_prefix, f"maps/{name}/patches")
        if c.band_groups is not None:
            patches = b.node(
                "Reshape", [patches, b.integers(0, c.num_groups, c.num_patches, c.width)], f"maps/{name}/groups"
            )
            if self.visible:
                total = b.node("ReduceSum", [patches, b.integers(1)], f"maps/{name}/sum", keepdims=0)
                patches = b.node("Div", [total, self._groups_seen], f"maps/{name}/mean")
            else:
                patches = b.mean(patches, 1, f"maps/{name}/mean")
        columns = b.node("Transpose", [patches], f"maps/{name}/channels_first", perm=[0, 2, 1])
        return b.node("Reshape", [columns, b.integers(0, c.width, *c.grid_size)], f"maps/{name}")

    @cached_property
    def _placement(self) -> Placement:
        return Placement(self.builder, self.config, self.places)

    @cached_property
    def _groups_seen(self) -> str:
        """How many groups are visible at each place, at least 1: FP32 `(B, N, 1)`."""
        b, c = self.builder, self.config
        seen = b.node("ReduceSum", [self._placement.one_hot, b.integers(2)], "places/seen", keepdims=1)
        seen = b.without_first(seen, 1, "places/seen_patches")
        seen = b.node("Reshape", [seen, b.integers(0, c.num_groups, c.num_patches, 1)], "places/seen_groups")
        return b.node(
            "Max",
            [b.node("ReduceSum", [seen, b.integers(1)], "places/groups", keepdims=0), b.scalar(1.0)],
            "places/groups_seen",
        )

    def _reconstruct(self, latent: str, patches: str) -> str:
        """Every patch's pixels from the tokens of the visible ones: FP32 `(B, T, D) -> (B, N, P * P * C)`."""
        decoder = from_dict(DecoderConfig, self.metadata.decoder or {})
        writer = self._block_writer(self.config.num_patches, 1)
        predicted = write_decoder(writer, decoder, latent, self._placement.for_decoder)
        pixels = PixelWriter(
            self.builder,
            *self.embedding.statistics(),
            uint8=self.spec.images == "uint8",
            norm_pix_loss=bool(self.metadata.norm_pix_loss),
        )
        return pixels.write(predicted, patches, self.spec.pixels)
