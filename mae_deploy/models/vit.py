"""The ViT encoder on timm's blocks, and the classifier on top of it.

State-dict names and arithmetic are those of the original MAE implementation and of timm.
Shapes: B images, C channels, P patch side, N patches, K kept patches, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from timm.layers import AttentionPoolLatent, GluMlp, Mlp, QuickGELU, trunc_normal_
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from mae_deploy.errors import ConfigError
from mae_deploy.models.bands import GroupedPatchEmbed, group_positions
from mae_deploy.models.config import Activation, EncoderConfig
from mae_deploy.models.position import sincos_group_embedding, sincos_position_embedding
from mae_deploy.models.rotary import Rotary, Turn, rotate

Pool = Literal["avg", "cls", "mean", "map"]
"""What a head reads: the mean of the patches through `fc_norm`, without the encoder's norm; the class token; the mean
of the patches behind the norm; the encoder's attention pooling."""

LayerNorm: Any = partial(nn.LayerNorm, eps=1e-6)

ACTIVATIONS: dict[Activation, Any] = {
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "quick_gelu": QuickGELU,
    "swiglu": nn.SiLU,
}

EXPLICIT_ATTENTION_TOKENS = 65
"""Up to this many tokens, attention written out trains about twice as fast on a CPU as the fused kernel (its backward
pass)."""


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """`(B, C, H, W) -> (B, N, P * P * C)`: patches row by row, channels last within a patch."""
    B, C, H, W = images.shape
    P = patch_size
    patches = images.reshape(B, C, H // P, P, W // P, P)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(B, (H // P) * (W // P), P * P * C)


def unpatchify(patches: Tensor, patch_size: int, grid_size: tuple[int, int]) -> Tensor:
    """The inverse of `patchify`: `(B, N, P * P * C) -> (B, C, H, W)`."""
    B, _, width = patches.shape
    P, (rows, columns) = patch_size, grid_size
    C = width // (P * P)
    images = patches.reshape(B, rows, columns, P, P, C).permute(0, 5, 1, 3, 2, 4)
    return images.reshape(B, C, rows * P, columns * P)


def gather_tokens(tokens: Tensor, ids: Tensor) -> Tensor:
    """Pick tokens by index: `(B, N, D), (B, K) -> (B, K, D)`."""
    return tokens.gather(1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[2]))


def rows_of(tokens: Tensor, config: EncoderConfig) -> Tensor:
    """CLS and the patches, without registers: `(B, P + K, D) -> (B, 1 + K, D)`; where there is no CLS, the mean of the
    patches stands for it.
    """
    P = config.num_prefix
    if P == 1 and config.class_token:
        return tokens
    patches = tokens[:, P:]
    cls = tokens[:, :1] if config.class_token else patches.mean(dim=1, keepdim=True)
    return torch.cat([cls, patches], dim=1)


class PatchEmbed(nn.Module):
    """A linear map of flat patches; its weight is kept in the convolution form that every checkpoint has."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.in_chans, config.width, kernel_size=config.patch, stride=config.patch)

    def forward(self, patches: Tensor) -> Tensor:
        """`(B, K, P * P * C) -> (B, K, D)`."""
        return F.linear(patches, self.proj.weight.permute(0, 2, 3, 1).flatten(1), self.proj.bias)


def transformer_blocks(
    dim: int,
    depth: int,
    num_heads: int,
    *,
    mlp_ratio: float = 4.0,
    drop_path: float = 0.0,
    activation: Activation = "gelu",
    qk_norm: bool = False,
    attn_norm: bool = False,
    mlp_norm: bool = False,
    norm_layer: Any = LayerNorm,
) -> nn.ModuleList:
    """timm's pre-norm blocks with stochastic depth rising linearly from 0 to `drop_path`."""
    return nn.ModuleList(
        BlockWithQKV(
            dim,
            num_heads,
            mlp_ratio,
            qkv_bias=True,
            qk_norm=qk_norm,
            scale_attn_norm=attn_norm,
            scale_mlp_norm=mlp_norm,
            norm_layer=norm_layer,
            act_layer=ACTIVATIONS[activation],
            mlp_layer=_MLPS.get(activation, Mlp),
            drop_path=rate,
        )
        for rate in np.linspace(0, drop_path, depth).tolist()
    )


def _gated_mlp(in_features: int, hidden_features: int, **parts: Any) -> Any:
    """SwiGLU with both halves of its first layer in one, the gate first, and `hidden_features` numbers between its
    layers.
    """
    return GluMlp(in_features, 2 * hidden_features, gate_last=False, **parts)


_MLPS: dict[Activation, Any] = {"swiglu": _gated_mlp}


class BlockWithQKV(Block):
    """timm's block, which also turns its queries and keys, and gives them and its values where they are asked for.
    Calls go through the block, as FSDP2 needs it.
    """

    def forward(
        self,
        x: Tensor,
        *args: Any,
        turn: Turn | None = None,
        inner: Literal["with_qkv", "only_qkv"] | None = None,
        **kwargs: Any,
    ) -> Any:
        """`(B, T, D)` to the same, to that and the queries, keys and values as attention multiplies them,
        `(B, 3, heads, T, D / heads)`, or to the latter alone.

        Args:
            turn: rotary positions of the tokens.
        """
        if inner is None and turn is None:
            return super().forward(x, *args, **kwargs)
        attention: Any = self.attn
        B, T, _ = x.shape
        qkv = (
            attention.qkv(self.norm1(x))
            .reshape(B, T, 3, attention.num_heads, attention.head_dim)
            .permute(0, 2, 3, 1, 4)
        )
        if turn is not None or not isinstance(attention.q_norm, nn.Identity):
            queries, keys, values = qkv.unbind(1)
            queries, keys = attention.q_norm(queries), attention.k_norm(keys)
            if turn is not None:
                queries, keys = rotate(queries, turn), rotate(keys, turn)
            qkv = torch.stack([queries, keys, values], dim=1)
        if inner == "only_qkv":
            return qkv
        x = self.behind_attention(x, _attended(attention, qkv))
        return x if inner is None else (x, qkv)

    def behind_attention(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The block's input and what its heads gave, `(B, T, D)` and `(B, heads, T, D / heads)`, to its output."""
        attention: Any = self.attn
        mixed = attention.norm(mixed.transpose(1, 2).flatten(2))
        x = x + self.drop_path1(self.ls1(attention.proj(mixed)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))  # type: ignore[no-any-return]


def _attended(attention: Any, qkv: Tensor) -> Tensor:
    """What timm's attention does between its `qkv` and `proj` layers: `(B, 3, H, T, d) -> (B, H, T, d)`."""
    queries, keys, values = qkv.unbind(1)
    if attention.fused_attn:
        return F.scaled_dot_product_attention(queries, keys, values)
    shares: Tensor = ((queries * attention.scale) @ keys.transpose(-2, -1)).softmax(dim=-1)
    return shares @ values


def run_blocks(blocks: nn.ModuleList, tokens: Tensor, turns: Sequence[Turn] | None = None) -> Tensor:
    """Apply blocks in turn, with the attention that is faster for this device and length.

    Args:
        turns: rotary positions, for each block.
    """
    for index, block in enumerate(blocks):
        tokens = run_block(block, tokens, turn=turns[index] if turns else None)
    return tokens


def run_block(block: nn.Module, tokens: Tensor, **inner: Any) -> Any:
    """Apply one block (see `BlockWithQKV`), with the attention that is faster for this device and length."""
    assert isinstance(block, Block)
    block.attn.fused_attn = not tokens.is_cpu or tokens.shape[1] > EXPLICIT_ATTENTION_TOKENS  # type: ignore[assignment]
    return block(tokens, **inner)


class Encoder(nn.Module):
    """The MAE encoder: all patches, or only those named by `ids_keep`, with a CLS token before them.

    Families of today have registers behind CLS, or no CLS; P is the number of tokens before the patches.
    """

    def __init__(self, config: EncoderConfig, *, drop_path: float = 0.0) -> None:
        super().__init__()
        self.config = config
        D = config.width
        norm_layer: Any = partial(nn.LayerNorm, eps=config.norm_eps)
        self.patch_embed: Any = PatchEmbed(config) if config.band_groups is None else GroupedPatchEmbed(config)
        self.cls_token: Any = nn.Parameter(torch.zeros(1, 1, D)) if config.class_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, config.num_registers, D)) if config.num_registers else None
        # A parameter, because fine-tuning may train it; fixed until then. None without a table.
        self.pos_embed: Any = (
            nn.Parameter(sincos_position_embedding(D - config.group_dim, config.grid_size), requires_grad=False)
            if config.position_table
            else None
        )
        if config.band_groups is not None:
            self.channel_embed = nn.Parameter(
                sincos_group_embedding(config.group_dim, config.num_groups), requires_grad=False
            )
        self.rope = Rotary(config) if config.rotary != "none" else None
        self.norm_pre: nn.Module = norm_layer(D) if config.pre_norm else nn.Identity()
        self.blocks = transformer_blocks(
            D,
            config.blocks,
            config.heads,
            mlp_ratio=config.mlp_ratio,
            drop_path=drop_path,
            activation=config.activation,
            qk_norm=config.qk_norm,
            attn_norm=config.attn_norm,
            mlp_norm=config.mlp_norm,
            norm_layer=norm_layer,
        )
        self.norm: nn.Module = norm_layer(D) if config.final_norm else nn.Identity()
        self.fc_norm: nn.Module = norm_layer(D) if config.pool_norm else nn.Identity()
        self.attn_pool = (
            AttentionPoolLatent(
                D,
                num_heads=config.pool_heads,
                mlp_ratio=config.pool_mlp_ratio,
                norm_layer=norm_layer,
                act_layer=ACTIVATIONS["gelu" if config.activation == "swiglu" else config.activation],
            )
            if config.pool_heads
            else None
        )
        self._initialise()

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.parameters()).device

    def embed(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Patch embedding plus position of the kept patches, CLS and registers in front:
        `(B, C, H, W), (B, K) -> (B, P + K, D)`.
        """
        _, C, H, W = images.shape
        if (C, H, W) != (self.config.in_chans, *self.config.image_size):
            raise ValueError(
                f"the encoder takes {self.config.in_chans}x{self.config.image_size} images, not {(C, H, W)}"
            )
        patches = patchify(images, self.config.patch)
        if self.config.band_groups is None:
            return self.embed_patches(patches if ids_keep is None else gather_tokens(patches, ids_keep), ids_keep)
        # The groups' patches differ in width: tokens can be picked once they are embedded.
        embeds = self.patch_embed(patches)
        return self._placed(embeds if ids_keep is None else gather_tokens(embeds, ids_keep), ids_keep)

    def embed_patches(self, patches: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """The same of patches that were cut out already, without groups of bands:
        `(B, K, P * P * C), (B, K) -> (B, P + K, D)`.
        """
        return self._placed(self.patch_embed(patches), ids_keep)

    def _placed(self, embeds: Tensor, ids_keep: Tensor | None) -> Tensor:
        """Positions added, CLS and registers in front: `(B, K, D) -> (B, P + K, D)`."""
        table = self.positions()
        cls: Tensor | None = self.cls_token
        if table is not None:
            embeds = embeds + (table[:, 1:] if ids_keep is None else table[0, 1:][ids_keep])
            cls = None if cls is None else cls + table[:, :1]
        prefix = [
            part.expand(len(embeds), -1, -1).to(embeds.dtype) for part in (cls, self.reg_token) if part is not None
        ]
        return self.norm_pre(torch.cat([*prefix, embeds], dim=1))  # type: ignore[no-any-return]

    def positions(self) -> Any:
        """What is added to every token but registers, CLS first: `(1, 1 + N, D)`, with groups of bands
        `(1, 1 + G * N, D)`; None without a table.
        """
        if self.pos_embed is None or self.config.band_groups is None:
            return self.pos_embed
        return group_positions(self.pos_embed, self.channel_embed, self.config.num_groups)

    def turns(self, ids_keep: Tensor | None = None) -> list[Turn] | None:
        """Rotary positions of all tokens or of the kept ones, for each block; None without."""
        return None if self.rope is None else self.rope(ids_keep)

    def rows(self, tokens: Tensor) -> Tensor:
        """See `rows_of`."""
        return rows_of(tokens, self.config)

    def pool_latent(self, latent: Tensor) -> Tensor:
        """One vector of an image: what attention pools, else the mean of the patches, through `fc_norm` where there is
        one: `(B, P + K, D) -> (B, D)`.
        """
        patches = latent[:, self.config.num_prefix :]
        if self.attn_pool is None:
            pooled = patches.mean(dim=1)
        else:
            pooled = self.attn_pool(latent if self.config.pool_prefix else patches)
        return self.fc_norm(pooled)  # type: ignore[no-any-return]

    def forward(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """CLS, registers and patch tokens after the final norm: `(B, C, H, W), (B, K) -> (B, P + K, D)`.

        Args:
            ids_keep: int64 `(B, K)` row-major patch indices in any order; None keeps all in row-major order. With
                groups of bands, patch n of group g is `g * N + n`.

        Raises:
            ValueError: the images have another size or number of channels.
        """
        tokens = run_blocks(self.blocks, self.embed(images, ids_keep), self.turns(ids_keep))
        return self.norm(tokens)  # type: ignore[no-any-return]

    def _initialise(self) -> None:
        """As the original: Xavier-uniform linear maps (the patch embedding as one), normal(0.02) tokens."""
        for module in self.patch_embed.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.data.flatten(1))
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=0.02)
        self.blocks.apply(initialise_linear)


def initialise_linear(module: nn.Module) -> None:
    """Xavier-uniform weight and zero bias of a linear layer; leaves other modules alone."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Classifier(Encoder):
    """Encoder and linear head, as the original fine-tunes it; see `Pool` for what the head reads.

    Raises:
        ConfigError: it is to read a class token or an attention pooling that the encoder does not have.
    """

    def __init__(self, config: EncoderConfig, *, num_classes: int, pool: Pool = "avg", drop_path: float = 0.0) -> None:
        super().__init__(config, drop_path=drop_path)
        self.pool = pool
        if (pool == "cls" and not config.class_token) or (pool == "map" and not config.pool_heads):
            raise ConfigError(
                f"--pool {pool}: the encoder has no {'class token' if pool == 'cls' else 'attention pooling'}",
                hint="pass --pool avg",
            )
        if pool != "map":
            self.attn_pool = None
        if pool == "avg":
            self.norm = nn.Identity()
        self.fc_norm = nn.LayerNorm(config.width, eps=config.norm_eps) if pool == "avg" else nn.Identity()
        self.head = nn.Linear(config.width, num_classes)
        trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)

    def forward_pooled(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """What the head reads: `(B, C, H, W), (B, K) -> (B, D)`."""
        return self.pool_latent(super().forward(images, ids_keep))

    def pool_latent(self, latent: Tensor) -> Tensor:
        """The same from the encoder's latent: `(B, P + K, D) -> (B, D)`."""
        return latent[:, 0] if self.pool == "cls" else super().pool_latent(latent)

    def forward(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Logits: `(B, C, H, W), (B, K) -> (B, classes)`."""
        return self.head(self.forward_pooled(images, ids_keep))  # type: ignore[no-any-return]
